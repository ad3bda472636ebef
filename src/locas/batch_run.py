"""A resumable run over many texts, each into a memory of its own, several side by side.

    run = BatchRun(backbone, texts, "memories", settings, size=16)
    for progress in run:
        ...
    run.finish()

Texts are read in groups of `size`, in order, each group in one bank; its memories are saved when all of it is read.
Every memory is the one that reading its text alone leaves, up to the rounding of sums that a batch adds up in another
order. A text on which the backbone's loss is not finite is dropped, and the others go on.
With `reuse` one thing is shared: where a write is undone, all texts of the group recompute their context once.

Like `locas.run.Run`, a run that was stopped goes on from its state file, and then leaves bit for bit the files that it
would have left undisturbed. The file lies in the folder and is named after everything that the results depend on.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locas.backbone import Backbone
from locas.bank import Bank
from locas.memory import Memory, record_reading
from locas.metrics import Score
from locas.run import (
    Progress,
    RunSettings,
    Text,
    brief,
    check_writable,
    figures,
    first_ids,
    fresh_memory,
    may_be_replaced,
    resolved,
    run_key,
    sum_scores,
)
from locas.store import load_tensors, save_tensors
from locas.stream import ChunkRecord, Reader

STATE_FORMAT = "locas-batch-run"
_LONGEST_NAME = 200  # bytes; file systems take 255, of which a temporary file's name needs some


class BatchRun:
    """Reads each text into a memory of its own; see the module's text.

    Args:
        backbone: model and tokenizer.
        texts: in reading order.
        folder: where the memory files go; made where it does not exist.
        settings: everything else that the results depend on; without `start_from` and `compare`.
        size: so many texts side by side.

    Attributes:
        outputs: each text's memory file.
        failed: {text: first token of the chunk whose loss was not finite}; they get no memory file.

    Raises:
        ValueError: settings that do not fit the backbone or one another, or a file in the way.
        OSError: the folder cannot be made or written.
    """

    def __init__(
        self, backbone: Backbone, texts: Sequence[Text], folder: str | Path, settings: RunSettings, size: int
    ) -> None:
        self.backbone, self.texts, self.folder, self.size = backbone, list(texts), Path(folder), size
        self.settings = settings = resolved(settings, backbone)
        self._check(settings)
        names = unique_names([t.name for t in self.texts])
        self.outputs = [self.folder / f"{name}.safetensors" for name in names]
        self._check_folder()
        # What does not fit shows now, not after the first group: settings, or a text too short for them.
        shortest = min(self.texts, key=lambda text: text.ids.numel())
        self.n_parameters = fresh_memory(first_ids(shortest, backbone, settings), backbone, settings).n_parameters
        self.folder.mkdir(parents=True, exist_ok=True)
        check_writable(self.folder)
        self.first = 0  # text of the group that is being read, or comes next
        self.failed: dict[int, int] = {}
        self.written: dict[int, str] = {}  # sha256 of the memory files of the groups before
        self.losses = [torch.full((t.ids.numel(),), torch.nan) for t in self.texts]
        self.seconds, self.undone = 0.0, 0
        self._memories: list[Memory] = []
        self._reader: Reader | None = None
        self.key = run_key(backbone, self.texts, settings, batch=size)
        self.state_path = self.folder / f"batch.{self.key[:8]}.partial"

    def _check(self, settings: RunSettings) -> None:
        if self.size < 1:
            raise ValueError(f"a batch has 1 text or more side by side; got {self.size}")
        if settings.start_from is not None:
            raise ValueError("in a batch every text gets a fresh memory; leave --memory, --grow and --freeze out")
        if settings.compare:
            raise ValueError(
                "a batch is not compared with reading without memory; use `locas score TEXT --memory FILE` afterwards"
            )
        if not self.texts:
            raise ValueError("there is no text to read")
        for text in self.texts:
            if text.ids.numel() == 0:
                raise ValueError(f"{text.name} has no tokens; leave it out")

    def _check_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; a batch of memories goes into a folder: choose another -o")
        for path in self.outputs:
            if path.exists() and not (path.is_file() and may_be_replaced(path)):
                raise ValueError(f"{path} is not a memory and would be overwritten; delete it, or choose another -o")

    # ---------------------------------------------------------------- reading

    @property
    def group(self) -> range:
        """The texts that are read side by side now."""
        return range(self.first, min(self.first + self.size, len(self.texts)))

    @property
    def total_tokens(self) -> int:
        return sum(t.ids.numel() for t in self.texts)

    @property
    def tokens(self) -> int:
        """Read so far; dropped texts count as read."""
        done = sum(t.ids.numel() for t in self.texts[: self.first])
        if self._reader is None:
            return done
        position, dropped = self._reader.position, self._reader.failed
        lengths = [self.texts[i].ids.numel() for i in self.group]
        return done + sum(n if row in dropped else min(position, n) for row, n in enumerate(lengths))

    def __iter__(self) -> Iterator[Progress]:
        while self.first < len(self.texts):
            if self._reader is None:
                self._open()
            assert self._reader is not None
            while not self._reader.done:
                records = [record for record in self._next(self._reader) if record is not None]
                if records:
                    slowest = min(records, key=lambda record: record.step_scale)
                    here = sum_scores([self._score(i) for i in self.group if i not in self.failed])
                    yield Progress(self.first, slowest, here, None, self.tokens)
            self._close(self._reader)

    def _open(self) -> None:
        """A fresh memory for each text of the group, stacked in one bank."""
        texts = [self.texts[i] for i in self.group]
        ids = [first_ids(text, self.backbone, self.settings) for text in texts]
        self._memories = [fresh_memory(i, self.backbone, self.settings) for i in ids]
        self._reader = Reader(
            self.backbone.model,
            Bank.stack([memory.bank for memory in self._memories]),
            [text.ids for text in texts],
            self.settings.read,
            start_id=self.backbone.start_id,
            on_failure="drop",
        )

    def _next(self, reader: Reader) -> list[ChunkRecord | None]:
        records = reader.next_chunk()
        self.failed |= {self.first + row: start for row, start in reader.failed.items()}
        for i, record in zip(self.group, records, strict=True):
            if record is not None:
                self.losses[i][record.start : record.stop] = record.nll
                self.undone += record.undone
        self.seconds += next((record.seconds for record in records if record is not None), 0.0)
        return records

    def _close(self, reader: Reader) -> None:
        """Saves the group's memories; the next group then begins."""
        assert reader.bank is not None
        for row, (i, memory) in enumerate(zip(self.group, self._memories, strict=True)):
            if i in self.failed:
                continue
            text = self.texts[i]
            memory.bank = reader.bank.select(row)
            record_reading(memory, text.ids, self.settings.read, name=text.name, text_sha256=text.sha256)
            memory.save(self.outputs[i])
            self.written[i] = _sha256(self.outputs[i])
        self.first = self.group.stop
        self._reader, self._memories = None, []

    def finish(self) -> None:
        """Removes the state file; the memories lie there already."""
        self.state_path.unlink(missing_ok=True)

    # ---------------------------------------------------------------- stopping and going on

    def save_state(self) -> None:
        """Writes down everything that the rest of the run needs, atomically."""
        tensors = {f"losses.{i}": losses for i, losses in enumerate(self.losses[: self.group.stop])}
        if self._reader is not None:
            tensors |= {f"reader.{name}": t for name, t in self._reader.state().items()}
        manifest = {
            "format": STATE_FORMAT,
            "key": self.key,
            "first": self.first,
            "tokens": self.tokens,
            "total_tokens": self.total_tokens,
            "seconds": self.seconds,
            "undone": self.undone,
            "failed": {str(i): start for i, start in self.failed.items()},
            "written": {str(i): digest for i, digest in self.written.items()},
            "settings": asdict(self.settings),
            "backbone": self.backbone.name,
        }
        save_tensors(self.state_path, tensors, manifest)

    def resume(self) -> bool:
        """Goes on from the state file, if there is one; says whether there was.

        Raises:
            ValueError: the state file is damaged, or a memory that the run has written was changed or removed;
                nothing was changed.
        """
        if not self.state_path.exists():
            return False
        tensors, manifest = load_tensors(self.state_path, kind=STATE_FORMAT, may_be_nan=("losses.",))
        try:
            self._load_state(tensors, manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._reader, self._memories, self.first = None, [], 0
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{self.state_path} is no state of this run ({what}); move it away to start afresh. "
                "Nothing was changed."
            ) from error
        return True

    def _load_state(self, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        """Takes a state over once all of it is checked; raises KeyError, TypeError, ValueError or AttributeError."""
        if manifest["key"] != self.key:
            raise ValueError("it belongs to another")
        first = manifest["first"]
        if type(first) is not int or first not in (*range(0, len(self.texts), self.size), len(self.texts)):
            raise ValueError(f"text {first!r} of {len(self.texts)}")
        seconds, undone = float(manifest["seconds"]), int(manifest["undone"])
        if not math.isfinite(seconds):
            raise ValueError("its times are not finite")
        failed = {int(i): int(start) for i, start in manifest["failed"].items()}
        written = {int(i): str(digest) for i, digest in manifest["written"].items()}
        if sorted([*written, *(i for i in failed if i < first)]) != list(range(first)):
            raise ValueError("it does not say what became of every text")
        stop = min(first + self.size, len(self.texts))
        if any(i >= stop for i in failed):
            raise ValueError("texts are dropped that were not read yet")
        self._check_written(written)
        for i, losses in enumerate(self.losses[:stop]):
            found = tensors[f"losses.{i}"]
            if found.shape != losses.shape or found.dtype != losses.dtype:
                raise ValueError(f"losses.{i} should be {tuple(losses.shape)} {losses.dtype}")
        self.first = first
        state = {k.removeprefix("reader."): t for k, t in tensors.items() if k.startswith("reader.")}
        if state and first < len(self.texts):
            self._open()
            assert self._reader is not None
            self._check_position(state, stop)
            self._reader.load_state(state)
        self.seconds, self.undone, self.failed, self.written = seconds, undone, failed, written
        for i, losses in enumerate(self.losses[:stop]):
            losses.copy_(tensors[f"losses.{i}"])

    def _check_position(self, state: dict[str, Tensor], stop: int) -> None:
        longest = max(self.texts[i].ids.numel() for i in range(self.first, stop))
        _, chunk = self.settings.read.sizes(self.backbone.model)
        position = state["position"]
        if position.numel() != 1 or not 0 <= float(position) < longest + chunk:
            raise ValueError(f"position {position.tolist()} of {longest}")

    def _check_written(self, written: dict[int, str]) -> None:
        for i, digest in written.items():
            if not self.outputs[i].is_file() or _sha256(self.outputs[i]) != digest:
                raise ValueError(f"{self.outputs[i]}, which it has written, was changed or removed since")

    # ---------------------------------------------------------------- results

    def scores(self) -> list[Score]:
        """The score of each text that was not dropped, as far as it is read."""
        return [self._score(i) for i in range(len(self.texts)) if i not in self.failed]

    def _score(self, i: int) -> Score:
        return Score.of(self.losses[i], self.texts[i].n_bytes)

    def results(self) -> dict[str, Any]:
        """Figures of all texts together, and of each with its memory; dropped texts only under `failed`."""
        done = [i for i in range(len(self.texts)) if i not in self.failed]
        total = figures(sum_scores(self.scores()), self.n_parameters, self.backbone.n_parameters, self.seconds)
        documents = [
            {"name": self.texts[i].name, "memory": str(self.outputs[i]), **brief(self._score(i))} for i in done
        ]
        failed = [{"name": self.texts[i].name, "error": self.failure(i)} for i in sorted(self.failed)]
        return total | {"documents": documents, "failed": failed, "undone_writes": self.undone}

    def failure(self, i: int) -> str:
        """Why text `i` was dropped, and what to do about it."""
        _, chunk = self.settings.read.sizes(self.backbone.model)
        start, length = self.failed[i], self.texts[i].ids.numel()
        return (
            f"the loss on tokens {start}..{min(start + chunk, length)} is not finite, and not because of the memory's "
            "last write; check the backbone in its dtype on this text (try float32)"
        )


def unique_names(paths: Sequence[str]) -> list[str]:
    """File names without ending, one for each path: "in/a.txt" is "a", the next a "a-2".

    Unlike in more than upper and lower case, so that they are different files on every system.
    """
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        stem = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "", Path(path).stem).strip(". ") or "text"
        while len(os.fsencode(stem)) > _LONGEST_NAME:
            stem = stem[:-1]
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
