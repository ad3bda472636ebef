"""Less memory for a chunk's backward pass, with the same numbers to the last bit.

Most of what learning needs beyond reading is what autograd keeps of the frozen backbone. A gated FFN keeps act(gate)
beside the gate that it is made of: here it is made again, which takes about a five-hundredth of a chunk's time. (The
attention mask is the other thing that need not be kept in every layer: see `locas.attention`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_Packed = Tensor | tuple[Callable[[Tensor], Tensor], Tensor]


@contextmanager
def recomputed() -> Iterator[None]:
    """For a graph made inside: SiLUs and GELUs of a tensor that is kept are not kept, the backward pass makes them."""
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


def _pack(kept: Tensor) -> _Packed:
    """What to keep in place of a tensor: where it is an activation's output, the function and its input, which the
    activation itself keeps anyway."""
    made_by: Any = kept.grad_fn
    name = type(made_by).__name__
    if name == "SiluBackward0":
        return F.silu, made_by._saved_self.detach()
    if name == "GeluBackward0":
        return partial(F.gelu, approximate=made_by._saved_approximate), made_by._saved_self.detach()
    # Not the tensor itself: an operation that keeps its own output would then hold itself, and outlive a graph that no
    # backward pass goes through.
    return kept.detach()


def _unpack(packed: _Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    function, of = packed
    with torch.no_grad():
        return function(of)


__all__ = ["recomputed"]
