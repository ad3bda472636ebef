"""Triton kernels for CUDA: a memory's part in a generated token, and the gradient of attention's values.

A generated token's memory is a few thousand products a layer, for which torch launches five kernels that each take
longer to start than to run: `read_token` is two. torch has no backward pass of attention for the values alone; its own
makes the other gradients as well, in five products where `values_gradient` takes two.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3}  # by the names in `locas.bank`
HEAD_WIDTHS = (16, 32, 64, 128)

# Slots and columns of one program of `_slots_kernel`, which takes so many columns at once, and of `_onto_kernel`, which
# takes so many slots at once: all of 1,024 would not fit its registers.
_SLOTS_TILE = {"SLOTS": 2, "WIDTH": 1024}
_ONTO_TILE = {"SLOTS": 64, "COLUMNS": 64}
_ROOM = 160_000  # bytes of shared memory for three steps of `_values_kernel` at once; desktop cards have 100,000


@triton.jit
def _slots_kernel(  # type: ignore[no-untyped-def]
    a, keys, slots, d_model, rank, a_row, keys_row,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * SLOTS
    which, columns = first + tl.arange(0, SLOTS), tl.arange(0, WIDTH)
    there = which < rank
    keys += row * keys_row
    gate = tl.zeros((SLOTS,), tl.float32)
    up = tl.zeros((SLOTS,), tl.float32)
    for start in range(0, d_model, WIDTH):
        inside = start + columns < d_model
        x = tl.load(a + row * a_row + start + columns, mask=inside, other=0.0).to(tl.float32)
        at = which[:, None] * d_model + start + columns[None, :]
        mask = there[:, None] & inside[None, :]
        gate += tl.sum(tl.load(keys + at, mask=mask, other=0.0).to(tl.float32) * x[None, :], axis=1)
        if GATED:
            second = tl.load(keys + rank * d_model + at, mask=mask, other=0.0).to(tl.float32)
            up += tl.sum(second * x[None, :], axis=1)
    if ACTIVATION == 0:
        made = gate * tl.sigmoid(gate)
    elif ACTIVATION == 1:
        made = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == 2:
        # tanh(x) = 2 sigmoid(2 x) - 1
        made = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        made = tl.where(gate < 0.0, 0.0, gate)
    if GATED:
        made *= up
    tl.store(slots + row * rank + which, made, mask=there)


@triton.jit
def _onto_kernel(  # type: ignore[no-untyped-def]
    onto, slots, values, out, d_model, rank, onto_row, values_row,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    some, inside = tl.arange(0, SLOTS), columns < d_model
    values += row * values_row
    total = tl.load(onto + row * onto_row + columns, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, rank, SLOTS):
        which = start + some
        there = which < rank
        weights = tl.load(slots + row * rank + which, mask=there, other=0.0)
        at = which[:, None] * d_model + columns[None, :]
        rows = tl.load(values + at, mask=there[:, None] & inside[None, :], other=0.0)
        total += tl.sum(rows.to(tl.float32) * weights[:, None], axis=0)
    tl.store(out + row * d_model + columns, total, mask=inside)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device; its interpreter (TRITON_INTERPRET=1) has tensors on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def read_token(a: Tensor, keys: Tensor, values: Tensor, onto: Tensor, activation: str) -> Tensor:
    """onto + values^T act(gate) * up, or values^T act(keys a), for one token of each row.

    Args:
        a: [batch, 1, d_model], the FFN's input, on CUDA.
        keys: [2 * rank, d_model] gates and keys, or [rank, d_model] keys; for each row of its own with an axis before.
        values: [rank, d_model], with the output scale in them; likewise.
        onto: [batch, 1, d_model], the FFN's output.
        activation: a name in `ACTIVATIONS`.

    Returns:
        [batch, 1, d_model] in `onto`'s dtype; sums are made in float32.
    """
    batch, _, d_model = a.shape
    rank, gated = values.shape[-2], keys.shape[-2] > values.shape[-2]
    a, onto, keys, values = a.contiguous(), onto.contiguous(), keys.contiguous(), values.contiguous()
    slots, out = a.new_empty(batch, rank, dtype=torch.float32), onto.new_empty(batch, 1, d_model)
    each = 0 if keys.ndim == 2 else keys.stride(0), 0 if values.ndim == 2 else values.stride(0)
    with _on(a.device):
        _slots_kernel[(batch, triton.cdiv(rank, _SLOTS_TILE["SLOTS"]))](
            a, keys, slots, d_model, rank, d_model, each[0],
            GATED=gated, ACTIVATION=ACTIVATIONS[activation], SLOTS=_SLOTS_TILE["SLOTS"],
            WIDTH=min(_SLOTS_TILE["WIDTH"], triton.next_power_of_2(d_model)),
        )  # fmt: skip
        _onto_kernel[(batch, triton.cdiv(d_model, _ONTO_TILE["COLUMNS"]))](
            onto, slots, values, out, d_model, rank, d_model, each[1],
            SLOTS=min(_ONTO_TILE["SLOTS"], triton.next_power_of_2(rank)), COLUMNS=_ONTO_TILE["COLUMNS"],
        )  # fmt: skip
    return out


@triton.jit
def _values_kernel(  # type: ignore[no-untyped-def]
    query, key, log_sum, grad, out, heads, chunk, copies, scale,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    grad_batch, grad_head, grad_row, out_batch, out_head, out_row,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    first, both = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    batch, head = both // heads, both % heads
    mine, some, width = first + tl.arange(0, KEYS), tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    key += batch * key_batch + (head // copies) * key_head
    k = tl.load(key + mine[:, None] * key_row + width[None, :], mask=mine[:, None] < chunk, other=0.0)
    query += batch * query_batch + head * query_head
    grad += batch * grad_batch + head * grad_head
    log_sum += both * chunk
    made = tl.zeros((KEYS, WIDTH), tl.float32)
    for start in range(first, chunk, QUERIES):  # no query before the first key sees it
        rows = start + some
        there = rows < chunk
        q = tl.load(query + rows[None, :] * query_row + width[:, None], mask=there[None, :], other=0.0)
        g = tl.load(grad + rows[:, None] * grad_row + width[None, :], mask=there[:, None], other=0.0)
        total = tl.load(log_sum + rows, mask=there, other=0.0)
        weights = tl.exp(tl.dot(k, q) * scale - total[None, :])
        weights = tl.where((mine[:, None] <= rows[None, :]) & there[None, :], weights, 0.0)
        made += tl.dot(weights.to(g.dtype), g)
    at = out + batch * out_batch + head * out_head + mine[:, None] * out_row + width[None, :]
    tl.store(at, made, mask=mine[:, None] < chunk)


def _values_tile(width: int) -> dict[str, int]:
    return {"WIDTH": width, "KEYS": 64 if width > 64 else 128, "QUERIES": 64}


def _stages(device: torch.device) -> int:
    room = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return 3 if getattr(room, "shared_memory_per_block_optin", 0) >= _ROOM else 2


def values_gradient(grad: Tensor, query: Tensor, key: Tensor, log_sum: Tensor, scale: float, out: Tensor) -> None:
    """The gradient of a chunk's own values, its queries seeing them causally: weights^T grad.

    Args:
        grad: [batch, heads, chunk, d_head] of attention's output, bfloat16 or float16, d_head in `HEAD_WIDTHS`.
        query: likewise.
        key: [batch, heads / copies, chunk, d_head], each for so many heads in a row.
        log_sum: [batch, heads, chunk] float32, the logarithm of the sum of a query's exponentials.
        scale: of the products.
        out: [batch, heads, chunk, d_head], where to write it.
    """
    batch, heads, chunk, width = query.shape
    query, key, grad = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, grad))
    tile = _values_tile(width)
    with _on(query.device):
        _values_kernel[(triton.cdiv(chunk, tile["KEYS"]), batch * heads)](
            query, key, log_sum.contiguous(), grad, out, heads, chunk, heads // key.shape[1], scale,
            *query.stride()[:3], *key.stride()[:3], *grad.stride()[:3], *out.stride()[:3],
            **tile, num_warps=4, num_stages=_stages(query.device),
        )  # fmt: skip


__all__ = ["ACTIVATIONS", "HEAD_WIDTHS", "read_token", "values_gradient"]
