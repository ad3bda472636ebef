"""Tiny checkpoints, memory files beside them, and what is asked of both."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from locas.bank import Bank
from locas.memory import Memory, Provenance
from locas.merge import MEMORIES
from locas.sites import fingerprint

UNEQUAL = {0: 3, 2: 5}  # layer 1 has none
SavedOf = Callable[..., tuple[PreTrainedModel, Path]]


def keep(bank: Bank, model: nn.Module, path: Path, backbone: str | Path = "elsewhere") -> Path:
    """A memory file of this bank."""
    Memory(bank, Provenance(str(backbone), fingerprint(model))).save(path)
    return path


def stock(folder: Path, dtype: Any = torch.float64) -> PreTrainedModel:
    """What transformers makes of a folder, all of whose tensors it must use."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def came_back(source: Path, output: Path, memories: list[Path]) -> None:
    """Everything but weights in other containers is in `output`, byte for byte, and the memories are."""
    wanted = {name: digest for name, digest in files_of(source).items() if not name.endswith(".bin")}
    wanted |= {f"{MEMORIES}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in memories}
    assert files_of(output) == wanted
