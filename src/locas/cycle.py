"""Step-wise memory without gradient steps: a slot for every token, compressed by NL-SVD when it is full.

    memory = locas.create(model, ids, InitSettings(variant="mlp", init="step-wise", rank=512))   # capacity
    for step in read_and_compress(model, memory, ids, rank=256):
        print(step.record.nll.mean(), step.compressed)

The expansion-compression cycle of arXiv:2602.05085 app.: tokens fill slots until the capacity is reached, then NL-SVD
makes `rank` of them, and the filling goes on. The paper finds that plain gradient steps do as well for far less time;
`recipes/compress.py` measures it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locas.bank import ACTIVATIONS, Bank
from locas.compress import nl_svd
from locas.initialise import empty_slots
from locas.memory import Memory, record_reading
from locas.stream import ChunkRecord, Reader, ReadSettings


@dataclass(frozen=True)
class CycleStep:
    """record: of the chunk; compressed: whether the memory was compressed before it was read."""

    record: ChunkRecord
    compressed: bool


def read_and_compress(
    model: nn.Module,
    memory: Memory,
    ids: Tensor | Sequence[int],
    rank: int,
    settings: ReadSettings | None = None,
    *,
    start_id: int | None = None,
    name: str = "<ids>",
) -> Iterator[CycleStep]:
    """Reads a text, one slot for each token; before a chunk that would not fit, the memory is compressed.

    Args:
        model: the backbone.
        memory: Locas-MLP with step-wise slots; its rank is the capacity.
        ids: [n] token ids.
        rank: slots that are left after compressing; half the capacity is the paper's choice.
        settings: window, chunk, `fill_eps`; with `steps` above 1, gradient steps follow each filling.
        start_id: see `Reader`.
        name: of the text, for the memory's provenance.

    Raises:
        ValueError: a gated or frozen memory, or a rank that leaves no room.
    """
    bank, settings = memory.bank, settings or ReadSettings()
    capacity = min(bank.ranks.values())
    if bank.variant != "mlp":
        raise ValueError("the expansion-compression cycle is for Locas-MLP; make the memory with variant mlp")
    if not 1 <= rank < capacity:
        raise ValueError(f"compressing {capacity} slots (the memory's capacity) to {rank} leaves no room; use fewer")
    if bank.frozen.any():
        raise ValueError("frozen slots cannot be compressed while reading; thaw them first (locas.grow.thaw)")
    memory.check(model)
    ids = torch.as_tensor(ids)
    reader = Reader(model, bank, [ids], settings, start_id=start_id)
    needed = min(reader.chunk_tokens, capacity - rank)
    try:
        while not reader.done:
            full = int(empty_slots(bank)[0]) < needed
            if full:
                _squeeze(reader, bank, rank, clip=settings.write.clip)
            (record,) = reader.next_chunk()
            assert record is not None
            yield CycleStep(record, full)
    finally:
        stop = min(reader.position, ids.numel())
        if stop:
            record_reading(memory, ids[:stop], settings, name=name)


@torch.no_grad()
def _squeeze(reader: Reader, bank: Bank, rank: int, *, clip: bool) -> None:
    """NL-SVD of every layer in place: the first slots hold the result, the others are empty again."""
    for layer in bank.layers:
        slots = bank.slots(layer)
        k, v = nl_svd(slots.k[0], slots.v[0], ACTIVATIONS[bank.activation], rank)
        for rows, new in ((slots.k, k), (slots.v, v)):
            rows.zero_()
            rows[0, : new.shape[0]].copy_(new)
    if clip:
        bank.clip_rows()
    # What the writer remembers of the old slots says nothing about the new ones.
    state = {name: tensor for name, tensor in reader.state().items() if ".before." not in name}
    reader.load_state({name: torch.zeros_like(t) if ".moment." in name else t for name, t in state.items()})
