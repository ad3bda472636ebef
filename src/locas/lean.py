"""Less memory for a chunk's backward pass, with the same numbers to the last bit.

Most of what learning needs beyond reading is what autograd keeps of the frozen backbone. Three things need not be kept:

* A gated FFN keeps act(gate) beside the gate that it is made of: here it is made again, which takes about a
  five-hundredth of a chunk's time.
* A norm computes in float32, and keeps a float32 copy of hidden states that have half the bits: those are kept instead.
* A memory keeps its input, an RMSNorm's output: it is made again from what the norm keeps.

(The attention mask, and keys that are repeated for several queries, are others: see `locas.attention`.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_Packed = Tensor | Callable[[], Tensor]
_HALF = (torch.bfloat16, torch.float16)


@contextmanager
def recomputed() -> Iterator[None]:
    """For a graph made inside: what can be made again from less, or from what else is kept, is not kept."""
    with torch.autograd.graph.saved_tensors_hooks(_Pack(), _unpack):
        yield


class _Pack:
    """What to keep in place of a tensor: itself, or what makes it again.

    Not the tensor itself even then, but a detached one: an operation that keeps its own output would hold itself, and
    outlive a graph that no backward pass goes through.
    """

    def __init__(self) -> None:
        # The last tensor that something smaller is kept of: a norm's square and its product keep the same one.
        self._last: tuple[Callable[[], Tensor | None], _Packed] = (lambda: None, torch.empty(0))

    def __call__(self, kept: Tensor) -> _Packed:
        last, packed = self._last
        if last() is kept:
            return packed
        smaller = _smaller(kept)
        if smaller is None:
            return kept.detach()
        self._last = (weakref.ref(kept), smaller)
        return smaller


def _smaller(kept: Tensor) -> _Packed | None:
    """What makes a tensor again from less, by the operation that it comes from; None: nothing does."""
    made_by: Any = kept.grad_fn
    match type(made_by).__name__:
        case "SiluBackward0":
            return partial(F.silu, made_by._saved_self.detach())
        case "GeluBackward0":
            return partial(F.gelu, made_by._saved_self.detach(), approximate=made_by._saved_approximate)
        case "ToCopyBackward0":
            before, output = made_by.next_functions[0]
            dtype = before._input_metadata[output].dtype
            if dtype in _HALF and kept.dtype == torch.float32:
                return partial(kept.detach().to(dtype).to, kept.dtype)
        case "MulBackward0":
            return _normed(made_by, kept.shape)
        case "ViewBackward0":  # as a product of matrices sees it
            before = made_by.next_functions[0][0]
            return _normed(before, kept.shape) if type(before).__name__ == "MulBackward0" else None
    return None


def _normed(product: Any, shape: torch.Size) -> Callable[[], Tensor] | None:
    """What makes an RMSNorm's output, weight * (input / length), from what the norm keeps, which is all but that."""
    (weight, _), (scaled, _) = product.next_functions
    if weight is not None or product._saved_self is None:
        return None
    if type(scaled).__name__ == "ToCopyBackward0":
        scaled = scaled.next_functions[0][0]
    if type(scaled).__name__ != "MulBackward0" or type(scaled.next_functions[1][0]).__name__ != "RsqrtBackward0":
        return None
    return partial(_normalise, product, scaled, shape)


def _normalise(product: Any, scaled: Any, shape: torch.Size) -> Tensor:
    weight = product._saved_self
    result: Tensor = weight * (scaled._saved_self * scaled._saved_other).to(weight.dtype)
    return result.view(shape)


@torch.no_grad()
def _unpack(packed: _Packed) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()


__all__ = ["recomputed"]
