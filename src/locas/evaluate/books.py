"""Whole books, read online by several methods: every token scored once, before it was learnt.

    run = BooksRun(backbone, books, "results/books", [Method.parse("truncation"), Method.parse("locas")])
    for progress in run:
        ...
    results = run.results()

A unit of work is one method on one book with one seed; its per-token losses go to a file named after everything that
they depend on, so a run that was stopped, or given more books or methods, measures only what is missing. No loss
depends on a later token: what was read further already is not read again for a shorter beginning. Beside each
method, truncated reading is timed on some of the same chunks, so that ratios of time are measured side by side.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locas._version import __version__
from locas.backbone import Backbone
from locas.evaluate.book import Book, Method, save_text, slug
from locas.evaluate.learners import Learner, Locas, Setup, make, resolve
from locas.evaluate.memory_use import peak_bytes, size_of
from locas.evaluate.provenance import environment
from locas.store import load_tensors, save_tensors
from locas.stream import ChunkRecord, Reader, ReadSettings

REFERENCE = "truncation"  # what time and memory are relative to
LOSSES_FORMAT = "locas-losses"
_TIMED_FIRST, _TIMED_EVERY = 16, 7  # truncated reading is timed on the first chunks, then on every n-th: at seven, that
# is out of step with what a write does at every second, fourth or eighth chunk


@dataclass(frozen=True)
class Unit:
    """One method on one book with one seed. path: where its losses go, ending in the number of tokens."""

    book: Book
    method: Method
    setup: Setup
    seed: int
    key: str
    path: Path

    def measured(self) -> Path | None:
        """Where its losses are: its own file, or that of the shortest longer reading; None if there is neither."""
        head, _, own = self.path.stem.rpartition("-")
        alike = self.path.parent.glob(f"{glob.escape(head)}-*{self.path.suffix}")
        tokens = (int(path.stem.rpartition("-")[2]) for path in alike)
        longer = min((n for n in tokens if n >= int(own)), default=None)
        return None if longer is None else self.path.with_stem(f"{head}-{longer}")


@dataclass(frozen=True)
class Losses:
    """What a unit measured.

    Attributes:
        nll: [n] float32, nats, NaN where a token was not scored.
        stops: where each chunk ends, in tokens.
        seconds: wall time, making the memory included.
        relative_time: to truncated reading of the same chunks, timed in turn; NaN if it was not.
        peak_bytes: at most held while reading a chunk: backbone, method and pass together; 0 if not measured.
        n_parameters: extra trainable numbers.
        undone: chunks whose write was undone or left out because something was not finite.
        tensors: everything on file, the norms of a memory's slots included.
        manifest: the rest of it.
    """

    nll: Tensor
    stops: list[int]
    seconds: float
    relative_time: float
    peak_bytes: int
    n_parameters: int
    undone: int
    tensors: dict[str, Tensor]
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the unit at work, its chunk, and tokens read of all that were missing."""

    unit: Unit
    record: ChunkRecord
    tokens: int
    total_tokens: int


class _ReferenceTimer:
    """Times truncated reading between the chunks of a method. tokens, seconds: of each chunk; NaN where not timed."""

    def __init__(self, run: BooksRun, unit: Unit) -> None:
        backbone, ids, settings = run.backbone, unit.book.ids, run.setups[REFERENCE].read
        settings = replace(settings, reuse=False)  # it jumps from place to place
        self.reader = Reader(backbone.model, None, [ids], settings, start_id=backbone.start_id)
        self.device = self.reader.device
        window, chunk = unit.setup.read.sizes(backbone.model)
        self.n_chunks = -(-ids.numel() // chunk)
        self.profiled = _fullest(unit.setup, window, chunk, ids.numel() // chunk)
        self.needed = unit.method.label != REFERENCE
        self.tokens: list[float] = []
        self.seconds: list[float] = []

    def chunk(self, i: int, start: int) -> None:
        """After chunk i, which begins at `start`, of the method: reads the same place, if it is among those timed."""
        often = (i > 0 and (i <= _TIMED_FIRST or i % _TIMED_EVERY == 0)) or self.n_chunks <= 2
        if not (self.needed and often and i != self.profiled):
            self.tokens.append(math.nan)
            self.seconds.append(math.nan)
            return
        self.reader.position = start
        began = time.perf_counter()
        (record,) = self.reader.next_chunk()
        assert record is not None
        self.seconds.append(_since(began, self.device))
        self.tokens.append(record.stop - record.start)


def _fullest(setup: Setup, window: int, chunk: int, whole: int) -> int:
    """The chunk whose peak of memory stands for all: the first whose window is full, with the context that is kept
    (and whatever optimisers allocate at first), and which makes the metric of curvature anew; of a text of so few
    `whole` chunks that there is none, the last whole one."""
    full = -(-window // chunk) + 1
    write = setup.read.write
    curved = setup.init is not None and write.curved
    found = next(i for i in itertools.count(full) if not curved or write.renews(i))
    return max(0, min(found, whole - 1))


class BooksRun:
    """Several methods on several books; see the module's text.

    Args:
        backbone: model and tokenizer.
        books: what is read.
        folder: where losses and results are kept; it is made if it is missing.
        methods: truncated reading is added in front where it is missing.
        read: window, chunk and the memory's write rule, the same for all.
        seeds: methods without anything random run with the first one only.

    Raises:
        ValueError: unknown methods, settings that do not fit, nothing to do, or one name for two things.
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        backbone: Backbone,
        books: Sequence[Book],
        folder: str | Path,
        methods: Sequence[Method],
        read: ReadSettings | None = None,
        seeds: Sequence[int] = (0,),
    ) -> None:
        if not books or not seeds:
            raise ValueError("there is nothing to do: at least one book and one seed are needed")
        if not any(m.label == REFERENCE for m in methods):
            methods = [Method(REFERENCE, REFERENCE), *methods]
        _check_distinct("method", [m.label for m in methods])
        _check_distinct("book", [b.name for b in books])
        _check_distinct("seed", [str(s) for s in seeds])
        self.backbone, self.books, self.methods, self.seeds = backbone, list(books), list(methods), list(seeds)
        self.read = read or ReadSettings()
        self.folder = Path(folder)
        self.setups = {m.label: resolve(m.name, backbone, self.read, m.options) for m in methods}
        self.environment = environment(backbone)
        for part in ("losses", "texts"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self.units = [self._unit(b, m, s) for b in self.books for m in self.methods for s in self.seeds_of(m)]

    def seeds_of(self, method: Method) -> list[int]:
        """The seeds that a method runs with."""
        return self.seeds if self.setups[method.label].random else self.seeds[:1]

    def _unit(self, book: Book, method: Method, seed: int) -> Unit:
        setup = self.setups[method.label]
        what = {
            "library": __version__,
            "setup": setup.record(),
            "seed": seed,
            "backbone": self.environment["backbone"],
            "device": next(self.backbone.model.parameters()).device.type,
            "start_id": self.backbone.start_id,
            "text": book.sha256,
        }
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        name = f"{slug(Path(book.name).stem)}-{slug(method.label)}-{seed}-{key[:10]}-{book.ids.numel()}.safetensors"
        return Unit(book, method, setup, seed, key, self.folder / "losses" / name)

    # ---------------------------------------------------------------- measuring

    @property
    def missing(self) -> list[Unit]:
        """Units that have not been measured yet."""
        return [u for u in self.units if u.measured() is None]

    def __iter__(self) -> Iterator[Progress]:
        """Measures what is missing; may be stopped at any time, which loses the unit at work and nothing else.

        Raises:
            FloatingPointError: a method diverged; what was measured before is kept.
        """
        for book in self.books:
            save_text(self.text_path(book), book)
        missing = self.missing
        done, total = 0, sum(u.book.ids.numel() for u in missing)
        for unit in missing:
            for record in self._measure(unit):
                yield Progress(unit, record, done + record.stop, total)
            done += unit.book.ids.numel()

    def text_path(self, book: Book) -> Path:
        """Where the text of a book is kept, for the report."""
        key = hashlib.sha256((book.sha256 + book.ids_sha256).encode()).hexdigest()
        return self.folder / "texts" / f"{slug(Path(book.name).stem)}-{key[:10]}.safetensors"

    def _measure(self, unit: Unit) -> Iterator[ChunkRecord]:
        model = self.backbone.model
        device = next(model.parameters()).device
        learner = make(unit.method.name, self.backbone, self.read, seed=unit.seed, options=unit.method.options)
        timer = _ReferenceTimer(self, unit)
        records: list[ChunkRecord] = []
        seconds, peak = [], 0
        try:
            chunks = learner.read(unit.book.ids)
            for i in range(timer.n_chunks):
                began = time.perf_counter()
                if i == timer.profiled:
                    seen = model.register_forward_hook(lambda *_: None)  # nothing is replayed: that allocates nothing
                    try:
                        record, most = peak_bytes(lambda: next(chunks), device)
                    finally:
                        seen.remove()
                    peak = most + size_of([*model.parameters(), *model.buffers()]) + size_of(learner.tensors())
                else:
                    record = next(chunks)
                seconds.append(_since(began, device))
                records.append(record)
                timer.chunk(i, record.start)
                yield record
            save_losses(unit, learner, records, seconds, timer, peak, self.environment)
        finally:
            learner.close()

    # ---------------------------------------------------------------- results

    def losses(self, unit: Unit) -> Losses:
        """What a unit measured. Raises ValueError if its file is damaged or another's: delete it, and run again."""
        path = unit.measured() or unit.path
        found = load_losses(path, unit.book.ids.numel())
        if found.manifest.get("key") != unit.key or found.nll.numel() != unit.book.ids.numel():
            raise ValueError(f"{path} holds another measurement; move it away and run again")
        return found


def save_losses(
    unit: Unit,
    learner: Learner,
    records: Sequence[ChunkRecord],
    seconds: Sequence[float],
    timer: _ReferenceTimer,
    peak: int,
    environment: dict[str, Any],
) -> None:
    """Writes what a unit measured, atomically."""
    tensors = {
        "nll": torch.cat([r.nll for r in records]).float(),
        "stops": torch.tensor([r.stop for r in records]),
        "seconds": torch.tensor(seconds, dtype=torch.float64),
        "reference_seconds": torch.tensor(timer.seconds, dtype=torch.float64),
        "reference_tokens": torch.tensor(timer.tokens, dtype=torch.float64),
        "grad_norm": torch.tensor([r.grad_norm for r in records]),
        "row_norm": torch.tensor([r.row_norm for r in records]),
        "undone": torch.tensor([int(r.undone) for r in records]),
        **slot_norms(learner),
    }
    manifest = {
        "format": LOSSES_FORMAT,
        "version": 1,
        "key": unit.key,
        "book": unit.book.name,
        "bytes": len(unit.book.text),
        "method": unit.method.label,
        "seed": unit.seed,
        "setup": unit.setup.record(),
        "parameters": learner.n_parameters,
        "peak_bytes": peak,
        **environment,
    }
    save_tensors(unit.path, tensors, manifest)


def load_losses(path: Path, tokens: int | None = None) -> Losses:
    """Reads what `save_losses` wrote, or the part of it that is about the first `tokens` tokens.

    Raises:
        ValueError: the file is damaged.
    """
    tensors, manifest = load_tensors(
        path, kind=LOSSES_FORMAT, may_be_nan=("nll", "reference_", "grad_norm", "row_norm")
    )
    if tokens is not None and tokens < tensors["nll"].numel():
        tensors = _beginning(tensors, tokens)
    return Losses(
        nll=tensors["nll"],
        stops=tensors["stops"].tolist(),
        seconds=float(tensors["seconds"].sum()),
        relative_time=1.0 if manifest["method"] == REFERENCE else relative_time(tensors),
        peak_bytes=int(manifest["peak_bytes"]),
        n_parameters=int(manifest["parameters"]),
        undone=int(tensors["undone"].sum()),
        tensors=tensors,
        manifest=manifest,
    )


def _beginning(tensors: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """What reading so many tokens and no more would have measured. Of a chunk that is cut the time is a share, and
    not compared; the slots are those of the longer reading's end, and left out."""
    chunks = int(torch.searchsorted(tensors["stops"], tokens)) + 1
    cut = {
        name: tensor[: tokens if name == "nll" else chunks].clone()
        for name, tensor in tensors.items()
        if not name.startswith("slots.")
    }
    sizes = cut["stops"].diff(prepend=cut["stops"].new_zeros(1))
    surplus = cut["stops"][-1] - tokens
    if surplus:
        cut["seconds"][-1] *= 1 - surplus / sizes[-1]
        cut["stops"][-1] = tokens
        cut["reference_seconds"][-1] = cut["reference_tokens"][-1] = math.nan
    return cut


def relative_time(tensors: dict[str, Tensor]) -> float:
    """Seconds a token, over those of truncated reading, on the chunks where both were timed; NaN if there are none.

    Each of them stands for those before it that were not timed, too, so that a long text is not judged by its
    beginning, which is timed chunk by chunk.
    """
    timed = torch.nonzero(~tensors["reference_seconds"].isnan()).flatten()
    if not timed.numel():
        return math.nan
    stands_for = timed.diff(prepend=timed.new_full((1,), -1)).double()

    def total(values: Tensor) -> float:
        return float((values[timed] * stands_for).sum())

    tokens = tensors["stops"].diff(prepend=tensors["stops"].new_zeros(1)).double()
    mine = total(tensors["seconds"]) / total(tokens)
    return mine / (total(tensors["reference_seconds"]) / total(tensors["reference_tokens"]))


def slot_norms(learner: Learner) -> dict[str, Tensor]:
    """{slots.LAYER.PART: [rank]} lengths of a memory's rows; empty for other methods."""
    norms: dict[str, Tensor] = {}
    if isinstance(learner, Locas) and learner.bank is not None:
        for layer in learner.bank.layers:
            slots = learner.bank.slots(layer)
            for part, rows in (("gate", slots.g), ("key", slots.k), ("value", slots.v)):
                if rows is not None:
                    norms[f"slots.{layer}.{part}"] = rows[0].norm(dim=-1).float()
    return norms


def _since(began: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _check_distinct(what: str, names: Sequence[str]) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"the {what} {twice[0]!r} is given twice; each must have a name of its own")
