"""The memory itself: banks of small feed-forward blocks, in plain torch (arXiv:2602.05085 sec. 3-4).

    bank = Bank("glu", "silu", d_model=256, ranks={0: 64, 1: 64})
    bank.read(0, a)            # tau * V^T (act(G a) * (K a)), a: [batch, seq, d_model]

Every trainable number of a memory is one *row* of length d_model: a key k_j, a gate g_j or a value v_j. So a
whole memory is one matrix and a bank of them is one tensor, `rows: [bank, n_rows, d_model]`, on which norm
clipping, optimisers, saving and composing are each a single operation. Within it each layer (ascending) holds
its gates (GLU only), then its keys, then its values:

| paper | here | shape |
|---|---|---|
| A | `a` | [batch, seq, d_model] |
| G, K, V | `bank.slots(layer)` | [bank, rank, d_model] each |
| tau | `bank.tau[:, i]` | [bank, layer] |

The first `bank.frozen[:, i]` slots of a layer are frozen: they are read like any others, and never written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from locas.cuda import is_captured, kernels

Variant = Literal["glu", "mlp"]


def _gelu_bloom(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


# Written exactly as the backbones write them, constants included, so that merging a memory stays exact.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": _gelu_new,
    "gelu_fast": _gelu_fast,
    "gelu_bloom": _gelu_bloom,
}


@dataclass(frozen=True)
class Slots:
    """Views of one layer's rows. Shapes: [bank, rank, d_model] each; `g` is None for Locas-MLP."""

    k: Tensor
    g: Tensor | None
    v: Tensor


@dataclass(frozen=True)
class _Operands:
    """What a layer's input is multiplied by: keys [.., (parts - 1) * rank, d_model] and values [.., rank, d_model], for
    all rows of a batch or for each; tau, broadcast over slots, None where the values hold it; absent [batch, 1, 1]
    bool, the rows that read no memory, None where there are none."""

    keys: Tensor
    values: Tensor
    tau: Tensor | None
    absent: Tensor | None


class Bank:
    """Several memories of one shape, over some layers of a backbone, in one set of tensors.

    Args:
        variant: "glu" (gated: K, G, V) or "mlp" (K, V).
        activation: a name in `ACTIVATIONS`.
        d_model: width of the backbone's hidden state.
        ranks: number of slots for each layer that has a memory, keyed by layer index.
        size: how many memories.
        dtype: of the rows; float32 unless a test needs more.
        device: where the rows live; a read moves a layer's rows to its input's device where they differ.

    Raises:
        ValueError: unknown variant or activation, no layer, or a size, rank, width or layer out of range.
    """

    def __init__(
        self,
        variant: Variant,
        activation: str,
        d_model: int,
        ranks: Mapping[int, int],
        *,
        size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        _check(variant, activation, d_model, ranks, size)
        self.variant: Variant = variant
        self.activation = activation
        self.d_model = d_model
        self.ranks: dict[int, int] = dict(sorted(ranks.items()))
        self.size = size
        self.parts = 3 if variant == "glu" else 2
        self.rows = torch.zeros(size, self.parts * sum(self.ranks.values()), d_model, dtype=dtype, device=device)
        self._total: Callable[[], Tensor] | None = None
        self.tau = torch.ones(size, len(self.ranks), dtype=dtype, device=device)
        self.frozen = torch.zeros(size, len(self.ranks), dtype=torch.int64)
        self._act = ACTIVATIONS[activation]
        self._bind()

    # ---------------------------------------------------------------- layout

    def _bind(self) -> None:
        """(Re)makes the per-layer views of `rows`: leaves of the autograd graph, one for keys, one for values."""
        self._start: dict[int, int] = {}
        self._leaves: dict[int, tuple[Tensor, Tensor]] = {}
        self._prepared: dict[int, tuple[Any, Tensor | None, _Operands]] = {}
        self._position = {layer: i for i, layer in enumerate(self.ranks)}
        start = 0
        for layer, rank in self.ranks.items():
            self._start[layer] = start
            middle, stop = start + (self.parts - 1) * rank, start + self.parts * rank
            # Matrices where there is one memory: its gradients need no axis put in front of them then.
            rows = self.rows[0] if self.size == 1 else self.rows
            self._leaves[layer] = (rows[..., start:middle, :], rows[..., middle:stop, :])
            start = stop

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a memory, ascending."""
        return tuple(self.ranks)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def n_parameters(self) -> int:
        """Trainable numbers in one memory of the bank: 3 d r a layer (GLU) or 2 d r (MLP)."""
        return self.rows[0].numel()

    def slots(self, layer: int) -> Slots:
        """Views of a layer's K, G, V, each [bank, rank, d_model]."""
        start, rank = self._start[layer], self.ranks[layer]
        part = [self.rows[:, start + i * rank : start + (i + 1) * rank] for i in range(self.parts)]
        return Slots(k=part[-2], g=part[0] if self.variant == "glu" else None, v=part[-1])

    def runs(self) -> Iterator[tuple[slice, int]]:
        """Row ranges of consecutive layers of equal rank, as (rows, rank): each is a stack of [rank, d_model]
        matrices, so that a matrix optimiser handles a usual memory in one batched call."""
        runs: list[list[int]] = []
        for layer, rank in self.ranks.items():
            start, stop = self._start[layer], self._start[layer] + self.parts * rank
            if runs and runs[-1][2] == rank:
                runs[-1][1] = stop
            else:
                runs.append([start, stop, rank])
        for start, stop, rank in runs:
            yield slice(start, stop), rank

    def frozen_rows(self) -> Tensor | None:
        """[bank, n_rows] bool, the rows of frozen slots; None where no slot is frozen."""
        if not self.frozen.any():
            return None
        parts = []
        for i, rank in enumerate(self.ranks.values()):
            slots = torch.arange(rank) < self.frozen[:, i, None]
            parts.append(slots.repeat(1, self.parts))
        return torch.cat(parts, dim=1).to(self.device)

    # ---------------------------------------------------------------- read

    def read(self, layer: int, a: Tensor, index: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """What the memory adds to the FFN's output: tau * V^T(act(G A) * (K A)), or tau * V^T act(K A).

        arXiv:2602.05085 sec. 3. Computed in `a`'s dtype and on its device; tau multiplies the rank-wide
        intermediate, which is smaller than the output.

        Args:
            layer: which layer's slots.
            a: the FFN's input, [batch, seq, d_model].
            index: [batch] integers, row b reads memory index[b], and no memory where it is negative. None:
                everybody reads the only memory of a bank of one, or row b memory b.
            onto: the FFN's output, shaped like `a`, to which the memory's is added in the same product; None: zeros.

        Returns:
            [batch, seq, d_model], a new tensor in `onto`'s dtype, else `a`'s; exactly `onto`, else zero, for rows
            without a memory.

        Raises:
            ValueError: the batch does not fit the index, or the bank where there is none.
        """
        by = self._kept(layer, a, index) if self._may_keep(index) else self._operands(layer, a, index)
        if by.absent is not None:
            # Zeros in all that is multiplied, not only in the product: its gradients would still see NaN and inf.
            a = a.masked_fill(by.absent, 0.0)
        if a.is_cuda and onto is not None and by.tau is None and _is_token_on_cuda(a, onto):
            fused = kernels()
            if fused is not None and self.activation in fused.ACTIVATIONS:
                return fused.read_token(a, by.keys, by.values, onto, self.activation)
        slots = self._gate(_project(a, by.keys))
        return _add(onto, slots if by.tau is None else slots * by.tau, by.values)

    def _operands(self, layer: int, a: Tensor, index: Tensor | None, fold: bool = False) -> _Operands:
        """What `a` [batch, seq, d_model] is multiplied by, in its dtype and on its device, made anew for each read.
        Fold: tau goes into the values, before they are rounded to `a`'s dtype."""
        keys, values = self._leaves[layer]
        tau = self.tau[:, self._position[layer], None, None]
        tau = tau[0] if keys.ndim == 2 else tau
        parts = [t.to(a.device, a.dtype) for t in ([keys, values * tau] if fold else [keys, values, tau])]
        absent = None
        if index is not None:
            index = spread(index.to(a.device), a.shape[0])
            chosen, absent = index.clamp(min=0), (index < 0)[:, None, None]
            parts = [(t[None] if keys.ndim == 2 else t)[chosen].masked_fill(absent, 0.0) for t in parts]
        elif self.size not in (1, a.shape[0]):
            raise ValueError(
                f"a batch of {a.shape[0]} rows cannot read a bank of {self.size} memories one to one; "
                "pass an index that says which memory each row reads (-1: none)"
            )
        return _Operands(parts[0], parts[1], None if fold else parts[2], absent)

    def _kept(self, layer: int, a: Tensor, index: Tensor | None) -> _Operands:
        """The operands, made once (each row's memory gathered and cast, tau folded in) and kept until the rows, tau or
        the index change, or another batch, dtype or device comes."""
        alone = index is None and self.size == 1
        written = -1 if index is None else index._version
        state = (self.rows._version, self.tau._version, written, a.dtype, a.device, None if alone else a.shape[0])
        kept = self._prepared.get(layer)
        if kept is None or kept[1] is not index or kept[0] != state:
            if is_captured():  # what is made there belongs to the graph
                return self._operands(layer, a, index, fold=True)
            made = _shared(self._operands(layer, a, index, fold=True), index)
            kept = self._prepared[layer] = (state, index, made)
        return kept[2]

    def forget(self) -> None:
        """Drops what is kept of the rows for reading, after a change that left no trace (a CUDA graph's)."""
        self._prepared.clear()

    def _may_keep(self, index: Tensor | None) -> bool:
        """Whether operands can be kept: there are no gradients, and a change would be noticed."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return not (self.rows.is_inference() or (index is not None and index.is_inference()))

    def _gate(self, both: Tensor) -> Tensor:
        if self.variant == "mlp":
            return self._act(both)
        gate, up = both.chunk(2, dim=-1)
        return self._act(gate) * up

    # ---------------------------------------------------------------- learn

    def requires_grad_(self, on: bool = True) -> Bank:
        """Turns gradients on: after a backward pass they are in `grad`, shaped like `rows`."""
        self._bind()
        self._total = None
        if not on:
            return self
        # Made when first needed: not before a forward pass is over, which is when memory is scarce.
        self._total = total = functools.cache(functools.partial(torch.zeros_like, self.rows))
        for layer, leaves in self._leaves.items():
            start = self._start[layer]
            for leaf in leaves:
                stop = start + leaf.shape[-2]
                leaf.requires_grad_(True)
                leaf.register_post_accumulate_grad_hook(_move_grad_to(total, slice(start, stop)))
                start = stop
        return self

    @property
    def grad(self) -> Tensor | None:
        """[bank, n_rows, d_model] the sum of all gradients since they were turned on; None where they are off."""
        return None if self._total is None else self._total()

    def leaves(self) -> list[Tensor]:
        """The tensors to differentiate, views of `rows`; a backward pass adds their gradients up in `grad`."""
        return [leaf for pair in self._leaves.values() for leaf in pair]

    @torch.no_grad()
    def clip_rows(self, maximum: float = 1.0) -> None:
        """w / max(||w||_2, 1) for every row w of K, G and V; short rows stay (arXiv:2602.05085 sec. 4)."""
        self.rows.div_(self.rows.norm(dim=-1, keepdim=True).div_(maximum).clamp_(min=1.0))

    # ---------------------------------------------------------------- copies

    def like(self, rows: Tensor, tau: Tensor, frozen: Tensor | None = None) -> Bank:
        """A bank of the same layout holding copies of `rows` [n, n_rows, d_model], `tau` and `frozen` [n, layer]
        (None: no slot is frozen)."""
        twin = Bank(
            self.variant,
            self.activation,
            self.d_model,
            self.ranks,
            size=rows.shape[0],
            dtype=rows.dtype,
            device=rows.device,
        )
        twin.rows.copy_(rows)
        twin.tau.copy_(tau)
        if frozen is not None:
            twin.frozen.copy_(frozen)
        return twin

    def clone(self) -> Bank:
        return self.like(self.rows, self.tau, self.frozen)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Bank:
        """A copy on another device or in another dtype."""
        return self.like(self.rows.to(device, dtype), self.tau.to(device, dtype), self.frozen)

    def scaled(self, strength: float) -> Bank:
        """A copy whose reads are `strength` times these."""
        bank = self.clone()
        bank.tau.mul_(strength)
        return bank

    def select(self, i: int) -> Bank:
        """A copy of memory `i`, as a bank of one."""
        if not 0 <= i < self.size:
            raise ValueError(f"memory {i} asked for, but the bank holds 0..{self.size - 1}")
        return self.like(self.rows[i : i + 1], self.tau[i : i + 1], self.frozen[i : i + 1])

    @staticmethod
    def stack(banks: list[Bank]) -> Bank:
        """One bank that holds all memories of several banks of one layout, in order."""
        first = banks[0]
        for other in banks[1:]:
            if other.layout() != first.layout():
                raise ValueError(
                    f"only memories of one layout fit into one bank: {other.layout()} is not {first.layout()}"
                )
        rows, tau, frozen = (torch.cat([getattr(b, name) for b in banks]) for name in ("rows", "tau", "frozen"))
        return first.like(rows, tau, frozen)

    def layout(self) -> tuple[str, str, int, tuple[tuple[int, int], ...]]:
        """What two memories must share to be stacked: variant, activation, width, (layer, rank) pairs."""
        return self.variant, self.activation, self.d_model, tuple(self.ranks.items())

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        return (
            f"Bank({self.variant}, {self.activation}, d_model={self.d_model}, rank={rank}, "
            f"layers={list(self.ranks)}, size={self.size})"
        )


def _shared(by: _Operands, index: Tensor | None) -> _Operands:
    """The same, without gradients; rows that all read one memory, or none, share it: fetched once, not once a row."""
    keys, values, absent = by.keys.detach(), by.values.detach(), by.absent
    if index is None or absent is None:
        if values.ndim == 2 and not values.is_cuda:
            values = values.mT.contiguous().mT  # as a linear layer's weight lies, which is what CPUs are fast at
        return _Operands(keys, values, None, None)
    present = (~absent).flatten().nonzero().flatten()
    if present.numel() == absent.shape[0]:
        absent = None
    if index[index >= 0].unique().numel() == 1:
        one_keys, one_values = keys[present[0]].clone(), values[present[0]].clone()
        # Rows without memory then meet its values, with slots of 0: exactly nothing if those are numbers.
        if absent is None or (one_keys.isfinite().all() and one_values.isfinite().all()):
            keys, values = one_keys, one_values
    return _Operands(keys, values, None, absent)


def _is_token_on_cuda(a: Tensor, onto: Tensor) -> bool:
    """Whether one token of each row is read, where launching kernels takes longer than their work."""
    return (
        a.ndim == 3
        and a.shape[1] == 1
        and onto.device == a.device
        and onto.dtype == a.dtype
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
    )


def _project(a: Tensor, keys: Tensor) -> Tensor:
    """a @ keys^T. a: [batch, seq, d_model]; keys: [n, d_model], or for each row [batch, n, d_model]."""
    if keys.ndim == 2:
        return F.linear(a, keys)
    if a.shape[-2] == 1 and a.device.type == "cpu" and a.dtype == torch.float32:
        return (keys @ a.mT).mT  # a generated token: a matrix times a vector there, half the time of the reverse
    return a @ keys.mT


def _add(onto: Tensor | None, slots: Tensor, values: Tensor) -> Tensor:
    """onto + slots @ values, as one operation where dtypes and devices allow it. Not under autocast: that would round
    `onto` as well. slots: [batch, seq, rank]; values: [rank, d_model], or for each row [batch, rank, d_model]."""
    if onto is None:
        return slots @ values
    if onto.dtype != slots.dtype or onto.device != slots.device or torch.is_autocast_enabled(slots.device.type):
        return onto + (slots @ values).to(onto.device, onto.dtype)
    if values.ndim == 2 and onto.ndim == 3 and onto.shape[:2] == (1, 1):
        return onto + F.linear(slots, values.mT)  # a generated token: spares as many views as the product takes time
    if values.ndim == 3:
        return torch.baddbmm(onto, slots, values)
    return torch.addmm(onto.flatten(0, -2), slots.flatten(0, -2), values).view(onto.shape)


def _move_grad_to(total: Callable[[], Tensor], rows: slice) -> Callable[[Tensor], None]:
    """Hook that adds a leaf's fresh gradient to these rows of `total`. Were they the leaf's own `.grad`, autograd would
    warn: it wants a contiguous one, which a part of a bank of several memories is not."""

    def move(leaf: Tensor) -> None:
        assert leaf.grad is not None
        total()[:, rows].add_(leaf.grad)
        leaf.grad = None

    return move


def spread(index: Tensor, batch: int) -> Tensor:
    """Repeats an index [rows] to `batch` entries as beam search repeats rows (each one n times in a row).

    Raises:
        ValueError: `batch` is no multiple of the index's length.
    """
    if index.ndim != 1 or index.shape[0] == 0 or batch % index.shape[0]:
        raise ValueError(
            f"the index names a memory for {tuple(index.shape)} rows, but the batch has {batch}; "
            "give one entry for each row of the batch"
        )
    return index if index.shape[0] == batch else index.repeat_interleave(batch // index.shape[0])


def _check(variant: str, activation: str, d_model: int, ranks: Mapping[int, int], size: int) -> None:
    if variant not in get_args(Variant):
        raise ValueError(f"variant {variant!r} is not one of {', '.join(get_args(Variant))}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if not ranks:
        raise ValueError("a memory needs at least one layer")
    bad = {layer: rank for layer, rank in ranks.items() if layer < 0 or rank < 1}
    if bad:
        raise ValueError(f"layers must be 0 or more and ranks 1 or more; got {bad}")
    if d_model < 1 or size < 1:
        raise ValueError(f"d_model and the bank's size must be 1 or more; got {d_model} and {size}")
