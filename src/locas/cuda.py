"""What the code asks of CUDA: whether something is captured, and whether Triton's kernels run here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor


def is_captured() -> bool:
    """Whether what is computed now goes into a CUDA graph, so that no number can be looked at."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def perhaps(flags: Tensor) -> bool:
    """Whether any of these is true; where nobody can know, because it is captured, too."""
    return is_captured() or bool(flags.any())


@functools.cache
def has_flash(device: torch.device) -> bool:
    """Whether torch's flash attention and Triton's kernels run on this device: NVIDIA's Ampere (2020) or later."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def kernels() -> Any:
    """The module `locas.kernels`; None where Triton is missing, or cannot compile (it needs a C compiler), and on older
    devices."""
    if importlib.util.find_spec("triton") is None or not has_flash(torch.device("cuda")):
        return None
    try:
        found: Any = importlib.import_module("locas.kernels")
        shapes = ((1, 1, 16), (4, 16), (2, 16), (1, 1, 16))
        found.read_token(*(torch.zeros(shape, device="cuda") for shape in shapes), "relu")
    except Exception as error:  # whatever its compiler may raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"Triton does not compile here, so torch's own kernels are used: {first}", stacklevel=2)
        return None
    return found


__all__ = ["has_flash", "is_captured", "kernels", "perhaps"]
