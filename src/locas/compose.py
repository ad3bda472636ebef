"""Composing: several memories of one backbone become one, slots side by side, so that its read is their sum.

    both = compose([load("a.safetensors"), load("b.safetensors")])
    both.save("both.safetensors")

A memory has one output scale tau for each layer. The composed one takes the largest that its parts have there, and the
others' values are scaled by tau_i / tau, which is at most 1: rows that norm clipping had left at norm 1 or less stay
there, so that reading may go on without a jump.

Exact: keys, gates, tau, and the values of whichever part has the layer's largest tau, or one that is a power of two
below it (always so where all tau are equal). Other values are rounded once, to the memory's dtype: relative error at
most 2^-24 for float32 (2^-53 for float64), far below what one write changes. `locas merge` takes several memories as
they are and rounds nothing on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from locas.bank import Bank
from locas.memory import Memory, Provenance
from locas.sites import canonical_activation


def compose(memories: Sequence[Memory]) -> Memory:
    """One memory whose read is the sum of the others' reads; they stay as they are.

    Args:
        memories: of one backbone, variant and activation; layers and ranks may differ.

    Returns:
        A memory of summed ranks, on all layers that any of them has. Its provenance lists all documents in order, and
        the parts' settings under "compose".

    Raises:
        ValueError: no memory, or two that do not fit together.
    """
    if not memories:
        raise ValueError("there is no memory to compose")
    first = memories[0].bank
    for number, memory in enumerate(memories[1:], start=2):
        _check(memories[0], memory, number)
    layers = sorted({layer for memory in memories for layer in memory.bank.layers})
    ranks = {layer: sum(memory.bank.ranks.get(layer, 0) for memory in memories) for layer in layers}
    dtype = torch.float64 if any(m.bank.rows.dtype == torch.float64 for m in memories) else first.rows.dtype
    bank = Bank(first.variant, first.activation, first.d_model, ranks, dtype=dtype)
    for position, layer in enumerate(layers):
        parts = [memory.bank for memory in memories if layer in memory.bank.ranks]
        taus = [float(part.tau[0, part.layers.index(layer)]) for part in parts]
        tau = max(taus, key=abs)
        bank.tau[0, position] = tau
        slots, start = bank.slots(layer), 0
        for part, own in zip(parts, taus, strict=True):
            theirs, stop = part.slots(layer), start + part.ranks[layer]
            slots.k[0, start:stop] = theirs.k[0]
            if slots.g is not None and theirs.g is not None:
                slots.g[0, start:stop] = theirs.g[0]
            slots.v[0, start:stop] = theirs.v[0].double() * (own / tau if tau else 1.0)
            start = stop
    return Memory(bank, _provenance(memories))


def _check(first: Memory, other: Memory, number: int) -> None:
    """Raises ValueError unless the memory of this number fits beside the first one."""
    for what, one, two in (
        ("backbone", first.provenance.backbone_fingerprint[:12], other.provenance.backbone_fingerprint[:12]),
        ("tokenizer", _tokenizer(first) or _tokenizer(other), _tokenizer(other) or _tokenizer(first)),
        ("variant", first.bank.variant, other.bank.variant),
        ("activation", canonical_activation(first.bank.activation), canonical_activation(other.bank.activation)),
        ("width", first.bank.d_model, other.bank.d_model),
    ):
        if one != two:
            raise ValueError(
                f"memory {number} has another {what} than memory 1 ({two} and {one}): only memories that were made "
                "with one backbone, variant and activation can be composed"
            )


def _tokenizer(memory: Memory) -> str | None:
    known = memory.provenance.tokenizer_sha256
    return known[:12] if known is not None else None


def _provenance(memories: Sequence[Memory]) -> Provenance:
    first = memories[0].provenance
    parts: list[dict[str, Any]] = []
    for memory in memories:
        about = memory.manifest()
        parts.append({key: about[key] for key in ("ranks", "tau", "settings", "library")})
    return Provenance(
        backbone=first.backbone,
        backbone_fingerprint=first.backbone_fingerprint,
        tokenizer_sha256=next((t for m in memories if (t := m.provenance.tokenizer_sha256) is not None), None),
        documents=tuple(document for memory in memories for document in memory.provenance.documents),
        settings={"compose": {"parts": parts}},
    )
