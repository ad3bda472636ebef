"""Composing: several memories of one backbone become one, slots side by side, so that its read is their sum.

    both = compose([load("a.safetensors"), load("b.safetensors")])
    both.save("both.safetensors")
    both = compose([a, b], weights=[0.75, 0.75])                     # less of each
    both = compose([a, b], model=model, fit=[ids_a, ids_b])          # each text reads as with its own
    a_again = subtract(both, b)                                      # bit for bit, where nothing was fitted

A memory has one output scale tau for each layer. The composed one takes the largest that its parts have there, and the
others' values are scaled by tau_i / tau, which is at most 1: rows that norm clipping had left at norm 1 or less stay
there, so that reading may go on without a jump. Slots that are frozen in a part come first and stay frozen.

Exact: keys, gates, tau, and the values of whichever part has the layer's largest tau (times weight), or one that is a
power of two below it; always so where all are equal, as they are by default. Other values are rounded once, to the
memory's dtype: relative error at most 2^-24 for float32 (2^-53 for float64), far below what one write changes. `locas
merge` takes several memories as they are and rounds nothing on the way.

Where two memories fire on the same text, their sum is more than either meant. With `fit`, the free slots are moved
until, on each part's text, the composed memory predicts as that part alone (`locas.composed_fit`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from locas.bank import Bank
from locas.composed_fit import FitSettings, fit_composed
from locas.memory import FORMAT, FORMAT_VERSION, Memory, Provenance, from_manifest
from locas.sites import canonical_activation

_SHARED = ("format", "version", "variant", "activation", "d_model")  # what a part's manifest need not repeat
_NESTED = 4  # compositions of compositions that are noted in full; a file's manifest must not nest without end


def compose(
    memories: Sequence[Memory],
    *,
    weights: Sequence[float] | None = None,
    fit: Sequence[Tensor | Sequence[int]] | None = None,
    model: nn.Module | None = None,
    start_id: int | None = None,
    settings: FitSettings | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Memory:
    """One memory whose read is the weighted sum of the others' reads; they stay as they are.

    Args:
        memories: of one backbone, variant and activation; layers and ranks may differ.
        weights: one for each memory, by which its output is scaled; None: 1 each.
        fit: [n] token ids for each memory, of the text that it has read or one like it: the sum is fitted so that on
            each text the composed memory predicts as that text's own (times its weight). None: the plain sum.
        model: the backbone; needed for `fit` only.
        start_id: with `fit`, the model's beginning-of-text token, where it expects one.
        settings: with `fit`, how: see `FitSettings`.
        on_progress: with `fit`, called with how many windows are done, and of how many.

    Returns:
        A memory of summed ranks, on all layers that any of them has. Its provenance lists all documents in order, and
        under "compose" the parts' manifests, weights, and what was fitted and with which error.

    Raises:
        ValueError: no memory, two that do not fit together, or weights or texts that are not one for each.
    """
    if not memories:
        raise ValueError("there is no memory to compose")
    for number, memory in enumerate(memories[1:], start=2):
        _check(memories[0], memory, number)
    scales = _weights(weights, len(memories))
    if fit is not None and (model is None or len(fit) != len(memories)):
        what = f"{len(memories)} memories need as many texts; got {len(fit)}" if model is not None else "a model"
        raise ValueError(f"fitting needs {what}: compose(memories, model=model, fit=[ids of each one's text])")
    bank = _side_by_side(memories, scales)
    record: dict[str, Any] = {"parts": [_part_record(m, w) for m, w in zip(memories, scales, strict=True)]}
    if fit is not None and model is not None:
        texts = [torch.as_tensor(ids) for ids in fit]
        for memory in memories:
            memory.check(model)
        parts = [memory.bank.scaled(weight) for memory, weight in zip(memories, scales, strict=True)]
        record["fit"] = fit_composed(
            model, bank, parts, texts, settings or FitSettings(), start_id=start_id, on_progress=on_progress
        )
    return Memory(bank, _provenance(memories, record))


def _weights(weights: Sequence[float] | None, n: int) -> list[float]:
    weights = [1.0] * n if weights is None else [float(w) for w in weights]
    if len(weights) != n:
        raise ValueError(f"{n} memories need as many weights; got {len(weights)}")
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"weights must be finite numbers; got {weights}")
    return weights


def _side_by_side(memories: Sequence[Memory], weights: Sequence[float]) -> Bank:
    first = memories[0].bank
    layers = sorted({layer for memory in memories for layer in memory.bank.layers})
    ranks = {layer: sum(memory.bank.ranks.get(layer, 0) for memory in memories) for layer in layers}
    dtype = torch.float64 if any(m.bank.rows.dtype == torch.float64 for m in memories) else first.rows.dtype
    bank = Bank(first.variant, first.activation, first.d_model, ranks, dtype=dtype, device=first.device)
    banks = [memory.bank for memory in memories]
    for i, layer in enumerate(layers):
        taus = _taus(banks, weights, layer)
        tau = max(taus, key=abs)
        bank.tau[0, i] = tau
        bank.frozen[0, i] = sum(_frozen(part, layer) for part in banks)
        slots = bank.slots(layer)
        for part, own, at in zip(banks, taus, _places(banks, layer), strict=True):
            if layer in part.ranks:
                theirs = part.slots(layer)
                slots.k[0, at] = theirs.k[0].to(slots.k)
                if slots.g is not None and theirs.g is not None:
                    slots.g[0, at] = theirs.g[0].to(slots.g)
                slots.v[0, at] = (theirs.v[0].double() * (own / tau if tau else 1.0)).to(slots.v)
    return bank


def _taus(banks: Sequence[Bank], weights: Sequence[float], layer: int) -> list[float]:
    """Each part's output scale in a layer; 0 where it has no slots there."""
    return [
        weight * float(bank.tau[0, bank.layers.index(layer)]) if layer in bank.ranks else 0.0
        for bank, weight in zip(banks, weights, strict=True)
    ]


def _places(banks: Sequence[Bank], layer: int) -> Iterator[Tensor]:
    """Where each part's slots go: all frozen ones first, part by part, then the others."""
    frozen = [_frozen(bank, layer) for bank in banks]
    free = [bank.ranks.get(layer, 0) - n for bank, n in zip(banks, frozen, strict=True)]
    start, later = 0, sum(frozen)
    for n, m in zip(frozen, free, strict=True):
        yield torch.cat([torch.arange(start, start + n), torch.arange(later, later + m)])
        start, later = start + n, later + m


def _frozen(bank: Bank, layer: int) -> int:
    return int(bank.frozen[0, bank.layers.index(layer)]) if layer in bank.ranks else 0


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


def _part_record(memory: Memory, weight: float) -> dict[str, Any]:
    about = {key: value for key, value in memory.manifest().items() if key not in _SHARED}
    dtype = str(memory.bank.rows.dtype).removeprefix("torch.")
    about |= {"activation": memory.bank.activation, "settings": _noted(memory.provenance.settings, _NESTED)}
    plain: dict[str, Any] = json.loads(json.dumps(about))  # as it comes out of a file: lists for tuples
    return {"weight": weight, "sha256": sha256_of(memory), "dtype": dtype, **plain}


def _noted(settings: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Settings whose compositions are noted so many levels deep; below that only how many parts there were."""
    settings = dict(settings)
    inner = settings.get("compose")
    if inner is None:
        return settings
    parts = [part | {"settings": _noted(part["settings"], depth - 1)} for part in inner["parts"]] if depth > 1 else []
    return settings | {"compose": {**inner, "parts": parts} | ({"omitted": len(inner["parts"])} if depth <= 1 else {})}


def sha256_of(memory: Memory) -> str:
    """Of a memory's tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(memory.tensors().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _provenance(memories: Sequence[Memory], record: dict[str, Any]) -> Provenance:
    first = memories[0].provenance
    return Provenance(
        backbone=first.backbone,
        backbone_fingerprint=first.backbone_fingerprint,
        tokenizer_sha256=next((t for m in memories if (t := m.provenance.tokenizer_sha256) is not None), None),
        documents=tuple(document for memory in memories for document in memory.provenance.documents),
        settings={"compose": record},
    )


# -------------------------------------------------------------------- taking apart


def subtract(memory: Memory, part: Memory | int) -> Memory:
    """The composed memory without one of its parts, bit for bit as if that one had never been composed.

    Args:
        memory: what `compose` returned, unchanged since.
        part: the memory to take out, or its number, from 0.

    Returns:
        The other part as it was, its provenance included; or the composition of the others, with their weights.

    Raises:
        ValueError: not a composed memory, none of its parts, or one whose parts cannot be given back to the bit.
    """
    parts = split(memory)
    records = memory.provenance.settings["compose"]["parts"]
    if isinstance(part, Memory):
        wanted = sha256_of(part)
        found = [i for i, record in enumerate(records) if record["sha256"] == wanted]
        if not found:
            raise ValueError("the memory that is to be taken out is none of those that were composed")
        part = found[0]
    if not 0 <= part < len(parts):
        raise ValueError(f"part {part} asked for, but this memory has the parts 0..{len(parts) - 1}")
    if len(parts) == 1:
        raise ValueError("this memory has one part only: without it there is nothing left")
    rest = [p for i, p in enumerate(parts) if i != part]
    weights = [float(record["weight"]) for i, record in enumerate(records) if i != part]
    return rest[0] if len(rest) == 1 and weights == [1.0] else compose(rest, weights=weights)


def split(memory: Memory) -> list[Memory]:
    """The parts of a composed memory, each bit for bit what it was before, its provenance included.

    Raises:
        ValueError: as for `subtract`.
    """
    record = memory.provenance.settings.get("compose")
    if not record or not record["parts"] or not all("sha256" in part for part in record["parts"]):
        raise ValueError("this memory was not composed (or by a locas that did not note what its parts were)")
    again = "compose the memories that are to stay anew, from their own files"
    if "fit" in record:
        raise ValueError(f"this memory was fitted to all its parts together; {again}")
    blank = [_blank(memory, part) for part in record["parts"]]
    weights = [float(part["weight"]) for part in record["parts"]]
    banks = [part.bank for part in blank]
    for layer in memory.bank.layers:
        if memory.bank.ranks[layer] != sum(bank.ranks.get(layer, 0) for bank in banks):
            raise ValueError(f"this memory was changed since it was composed (it grew or was compressed); {again}")
        slots, taus = memory.bank.slots(layer), _taus(banks, weights, layer)
        tau = max(taus, key=abs)
        for bank, own, at in zip(banks, taus, _places(banks, layer), strict=True):
            if layer in bank.ranks:
                mine = bank.slots(layer)
                mine.k[0].copy_(slots.k[0, at])
                if mine.g is not None and slots.g is not None:
                    mine.g[0].copy_(slots.g[0, at])
                mine.v[0].copy_(slots.v[0, at].double() / (own / tau if own else 1.0))
    for number, (part, about) in enumerate(zip(blank, record["parts"], strict=True), start=1):
        if sha256_of(part) != about["sha256"]:
            raise ValueError(
                f"part {number} cannot be given back to the bit: something was learnt since, or its values were "
                f"rounded because its tau or weight is another than the largest; {again}"
            )
    return blank


def _blank(memory: Memory, part: dict[str, Any]) -> Memory:
    """A part with its manifest and zeros for its tensors."""
    shared = {"format": FORMAT, "version": FORMAT_VERSION, "variant": memory.bank.variant,
              "d_model": memory.bank.d_model}  # fmt: skip
    manifest = shared | {key: value for key, value in part.items() if key not in ("weight", "sha256", "dtype")}
    ranks = {int(layer): int(rank) for layer, rank in part["ranks"].items()}
    bank = Bank(
        memory.bank.variant, part["activation"], memory.bank.d_model, ranks, dtype=getattr(torch, part["dtype"])
    )
    zeros = Memory(bank, memory.provenance).tensors()
    return Memory(*from_manifest("the composed memory", zeros, manifest))
