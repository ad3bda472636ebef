"""Attention of a chunk behind a context that takes no gradients.

                  context keys      chunk keys
    chunk         all seen,         causal
    queries       no gradients

torch takes such a mask as numbers: what it hides is multiplied all the same, forwards and backwards, and the context's
keys and values get gradients that nobody asks for. `chunk_attention` does neither: for a context as long as the chunk,
3 products of full size in place of 4 forwards, and 5.5 in place of 10 backwards; 1 where the attention weights count as
constants (`AttentionGradient`), because the context then has no part in the backward pass at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from locas.cuda import has_flash, kernels

# What of attention a gradient goes through: all of it; its values only, the weights with which they are averaged being
# constants; nothing: what attention adds to the hidden states is a constant.
AttentionGradient = Literal["full", "values", "stop"]

_DTYPES = (torch.float32, torch.float64)
_DTYPES_OF_VALUES = (*_DTYPES, torch.bfloat16)
_HALF = (torch.bfloat16, torch.float16)
_LEAST = 64 * 512  # queries times context keys; for fewer, torch's own attention is as fast
_FURTHER = 8  # coordinates in a backward pass in half precision: 3 are used, and kernels like round numbers
_ROWS = 128  # queries whose weights the backward pass holds at once
_WORKSPACE = 1 << 20  # numbers that it holds at once, about: so many stay in a processor's cache


class ChunkAttention(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` looks at a mask of booleans once, not once a layer.

    Where the mask is a chunk's, causal behind a context that all of it sees, on a CPU in float32 or float64 (bfloat16
    too where queries and keys need no gradients), on CUDA in bfloat16 or float16, attention is `chunk_attention`. Any
    other mask becomes 0 and -inf once: torch's own attention would do the same in every layer, and autograd keep each.

    Args:
        gradient: see `AttentionGradient`. Outputs are the same.
        known: what was seen of masks and keys on CUDA in earlier calls of the same model with no mask of the caller's:
            there looking waits for the device, and what is seen depends on the shapes only. It is added to.

    Attributes:
        calls: how often attention was computed.
    """

    def __init__(self, gradient: AttentionGradient = "full", known: dict[Any, int | None] | None = None) -> None:
        super().__init__()
        self.gradient, self.calls = gradient, 0
        self._known = {} if known is None else known
        self._seen: list[_Mask] = []  # a backbone may have several, for long and for short attention

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function = self._attend if func is F.scaled_dot_product_attention else func
        return function(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self.calls += 1
        if self.gradient != "full":
            query, key = query.detach(), key.detach()
        if self.gradient == "stop":
            value = value.detach()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            mask = self._look_at(attn_mask)
            plain = dropout_p == 0 and not is_causal and not enable_gqa
            if plain and mask.context is not None and _fits(query, key, value, attn_mask.shape[2:]):
                return chunk_attention(query, key, value, mask.context, scale, self._copies(key, value))
            attn_mask = mask.numbers(query.dtype)
        elif attn_mask is None and is_causal and dropout_p == 0 and self.gradient == "values" and value.requires_grad:
            # A text's first chunk: torch's own attention would keep all that its queries and keys need.
            each = [t.repeat_interleave(query.shape[1] // t.shape[1], 1) if enable_gqa else t for t in (key, value)]
            if _fits(query, each[0], each[1], (query.shape[2], query.shape[2])):
                return chunk_attention(query, each[0], each[1], 0, scale, self._copies(*each))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def _look_at(self, mask: Tensor) -> _Mask:
        for seen in self._seen:
            if seen.is_of(mask):
                return seen
        which = ("mask", len(self._seen), mask.shape)
        self._seen.append(_Mask(mask, self._look(which, mask, lambda: _context(mask))))
        return self._seen[-1]

    def _copies(self, key: Tensor, value: Tensor) -> int:
        if not value.requires_grad:
            return 1
        return self._look(("copies", self.calls, key.shape[1]), key, lambda: _copies(key)) or 1

    def _look(self, which: tuple[Any, ...], at: Tensor, look: Callable[[], int | None]) -> int | None:
        if not at.is_cuda:
            return look()
        if which not in self._known:
            self._known[which] = look()
        return self._known[which]


class _Mask:
    """A mask of booleans and what is known of it.

    Attributes:
        context: how many keys every query sees, where all that follow are causal; None: no such mask, or too small a
            one.
    """

    def __init__(self, mask: Tensor, context: int | None) -> None:
        self._mask, self.context = mask, context
        self._numbers: dict[torch.dtype, Tensor] = {}

    def is_of(self, mask: Tensor) -> bool:
        """Whether this is what is known of `mask`, or of another tensor that shows the same numbers."""
        own = self._mask
        return (mask.data_ptr(), mask.shape, mask.stride()) == (own.data_ptr(), own.shape, own.stride())

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """0 where the mask is true, else -inf."""
        if dtype not in self._numbers:
            zeros = torch.zeros_like(self._mask, dtype=dtype)
            self._numbers[dtype] = zeros.masked_fill_(self._mask.logical_not(), -torch.inf)
        return self._numbers[dtype]


def _context(mask: Tensor) -> int | None:
    """See `_Mask.context`."""
    if mask.dim() != 4:
        return None
    queries, keys = mask.shape[2:]
    if not 0 < queries < keys or queries * (keys - queries) < _LEAST:
        return None
    causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril_(keys - queries)
    return keys - queries if torch.equal(mask, causal.expand_as(mask)) else None


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Sequence[int]) -> bool:
    """Whether `chunk_attention` can take them, beside a mask of so many queries and keys."""
    if query.is_cuda:
        flash = has_flash(query.device) and torch.backends.cuda.flash_sdp_enabled()
        takes: tuple[torch.dtype, ...] = _HALF if flash and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 else ()
    elif query.device.type == "cpu":
        takes = _DTYPES if query.requires_grad or key.requires_grad else _DTYPES_OF_VALUES
    else:
        takes = ()
    return (
        query.dtype in takes
        and query.dim() == 4
        and all(t.device == query.device and t.dtype == query.dtype for t in (key, value))
        and key.shape == value.shape == (*query.shape[:2], mask[1], query.shape[3])
        and query.shape[2] == mask[0]
    )


def chunk_attention(
    query: Tensor, key: Tensor, value: Tensor, context: int, scale: float | None = None, copies: int | None = None
) -> Tensor:
    """Attention whose first keys are seen by every query, and the others causally.

    Args:
        query: [batch, heads, chunk, d_head]. On a CPU float32 or float64; also bfloat16 where neither it nor the key
            needs a gradient. Then only the chunk's part of the values has a part in the backward pass. On CUDA bfloat16
            or float16, d_head a multiple of 8 up to 256.
        key: [batch, heads, context + chunk, d_head]. The context's part gets no gradients (zeros).
        value: likewise.
        context: how many keys come before the chunk's; 1 or more, or 0 where neither query nor key needs a gradient.
        scale: of the products; None: 1 / sqrt(d_head).
        copies: so many heads in a row have one key, as grouped queries do; None: found out by looking.

    Returns:
        [batch, heads, chunk, d_head].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor
    if not (query.requires_grad or key.requires_grad):
        copies = _copies(key) if copies is None and torch.is_grad_enabled() and value.requires_grad else copies
        out = _ChunkAverage.apply(query, key, value, context, scale, copies or 1)
    elif query.is_cuda:
        out = _flash(query, key, value, scale)[0]  # the context gets gradients, too
    else:
        out = _ChunkAttention.apply(query, key, value, context, scale)
    return out


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Any:
    """torch's kernel on CUDA; to it, causal means that the last query sees all keys."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)


def _forward(query: Tensor, key: Tensor, value: Tensor, context: int, scale: float) -> tuple[Tensor, Tensor]:
    """The output, and [batch, heads, chunk] float32 or float64 the logarithm of the sum of a query's exponentials."""
    parts = ((slice(context), False), (slice(context, None), True))
    *others, within = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key[:, :, part], value[:, :, part], 0.0, causal, scale=scale
        )
        for part, causal in (parts if context else parts[1:])
    )
    if not others:
        return within
    (before,) = others
    log_sum = torch.logaddexp(before[1], within[1])
    share = (within[1] - log_sum).exp_().unsqueeze(-1)  # of the chunk's keys in a query's weights
    return torch.lerp(before[0].to(share.dtype), within[0].to(share.dtype), share).to(query.dtype), log_sum


class _ChunkAverage(torch.autograd.Function):
    """Values averaged with weights that count as constants."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, context: int, scale: float, copies: int) -> Tensor:
        if query.is_cuda:
            out, log_sum, *others = _flash(query, key, value, scale)
            ctx.random = others[4:6]  # there is no dropout
        else:
            out, log_sum = _forward(query, key, value, context, scale)
        # A copy of the chunk's own: a view would hold the context's as well.
        ctx.save_for_backward(query, key[:, ::copies, context:].contiguous(), log_sum)
        ctx.scale, ctx.shape, ctx.copies = scale, value.shape, copies
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None, None, None]:
        query, key, log_sum = ctx.saved_tensors
        grad_value = grad.new_zeros(ctx.shape)
        own = grad_value[:, :, -query.shape[2] :]
        if not query.is_cuda:
            backward = _average_backward_half if query.dtype in _HALF else _average_backward
            backward(grad, query, key, log_sum, ctx.scale, own)
        elif (fused := kernels()) is not None and query.shape[-1] in fused.HEAD_WIDTHS:
            fused.values_gradient(grad, query, key, log_sum, ctx.scale, own)
        else:
            own.copy_(_flash_backward(grad, query, key.repeat_interleave(ctx.copies, 1), log_sum, ctx))
        return None, None, grad_value, None, None, None


def _average_backward(
    grad: Tensor, query: Tensor, key: Tensor, log_sum: Tensor, scale: float, grad_value: Tensor
) -> None:
    """Adds the gradient of a chunk's own values to `grad_value`, which holds zeros. In full precision."""
    chunk = query.shape[2]
    for first in range(0, chunk, _ROWS):
        last = min(first + _ROWS, chunk)
        some = query[:, :, first:last] * scale
        # Queries that share a key stand one after another.
        some = some.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        weights = (some @ key[:, :, :last].mT).view(*query.shape[:2], last - first, last)
        weights = weights.sub_(log_sum[:, :, first:last, None]).exp_()
        weights[..., first:].tril_()
        grad_value[:, :, :last] += weights.mT @ grad[:, :, first:last]


def _average_backward_half(
    grad: Tensor, query: Tensor, key: Tensor, log_sum: Tensor, scale: float, grad_value: Tensor
) -> None:
    """The same with torch's own attention, whose sums are float32 and whose products are half precision's.

    A value's gradient is sum_i exp(scale q_i k_j - log_sum_i) grad_i over the queries i from its own place j on. Short
    of a division by the sum of these exponentials, that is attention of the keys to the queries, and causal if both are
    turned round. The logarithms come in with the products: as further coordinates of the queries, in three parts, as
    their dtype has few digits, beside ones of the keys.
    """
    batch, heads, chunk, width = query.shape
    queries, keys, grads = turned = query.new_empty(3, batch, heads, chunk, width + _FURTHER)
    turned[..., width:] = 0.0
    for own, other in ((queries, query), (keys.unflatten(1, (key.shape[1], -1)), key.unsqueeze(2)), (grads, grad)):
        own[..., :width] = other.flip(-2)
    keys[..., width : width + 3] = 1.0
    left = log_sum.flip(2) / -scale
    for part in queries[..., width : width + 3].unbind(-1):
        part.copy_(left)
        left -= part
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(keys, queries, grads, 0.0, True, scale=scale)
    torch.mul(out[..., :width].flip(2), sums.flip(2).exp_().to(out.dtype).unsqueeze(-1), out=grad_value)


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, log_sum: Tensor, ctx: Any) -> Tensor:
    """The gradient of a chunk's own values, with torch's kernel. It makes those of queries and keys as well, of what
    stands in for output and values here; nobody looks at them."""
    chunk = query.shape[2]
    made: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, key, query, log_sum, None, None, chunk, chunk, 0.0, True, *ctx.random, scale=ctx.scale
    )
    return made[2]


def _copies(heads: Tensor) -> int:
    """How many heads of [batch, heads, seq, d_head] in a row are the same: keys that are copied for grouped queries."""
    for copies in range(heads.shape[1], 1, -1):
        if heads.shape[1] % copies == 0 and all(_repeats(some, copies) for some in (heads[:, :, -1:], heads)):
            return copies
    return 1


def _repeats(heads: Tensor, copies: int) -> bool:
    first, *others = heads.unflatten(1, (-1, copies)).unbind(2)
    return all(torch.equal(first, other) for other in others)


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, context: int, scale: float) -> Tensor:
        out, log_sum = _forward(query, key, value, context, scale)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.context, ctx.scale = context, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, log_sum = ctx.saved_tensors
        shift = (grad * out).sum(-1)
        flat = [t.flatten(0, 1).contiguous() for t in (query * ctx.scale, key, value, grad)]
        grads = (torch.empty_like(flat[0]), torch.zeros_like(flat[1]), torch.zeros_like(flat[2]))
        heads = max(torch.get_num_threads(), _WORKSPACE // (_ROWS * key.shape[2]))
        parts = (*flat, *(t.flatten(0, 1).unsqueeze(-1) for t in (log_sum, shift)), *grads)
        for some in zip(*(t.split(heads) for t in parts), strict=True):
            _backward(*some, context=ctx.context)
        return grads[0].mul_(ctx.scale).view_as(query), grads[1].view_as(key), grads[2].view_as(value), None, None


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    log_sum: Tensor,
    shift: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    context: int,
) -> None:
    """The backward pass of some heads, some queries at a time; the scale is in the queries, and missing in theirs.

    Args:
        query: [heads, chunk, d_head].
        key: [heads, context + chunk, d_head].
        value: likewise.
        grad: [heads, chunk, d_head] of the output.
        log_sum: [heads, chunk, 1] logarithm of the sum of a query's exponentials.
        shift: [heads, chunk, 1] the output's product with its gradient.
        grad_query: where to write it.
        grad_key: zeros; written behind the context.
        grad_value: likewise.
        context: how many keys every query sees.
    """
    heads, chunk, _ = query.shape
    workspace = query.new_empty(2, heads * min(_ROWS, chunk) * key.shape[1])
    for first in range(0, chunk, _ROWS):
        last = min(first + _ROWS, chunk)
        seen, shape = context + last, (heads, last - first, context + last)
        weights, grad_weights = (part[: heads * (last - first) * seen].view(shape) for part in workspace)
        q, g = query[:, first:last], grad[:, first:last]
        torch.bmm(q, key[:, :seen].mT, out=weights).sub_(log_sum[:, first:last]).exp_()
        weights[:, :, context + first :].tril_()
        torch.bmm(g, value[:, :seen].mT, out=grad_weights).sub_(shift[:, first:last]).mul_(weights)
        grad_query[:, first:last] = torch.bmm(grad_weights, key[:, :seen])
        grad_key[:, context:seen].baddbmm_(grad_weights[:, :, context:].mT, q)
        grad_value[:, context:seen].baddbmm_(weights[:, :, context:].mT, g)


__all__ = ["AttentionGradient", "ChunkAttention", "chunk_attention"]
