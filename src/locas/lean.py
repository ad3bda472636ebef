"""Less memory for a chunk's backward pass, with the same numbers to the last bit.

Most of what learning needs beyond reading is what autograd keeps of the frozen backbone. Two parts of it need not be:

* torch turns a boolean attention mask into numbers in every layer, and keeps each: here that is done once (`one_mask`).
* a gated FFN keeps act(gate) beside the gate that it is made of: here it is made again (`recomputed`), which takes
  about a five-hundredth of a chunk's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locas.sites import decoder_of

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


@contextmanager
def one_mask(model: nn.Module) -> Iterator[None]:
    """Calls of the model inside: a boolean attention mask becomes 0 and -inf once, not once a layer, just as torch's
    own attention would do it. Backbones with an attention of another kind, or of no family that locas knows, are called
    as they are."""
    made: list[tuple[Tensor, Tensor]] = []  # a backbone may have several masks, for long and for short attention

    def replace(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        mask, hidden = kwargs.get("attention_mask"), args[0] if args else kwargs.get("hidden_states")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not isinstance(hidden, Tensor):
            return None
        if any(p.is_floating_point() and p.dtype != hidden.dtype for p in layer.parameters()):
            return None  # the queries' dtype, which counts, is anybody's guess
        numbers = next((numbers for known, numbers in made if known is mask), None)
        if numbers is None:
            numbers = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(mask.logical_not(), -torch.inf)
            made.append((mask, numbers))
        return args, kwargs | {"attention_mask": numbers}

    plain = getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa"
    layers: Iterable[nn.Module] = ()
    with suppress(ValueError):  # without a memory, a model of any family can be read
        layers = decoder_of(model) if plain else ()
    handles = [layer.register_forward_pre_hook(replace, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["one_mask", "recomputed"]
