"""Less memory for a chunk's backward pass, with the same numbers to the last bit.

Most of what learning needs beyond reading is what autograd keeps of the frozen backbone. Three things need not be kept:

* A gated FFN keeps act(gate) beside the gate that it is made of: here it is made again, which takes about a
  five-hundredth of a chunk's time.
* A norm computes in float32, and keeps a float32 copy of hidden states that have half the bits: those are kept instead.
* A memory keeps its input, an RMSNorm's output: it is made again from what the norm keeps.

And where that is asked for (`ReadSettings.recompute_ffn`), at the price of two of an FFN's three products:

* A gated FFN keeps gate and up, products of a frozen matrix with an RMSNorm's output: more than half of all that is
  kept. They are made again from what the norm keeps.

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

_Make = Callable[[], Tensor]
_Packed = Tensor | _Make
_HALF = (torch.bfloat16, torch.float16)


@contextmanager
def recomputed(products: bool = False) -> Iterator[None]:
    """For a graph made inside: what can be made again from less, or from what else is kept, is not kept.

    Args:
        products: also a frozen matrix's products with an RMSNorm's output.
    """
    lean = _Lean(products)
    try:
        with torch.autograd.graph.saved_tensors_hooks(lean.pack, lean.unpack):
            yield
    finally:
        lean.close()


class _Lean:
    """What is kept of one graph."""

    def __init__(self, products: bool = False) -> None:
        self._products = products
        # The last tensor that something smaller is kept of: a norm's square and its product keep the same one.
        self._last: tuple[Callable[[], Tensor | None], _Packed] = (lambda: None, torch.empty(0))
        # While the graph is made: of those of its nodes whose results several others keep.
        self._numbers: dict[Any, int] = {}
        self._made: dict[int, Tensor] = {}  # in the backward pass: results of nodes, by their numbers

    def pack(self, kept: Tensor) -> _Packed:
        """What to keep in place of a tensor: itself, or what makes it again.

        Not the tensor itself even then, but a detached one: an operation that keeps its own output would hold itself,
        and outlive a graph that no backward pass goes through.
        """
        last, packed = self._last
        if last() is kept:
            return packed
        smaller = self._smaller(kept)
        if smaller is None:
            return kept.detach()
        self._last = (weakref.ref(kept), smaller)
        return smaller

    def close(self) -> None:
        """The graph is made: what holds this is held no more here, where only the garbage collector would see it."""
        self._numbers.clear()
        self._last = (lambda: None, torch.empty(0))

    @torch.no_grad()
    def unpack(self, packed: _Packed) -> Tensor:
        """The tensor that was to be kept."""
        return packed if isinstance(packed, Tensor) else packed()

    def _smaller(self, kept: Tensor) -> _Packed | None:
        """What makes a tensor again from less, by the operation that it comes from; None: nothing does."""
        made_by: Any = kept.grad_fn
        match type(made_by).__name__:
            case "SiluBackward0":
                return partial(self._activate, F.silu, self._gate(made_by))
            case "GeluBackward0":
                act = partial(F.gelu, approximate=made_by._saved_approximate)
                return partial(self._activate, act, self._gate(made_by))
            case "ToCopyBackward0":
                before, output = made_by.next_functions[0]
                dtype = before._input_metadata[output].dtype
                if dtype in _HALF and kept.dtype == torch.float32:
                    return partial(kept.detach().to(dtype).to, kept.dtype)
            case "MulBackward0":
                return self._normed(made_by, kept.shape)
            case "ViewBackward0":  # as a product of matrices sees it
                before = made_by.next_functions[0][0]
                return self._normed(before, kept.shape) if type(before).__name__ == "MulBackward0" else None
            case "UnsafeViewBackward0":
                return self._product(made_by)
        return None

    # ---------------------------------------------------------------- activations

    def _gate(self, act: Any) -> _Packed:
        """What an activation was made of."""
        gate = self._product(act.next_functions[0][0])
        return act._saved_self.detach() if gate is None else partial(gate, again=True)

    def _activate(self, act: Callable[[Tensor], Tensor], gate: _Packed) -> Tensor:
        return act(self.unpack(gate))

    # ---------------------------------------------------------------- norms

    def _normed(self, product: Any, shape: torch.Size) -> _Make | None:
        """What makes an RMSNorm's output, weight * (input / length), from what the norm keeps, which is all but
        that."""
        (weight, _), (scaled, _) = product.next_functions
        if weight is not None or product._saved_self is None:
            return None
        if type(scaled).__name__ == "ToCopyBackward0":
            scaled = scaled.next_functions[0][0]
        if type(scaled).__name__ != "MulBackward0" or type(scaled.next_functions[1][0]).__name__ != "RsqrtBackward0":
            return None
        return partial(self._normalise, product, scaled, shape, self._number(product) if self._products else None)

    def _normalise(self, product: Any, scaled: Any, shape: torch.Size, number: int | None) -> Tensor:
        if number in self._made:
            return self._made[number].view(shape)
        weight = product._saved_self
        result: Tensor = weight * (scaled._saved_self * scaled._saved_other).to(weight.dtype)
        if number is not None:
            self._made = {number: result}  # the layer above is done with
        return result.view(shape)

    # ---------------------------------------------------------------- products

    def _product(self, view: Any) -> Any:
        """What makes a frozen matrix's product with an RMSNorm's output, [batch, seq, n], from what the norm keeps."""
        if not self._products or type(view).__name__ != "UnsafeViewBackward0":
            return None
        matmul = view.next_functions[0][0]
        if type(matmul).__name__ != "MmBackward0" or matmul.next_functions[1][0] is not None:
            return None
        flat = matmul.next_functions[0][0]
        before = flat.next_functions[0][0] if type(flat).__name__ == "ViewBackward0" else flat
        if type(before).__name__ != "MulBackward0":
            return None
        normed = self._normed(before, flat._input_metadata[0].shape)
        shape = view._input_metadata[0].shape
        return None if normed is None else partial(self._multiply, normed, matmul, shape, self._number(matmul))

    def _multiply(self, normed: _Make, matmul: Any, shape: torch.Size, number: int, again: bool = False) -> Tensor:
        """again: it will be asked for once more."""
        result = self._made.pop(number, None)
        if result is None:
            result = torch.mm(normed(), matmul._saved_mat2).view(shape)
        if again:
            self._made[number] = result
        return result

    def _number(self, node: Any) -> int:
        return self._numbers.setdefault(node, len(self._numbers))


__all__ = ["recomputed"]
