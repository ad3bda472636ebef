"""Step-wise memory without gradient steps: a slot for every token, compressed by NL-SVD when it is full.

    memory = locas.create(model, ids, InitSettings(variant="mlp", init="step-wise", rank=512))   # capacity
    for step in read_and_compress(model, memory, ids, rank=256):
        print(step.record.nll.mean(), step.compressed)

The expansion-compression cycle of arXiv:2602.05085 app.: tokens fill slots until the capacity is reached, then NL-SVD
makes `rank` of them, and the filling goes on. The paper finds that plain gradient steps do as well for far less time;
`recipes/compress.py` measures it. `CycleRun` is the same as a resumable run, `locas memorize --cycle RANK`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from locas.backbone import Backbone
from locas.bank import ACTIVATIONS, Bank
from locas.compress import nl_svd
from locas.initialise import empty_slots, variant_of
from locas.memory import Memory, record_reading
from locas.run import Run
from locas.run_settings import RunSettings, Text
from locas.sites import find_sites
from locas.stream import ChunkRecord, Reader, ReadSettings


@dataclass(frozen=True)
class CycleStep:
    """record: of the chunk; compressed: whether the memory was compressed before it was read."""

    record: ChunkRecord
    compressed: bool


class CycleReader(Reader):
    """A reader that compresses its memory before a chunk that would not fit.

    Attributes:
        rank: slots that are left after compressing.
        compressed: whether that happened before the last chunk.

    Raises:
        ValueError: a gated or frozen memory, or a rank that leaves no room.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        documents: Sequence[Tensor],
        settings: ReadSettings,
        rank: int,
        *,
        start_id: int | None = None,
    ) -> None:
        check_cycle(bank, rank)
        super().__init__(model, bank, documents, settings, start_id=start_id)
        self.rank, self.compressed = rank, False

    def next_chunk(self) -> list[ChunkRecord | None]:
        assert self.bank is not None
        needed = min(self.chunk_tokens, min(self.bank.ranks.values()) - self.rank)
        self.compressed = not self.done and int(empty_slots(self.bank, least=True)[0]) < needed
        if self.compressed:
            _squeeze(self, self.bank, self.rank, clip=self.settings.write.clip)
        return super().next_chunk()


def check_cycle(bank: Bank, rank: int) -> None:
    """Raises ValueError unless the expansion-compression cycle can go on with this memory, `rank` slots being left."""
    capacity = min(bank.ranks.values())
    if bank.variant != "mlp":
        raise ValueError("the expansion-compression cycle is for Locas-MLP; make the memory with variant mlp")
    if not 1 <= rank < capacity:
        raise ValueError(f"compressing {capacity} slots (the memory's capacity) to {rank} leaves no room; use fewer")
    if bank.frozen.any():
        raise ValueError("frozen slots cannot be compressed while reading; thaw them first (locas.grow.thaw, --thaw)")


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
    settings = settings or ReadSettings()
    check_cycle(memory.bank, rank)
    memory.check(model)
    ids = torch.as_tensor(ids)
    reader = CycleReader(model, memory.bank, [ids], settings, rank, start_id=start_id)
    try:
        while not reader.done:
            (record,) = reader.next_chunk()
            assert record is not None
            yield CycleStep(record, reader.compressed)
    finally:
        stop = min(reader.position, ids.numel())
        if stop:
            record_reading(memory, ids[:stop], settings, name=name)
            _note(memory, rank)


class CycleRun(Run):
    """A resumable run (see `Run`) over texts into one memory, with the cycle in place of plain reading.

    Args:
        backbone: model and tokenizer.
        texts: in reading order.
        output: where the memory file goes.
        settings: with `cycle`, the slots that are left after compressing; the memory's rank is the capacity. The
            default initialisation is step-wise here.

    Raises:
        ValueError: as for `Run`, and a memory that the cycle is not for.
    """

    compresses = True

    def __init__(self, backbone: Backbone, texts: Sequence[Text], output: str, settings: RunSettings) -> None:
        site = next(iter(find_sites(backbone.model).values()))
        if settings.init.init == "auto" and variant_of(settings.init, site) == "mlp":
            settings = replace(settings, init=replace(settings.init, init="step-wise"))
        super().__init__(backbone, texts, output, settings)
        check_cycle(self.memory.bank, settings.cycle)
        _note(self.memory, settings.cycle)

    def _reader_of(self, bank: Bank, documents: Sequence[Tensor]) -> Reader:
        return CycleReader(
            self.backbone.model, bank, documents, self.settings.read, self.settings.cycle,
            start_id=self.backbone.start_id,
        )  # fmt: skip


def _note(memory: Memory, rank: int) -> None:
    settings = {**memory.provenance.settings, "cycle": {"rank": rank}}
    memory.provenance = replace(memory.provenance, settings=settings)


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
