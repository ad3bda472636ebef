"""A resumable run: read texts into one memory, one after another, or each into a memory of its own, several at a time.

    run = Run(backbone, texts, "book.safetensors", settings)  # or Run(backbone, texts, "memories", settings, batch=16)
    for progress in run:
        ...
    run.finish()

A run that was stopped, in whatever way, goes on from its state file; what it then leaves is bit for bit what it would
have left undisturbed. The state file lies beside the output and is named after everything that the result depends on,
so that a run never continues another's.

In a batch, texts are read in groups of so many, in order, each group in one bank; its memories are written when all of
it is read. Every memory is the one that reading its text alone leaves, up to the rounding of sums that a batch adds up
in another order. With `reuse` one thing is shared: where a write is undone, all texts of the group recompute their
context once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locas.backbone import Backbone
from locas.bank import Bank
from locas.memory import Memory
from locas.metrics import Score, brief, figures, sum_scores
from locas.run_memories import MemoryEach, OneMemory
from locas.run_settings import RunSettings, Text, resolved, run_key
from locas.store import load_tensors, save_tensors
from locas.stream import ChunkRecord, Reader


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a chunk.

    Attributes:
        document: index of the text; the first of those that are read side by side.
        record: what reading the chunk showed; of texts side by side that of the one whose step is the smallest.
        score: of these texts so far, with memory.
        baseline: of these texts so far, without, where compared.
        tokens: read in all texts so far, of `total_tokens`.
    """

    document: int
    record: ChunkRecord
    score: Score
    baseline: Score | None
    tokens: int


class Run:
    """Reads texts into a memory, or into one each; see the module's text.

    Args:
        backbone: model and tokenizer.
        texts: in reading order.
        output: where the memory file goes; for a batch, the folder for the memory files, made where there is none.
        settings: everything else that the result depends on; for a batch without `start_from` and `compare`.
        batch: texts that are read side by side, each into a memory of its own; None: one after another into one.

    Attributes:
        memories: the memory or memories, and their files.
        first: index of the first text that is not read to its end.
        failed: {text: first token of the chunk whose loss was not finite}; in a batch these are left out, else such a
            text ends the run.

    Raises:
        ValueError: settings that do not fit the backbone or one another, or a file in the way.
        OSError: the output's folder does not exist or cannot be written.
    """

    compresses = False  # whether it acts on `RunSettings.cycle`

    def __init__(
        self,
        backbone: Backbone,
        texts: Sequence[Text],
        output: str | Path,
        settings: RunSettings,
        batch: int | None = None,
    ) -> None:
        self.backbone, self.texts, self.output = backbone, list(texts), Path(output)
        self.settings = settings = resolved(settings, backbone)
        if settings.cycle and not self.compresses:
            raise ValueError(f"a run with cycle={settings.cycle} is a locas.cycle.CycleRun, one text after another")
        if not self.texts:
            raise ValueError("there is no text to read")
        self.memories: OneMemory | MemoryEach = (
            OneMemory(backbone, self.texts, self.output, settings)
            if batch is None
            else MemoryEach(backbone, self.texts, self.output, settings, batch)
        )
        self.first = 0
        self.failed: dict[int, int] = {}
        self.losses = [torch.full((t.ids.numel(),), torch.nan) for t in self.texts]
        self.baseline_losses = [torch.full_like(x, torch.nan) for x in self.losses] if settings.compare else []
        self.seconds, self.baseline_seconds, self.undone = 0.0, 0.0, 0
        self._reader: Reader | None = None
        self._baseline: Reader | None = None
        self.key = run_key(backbone, self.texts, settings, **self.memories.key)
        stem = self.memories.stem
        self.state_path = stem.with_name(f"{stem.name}.{self.key[:8]}.partial")

    @property
    def memory(self) -> Memory:
        """The memory that all texts are read into.

        Raises:
            AttributeError: each has its own.
        """
        if isinstance(self.memories, MemoryEach):
            raise AttributeError("in a batch each text has a memory of its own; load its file")
        return self.memories.memory

    # ---------------------------------------------------------------- reading

    @property
    def group(self) -> range:
        """The texts that are read side by side now."""
        return range(self.first, min(self.first + self.memories.size, len(self.texts)))

    @property
    def total_tokens(self) -> int:
        return sum(t.ids.numel() for t in self.texts)

    @property
    def tokens(self) -> int:
        """Read so far; texts that are left out count as read."""
        done = sum(t.ids.numel() for t in self.texts[: self.first])
        if self._reader is None:
            return done
        position, dropped = self._reader.position, self._reader.failed
        lengths = [self.texts[i].ids.numel() for i in self.group]
        return done + sum(n if row in dropped else min(position, n) for row, n in enumerate(lengths))

    def __iter__(self) -> Iterator[Progress]:
        while self.first < len(self.texts):
            reader = self._reader or self._open()
            while not reader.done:
                progress = self._next(reader)
                if progress is not None:
                    yield progress
            assert reader.bank is not None
            self.memories.close(self.group, reader.bank, self.failed)
            self.first = self.group.stop
            self._reader = self._baseline = None

    def _open(self) -> Reader:
        model, start_id, read = self.backbone.model, self.backbone.start_id, self.settings.read
        documents, bank = [self.texts[i].ids for i in self.group], self.memories.open(self.group)
        self._reader = self._reader_of(bank, documents)
        if self.settings.compare:
            self._baseline = Reader(model, None, documents, read.truncated(), start_id=start_id)
        return self._reader

    def _reader_of(self, bank: Bank, documents: Sequence[Tensor]) -> Reader:
        """What reads these texts and learns from them."""
        return Reader(
            self.backbone.model, bank, documents, self.settings.read,
            start_id=self.backbone.start_id, on_failure=self.memories.on_failure,
        )  # fmt: skip

    def _next(self, reader: Reader) -> Progress | None:
        """Reads a chunk of every text of the group; None where all of them failed."""
        records = reader.next_chunk()
        self.failed |= {self.first + row: start for row, start in reader.failed.items()}
        self.seconds += self._take(records, self.losses)
        while self._baseline is not None and not self._baseline.done and self._baseline.position < reader.position:
            self.baseline_seconds += self._take(self._baseline.next_chunk(), self.baseline_losses)
        read = [record for record in records if record is not None]
        if not read:
            return None
        self.undone += sum(record.undone for record in read)
        slowest = min(read, key=lambda record: record.step_scale)
        baseline = self._here(self.baseline_losses) if self.settings.compare else None
        return Progress(self.first, slowest, self._here(self.losses), baseline, self.tokens)

    def _take(self, records: list[ChunkRecord | None], losses: list[Tensor]) -> float:
        """Notes the losses of the group's chunks; the seconds that they took, together."""
        for i, record in zip(self.group, records, strict=True):
            if record is not None:
                losses[i][record.start : record.stop] = record.nll
        return next((record.seconds for record in records if record is not None), 0.0)

    def _here(self, losses: list[Tensor]) -> Score:
        """The score of the texts that are read now, as far as the memory has read (the baseline may be ahead)."""
        live = [i for i in self.group if i not in self.failed]
        read = [losses[i].where(~self.losses[i].isnan(), torch.nan) for i in live]
        return sum_scores([Score.of(x, self.texts[i].n_bytes) for i, x in zip(live, read, strict=True)])

    def finish(self) -> None:
        """Writes the memory file where that is not done yet, then removes the state file."""
        self.memories.finish()
        self.state_path.unlink(missing_ok=True)

    # ---------------------------------------------------------------- stopping and going on

    def save_state(self) -> None:
        """Writes down everything that the rest of the run needs, atomically."""
        state = self.memories.tensors() if self._reader is None else self._reader.state()
        manifest = {
            "format": self.memories.kind,
            "key": self.key,
            self.memories.position: self.first,
            "tokens": self.tokens,
            "total_tokens": self.total_tokens,
            "seconds": self.seconds,
            "baseline_seconds": self.baseline_seconds,
            "undone": self.undone,
            "settings": asdict(self.settings),
            "backbone": self.backbone.name,
        }
        tensors = self._losses_until(self.group.stop) | {f"reader.{name}": t for name, t in state.items()}
        save_tensors(self.state_path, tensors, manifest | self.memories.manifest(self.failed))

    def _losses_until(self, stop: int) -> dict[str, Tensor]:
        """The losses of the texts before `stop`, as a state file has them."""
        kinds = (("losses", self.losses), ("baseline", self.baseline_losses))
        return {f"{kind}.{i}": x for kind, losses in kinds for i, x in enumerate(losses[:stop])}

    def resume(self) -> bool:
        """Goes on from the state file, if there is one; says whether there was.

        Raises:
            ValueError: the state file is damaged, or a memory that the run has written was changed or removed; nothing
                was changed, and the message names the file.
        """
        if not self.state_path.exists():
            return False
        try:
            tensors, manifest = load_tensors(
                self.state_path, kind=self.memories.kind, may_be_nan=("losses.", "baseline.")
            )
        except ValueError as error:
            raise ValueError(f"{error} Move {self.state_path} away, or leave --resume out, to start afresh.") from error
        try:
            self._take_over(tensors, manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._reader, self._baseline, self.first = None, None, 0
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{self.state_path} is no state of this run ({what}); move it away to start afresh. "
                "Nothing was changed."
            ) from error
        return True

    def _take_over(self, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        """Takes a state over, all of which is checked first; raises KeyError, TypeError, ValueError, AttributeError."""
        if manifest["key"] != self.key:
            raise ValueError("it belongs to another")
        first, n_texts = manifest[self.memories.position], len(self.texts)
        if type(first) is not int or first not in (*range(0, n_texts, self.memories.size), n_texts):
            raise ValueError(f"text {first!r} of {n_texts}")
        # States of batches were once without it.
        baseline_seconds = float(manifest["baseline_seconds"]) if self.settings.compare else 0.0
        seconds, undone = float(manifest["seconds"]), int(manifest["undone"])
        if not math.isfinite(seconds + baseline_seconds):
            raise ValueError("its times are not finite")
        failed = self.memories.check(first, manifest)
        losses = self._losses_until(min(first + self.memories.size, n_texts))
        for name, wanted in losses.items():
            if (found := tensors[name]).shape != wanted.shape or found.dtype != wanted.dtype:
                raise ValueError(f"{name} should be {tuple(wanted.shape)} {wanted.dtype}")
        state = {k.removeprefix("reader."): t for k, t in tensors.items() if k.startswith("reader.")}
        self._take_reader(first, state)
        in_the_middle = self._reader is not None
        self.memories.go_on(first, manifest, None if in_the_middle else state)
        self.first, self.seconds, self.baseline_seconds, self.undone = first, seconds, baseline_seconds, undone
        self.failed = failed
        for name, mine in losses.items():
            mine.copy_(tensors[name])

    def _take_reader(self, first: int, state: dict[str, Tensor]) -> None:
        """Opens the group that was being read, if one was, and restores its reader."""
        self._reader = self._baseline = None
        if "position" not in state or first >= len(self.texts):
            return
        self.first = first
        reader = self._open()
        longest = max(self.texts[i].ids.numel() for i in self.group)
        position, (_, chunk) = state["position"], self.settings.read.sizes(self.backbone.model)
        if position.numel() != 1 or not 0 <= float(position) < longest + chunk:
            raise ValueError(f"position {position.tolist()} of {longest}")
        reader.load_state(state)
        if self._baseline is not None:
            # It always stands at the end of the chunk of its own that the memory's reader is in.
            own = self._baseline.chunk_tokens
            self._baseline.position = -(-reader.position // own) * own

    # ---------------------------------------------------------------- results

    def scores(self) -> list[Score]:
        """The score of each text that was not left out, with memory, as far as it is read."""
        return self._scores(self.losses)

    def baseline_scores(self) -> list[Score]:
        """The same without memory; empty unless compared."""
        return self._scores(self.baseline_losses) if self.settings.compare else []

    def _read(self) -> list[int]:
        return [i for i in range(len(self.texts)) if i not in self.failed]

    def _scores(self, losses: list[Tensor]) -> list[Score]:
        return [Score.of(losses[i], self.texts[i].n_bytes) for i in self._read()]

    def results(self) -> dict[str, Any]:
        """Figures of all texts together and of each, and where the memory is; texts left out only under `failed`."""
        result = self._figures(self.scores(), self.memories.n_parameters, self.seconds)
        if self.settings.compare:
            result["baseline"] = self._figures(self.baseline_scores(), 0, self.baseline_seconds)
        failed = [{"name": self.texts[i].name, "error": self.failure(i)} for i in sorted(self.failed)]
        return result | self.memories.results(failed) | {"undone_writes": self.undone}

    def _figures(self, scores: list[Score], n_parameters: int, seconds: float) -> dict[str, Any]:
        """Of all texts together, and under `documents` of each; with memory where there are parameters of one."""
        documents = [
            {"name": self.texts[i].name} | (self.memories.about(i) if n_parameters else {}) | brief(score)
            for i, score in zip(self._read(), scores, strict=True)
        ]
        total = figures(sum_scores(scores), n_parameters, self.backbone.n_parameters, seconds)
        return total | {"documents": documents}

    def failure(self, i: int) -> str:
        """Why text `i` was left out, and what to do about it."""
        _, chunk = self.settings.read.sizes(self.backbone.model)
        start, length = self.failed[i], self.texts[i].ids.numel()
        return (
            f"the loss on tokens {start}..{min(start + chunk, length)} is not finite, and not because of the memory's "
            "last write; check the backbone in its dtype on this text (try float32)"
        )
