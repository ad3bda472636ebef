"""A resumable run: read texts one after another into one memory, and leave a file.

    run = Run(backbone, texts, "book.safetensors", settings)
    for progress in run:
        ...
    run.finish()

A run that was stopped, in whatever way, goes on from its state file; the memory that it then leaves is bit for bit
the one that it would have left undisturbed. The state file lies beside the output and is named after everything that
the result depends on, so that a run never continues another's.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locas._version import __version__
from locas.backbone import Backbone
from locas.grow import freeze, grow
from locas.initialise import InitSettings
from locas.memory import Memory, create, load, record_reading
from locas.metrics import Score
from locas.sites import find_sites, fingerprint
from locas.store import load_tensors, save_tensors
from locas.stream import ChunkRecord, Reader, ReadSettings
from locas.write import WriteSettings

STATE_FORMAT = "locas-run"


@dataclass(frozen=True)
class Text:
    """A tokenized text. ids: [n] int64; n_bytes: UTF-8 bytes that they cover; sha256: of the whole text."""

    name: str
    ids: Tensor
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class RunSettings:
    """Everything that a run's result depends on, besides backbone and texts.

    Attributes:
        init: how the memory is made.
        read: how texts are read.
        layers: "all", "upper-half", or layer numbers such as "3,4,5" or "2-5".
        init_tokens: tokens of the first text whose activations choose the basis; None: its first chunk. With more,
            the choice sees text before it is scored, so the figures are no longer strictly online.
        start_from: a memory file to go on with, in place of a fresh memory.
        grow: slots that it gets on each layer before reading, made from the first text as `init` says; 0: none.
        freeze: the slots that it has already stay as they are.
        compare: also score every text without memory.
    """

    init: InitSettings = field(default_factory=InitSettings)
    read: ReadSettings = field(default_factory=ReadSettings)
    layers: str = "all"
    init_tokens: int | None = None
    start_from: str | None = None
    grow: int = 0
    freeze: bool = False
    compare: bool = False

    def __post_init__(self) -> None:
        if self.grow < 0:
            raise ValueError(f"a memory grows by 1 slot or more (0: not at all); got {self.grow}")
        if self.start_from is None and (self.grow or self.freeze):
            raise ValueError("only a memory that exists can grow or be frozen: name it (--memory FILE)")


# "default" is what our own sweep on the development books shows to be best (LOG.md); "paper" is what
# arXiv:2602.05085 states, and AdamW where it is silent.
PRESETS: dict[str, RunSettings] = {
    "default": RunSettings(),
    "paper": RunSettings(
        init=InitSettings(tau_scale=1.0),
        read=ReadSettings(write=WriteSettings(rule="adamw", lr=4e-3, boost=1.0, floor=1.0)),
    ),
}


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a chunk.

    Attributes:
        document: index of the text.
        record: what reading the chunk showed.
        score: of this text so far, with memory.
        baseline: of this text so far, without, where compared.
        tokens: read in all texts so far, of `total_tokens`.
    """

    document: int
    record: ChunkRecord
    score: Score
    baseline: Score | None
    tokens: int


class Run:
    """Reads texts into a memory; see the module's text.

    Args:
        backbone: model and tokenizer.
        texts: in reading order.
        output: where the memory file goes.
        settings: everything else that the result depends on.

    Raises:
        ValueError: settings that do not fit the backbone or one another.
        OSError: the output's folder does not exist or cannot be written.
    """

    def __init__(self, backbone: Backbone, texts: Sequence[Text], output: str | Path, settings: RunSettings) -> None:
        settings = resolved(settings, backbone)
        self.backbone, self.texts, self.output, self.settings = backbone, list(texts), Path(output), settings
        if not self.output.parent.is_dir():
            raise FileNotFoundError(f"the folder {self.output.parent} does not exist; create it, or choose another -o")
        if self.output.is_dir():
            raise ValueError(
                f"{self.output} is a folder; give the name of the memory file, e.g. {self.output}/m.safetensors"
            )
        check_writable(self.output.parent)
        if self.output.is_file() and not may_be_replaced(self.output):
            raise ValueError(f"{self.output} is not a memory and would be overwritten; delete it, or choose another -o")
        if not self.texts:
            raise ValueError("there is no text to read")
        self.memory = self._fresh_memory()
        self.document = 0
        self.seconds = 0.0
        self.baseline_seconds = 0.0
        self.losses = [torch.full((t.ids.numel(),), torch.nan) for t in self.texts]
        self.baseline_losses = (
            [torch.full_like(losses, torch.nan) for losses in self.losses] if settings.compare else []
        )
        self.undone = 0
        self._reader: Reader | None = None
        self._baseline: Reader | None = None
        self.key = run_key(backbone, self.texts, settings)
        self.state_path = self.output.with_name(f"{self.output.name}.{self.key[:8]}.partial")

    def _fresh_memory(self) -> Memory:
        ids = first_ids(self.texts[0], self.backbone, self.settings)
        if self.settings.start_from is not None:
            return self._continued(self.settings.start_from, ids)
        return fresh_memory(ids, self.backbone, self.settings)

    def _continued(self, path: str, ids: Tensor) -> Memory:
        settings, backbone = self.settings, self.backbone
        memory = load(path, backbone.model, tokenizer_sha256=backbone.tokenizer_sha256)
        if settings.freeze:
            memory = freeze(memory)
        if settings.grow:
            memory = grow(memory, backbone.model, ids, settings.grow, settings.init, start_id=backbone.start_id)
        frozen = memory.bank.frozen_rows()
        if frozen is not None and bool(frozen.all()):
            raise ValueError(f"every slot of {path} is frozen: nothing can be learnt; add slots (--grow 32)")
        return memory

    # ---------------------------------------------------------------- reading

    @property
    def total_tokens(self) -> int:
        return sum(t.ids.numel() for t in self.texts)

    @property
    def tokens(self) -> int:
        """Read so far."""
        here = self._reader.position if self._reader is not None else 0
        done = sum(t.ids.numel() for t in self.texts[: self.document])
        return done + (min(here, self.texts[self.document].ids.numel()) if self.document < len(self.texts) else 0)

    def __iter__(self) -> Iterator[Progress]:
        while self.document < len(self.texts):
            if self._reader is None:
                self._open()
            assert self._reader is not None
            while not self._reader.done:
                yield self._next()
            text = self.texts[self.document]
            record_reading(self.memory, text.ids, self.settings.read, name=text.name, text_sha256=text.sha256)
            self._reader = self._baseline = None
            self.document += 1

    def _open(self) -> None:
        ids, start_id = self.texts[self.document].ids, self.backbone.start_id
        self._reader = Reader(self.backbone.model, self.memory.bank, [ids], self.settings.read, start_id=start_id)
        if self.settings.compare:
            # Every window recomputed, whatever the memory's reader does: that is what it is compared with.
            plain = replace(self.settings.read, reuse=False)
            self._baseline = Reader(self.backbone.model, None, [ids], plain, start_id=start_id)

    def _next(self) -> Progress:
        assert self._reader is not None
        baseline = None
        if self._baseline is not None:
            (plain,) = self._baseline.next_chunk()
            assert plain is not None
            self.baseline_losses[self.document][plain.start : plain.stop] = plain.nll
            self.baseline_seconds += plain.seconds
            baseline = self._score(self.baseline_losses[self.document])
        (record,) = self._reader.next_chunk()
        assert record is not None
        self.losses[self.document][record.start : record.stop] = record.nll
        self.seconds += record.seconds
        self.undone += record.undone
        return Progress(self.document, record, self._score(self.losses[self.document]), baseline, self.tokens)

    def _score(self, losses: Tensor) -> Score:
        return Score.of(losses, self.texts[self.document].n_bytes)

    def finish(self) -> None:
        """Writes the memory file, then removes the state file."""
        self.memory.save(self.output)
        self.state_path.unlink(missing_ok=True)

    # ---------------------------------------------------------------- stopping and going on

    def save_state(self) -> None:
        """Writes down everything that the rest of the run needs, atomically."""
        tensors = {f"losses.{i}": losses for i, losses in enumerate(self.losses[: self.document + 1])}
        tensors |= {f"baseline.{i}": losses for i, losses in enumerate(self.baseline_losses[: self.document + 1])}
        if self._reader is not None:
            tensors |= {f"reader.{name}": t for name, t in self._reader.state().items()}
        else:
            tensors |= {"reader.rows": self.memory.bank.rows, "reader.tau": self.memory.bank.tau}
        manifest = {
            "format": STATE_FORMAT,
            "key": self.key,
            "document": self.document,
            "tokens": self.tokens,
            "total_tokens": self.total_tokens,
            "seconds": self.seconds,
            "baseline_seconds": self.baseline_seconds,
            "undone": self.undone,
            "settings": asdict(self.settings),
            "backbone": self.backbone.name,
        }
        save_tensors(self.state_path, tensors, manifest)

    def resume(self) -> bool:
        """Goes on from the state file, if there is one; says whether there was.

        Raises:
            ValueError: the state file is damaged; nothing was changed, and the message names the file.
        """
        if not self.state_path.exists():
            return False
        tensors, manifest = load_tensors(self.state_path, kind=STATE_FORMAT, may_be_nan=("losses.", "baseline."))
        try:
            self._check_state(tensors, manifest)
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{self.state_path} is no state of this run ({what}); move it away to start afresh. "
                "Nothing was changed."
            ) from error
        self.document = int(manifest["document"])
        self.seconds, self.baseline_seconds = float(manifest["seconds"]), float(manifest["baseline_seconds"])
        self.undone = int(manifest["undone"])
        for name, stored in (("losses", self.losses), ("baseline", self.baseline_losses)):
            for i, losses in enumerate(stored):
                if f"{name}.{i}" in tensors:
                    losses.copy_(tensors[f"{name}.{i}"])
        for text in self.texts[: self.document]:
            record_reading(self.memory, text.ids, self.settings.read, name=text.name, text_sha256=text.sha256)
        state = {k.removeprefix("reader."): t for k, t in tensors.items() if k.startswith("reader.")}
        if "position" in state:
            self._open()
            assert self._reader is not None
            self._reader.load_state(state)
            if self._baseline is not None:
                self._baseline.position = self._reader.position
        else:
            self.memory.bank.rows.copy_(state["rows"])
            self.memory.bank.tau.copy_(state["tau"])
        return True

    def _check_state(self, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        """Raises ValueError, KeyError or TypeError unless `resume` can take all of it over."""
        if manifest["key"] != self.key:
            raise ValueError("it belongs to another")
        document = manifest["document"]
        if type(document) is not int or not 0 <= document <= len(self.texts):
            raise ValueError(f"document {document!r} of {len(self.texts)}")
        if not math.isfinite(float(manifest["seconds"]) + float(manifest["baseline_seconds"])):
            raise ValueError("its times are not finite")
        int(manifest["undone"])
        expected = {f"losses.{i}": losses for i, losses in enumerate(self.losses[: document + 1])}
        expected |= {f"baseline.{i}": losses for i, losses in enumerate(self.baseline_losses[: document + 1])}
        state = {"rows": self.memory.bank.rows, "tau": self.memory.bank.tau}
        if "reader.position" in tensors and document < len(self.texts):
            ids = self.texts[document].ids
            state = Reader(self.backbone.model, self.memory.bank, [ids], self.settings.read).state()
            if (
                not 0
                <= float(tensors["reader.position"])
                < ids.numel() + self.settings.read.sizes(self.backbone.model)[1]
            ):
                raise ValueError(f"position {float(tensors['reader.position'])} of {ids.numel()}")
        expected |= {f"reader.{name}": tensor for name, tensor in state.items()}
        for name, tensor in expected.items():
            found = tensors[name]
            if found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise ValueError(f"{name} should be {tuple(tensor.shape)} {tensor.dtype}")

    # ---------------------------------------------------------------- results

    def scores(self) -> list[Score]:
        """Each text's score, with memory."""
        return [Score.of(x, t.n_bytes) for x, t in zip(self.losses, self.texts, strict=True)]

    def baseline_scores(self) -> list[Score]:
        """Each text's score without memory; empty unless compared."""
        return [
            Score.of(x, t.n_bytes) for x, t in zip(self.baseline_losses, self.texts, strict=bool(self.baseline_losses))
        ]

    def results(self) -> dict[str, Any]:
        """Figures of all texts together, and of each."""
        result = figures(
            sum_scores(self.scores()), self.memory.n_parameters, self.backbone.n_parameters, self.seconds
        ) | {"documents": [{"name": t.name, **brief(s)} for t, s in zip(self.texts, self.scores(), strict=True)]}
        if self.settings.compare:
            plain = self.baseline_scores()
            baseline = figures(sum_scores(plain), 0, self.backbone.n_parameters, self.baseline_seconds)
            documents = [{"name": t.name, **brief(s)} for t, s in zip(self.texts, plain, strict=True)]
            result["baseline"] = baseline | {"documents": documents}
        return result


def resolved(settings: RunSettings, backbone: Backbone) -> RunSettings:
    """The same with what the backbone's tokenizer decides filled in."""
    if settings.read.start_in_every_window is not None:
        return settings
    return replace(settings, read=replace(settings.read, start_in_every_window=backbone.start_in_every_window))


def first_ids(text: Text, backbone: Backbone, settings: RunSettings) -> Tensor:
    """[n] int64, the tokens whose activations choose a memory's basis.

    Raises:
        ValueError: sizes that do not fit the backbone, or no token asked for.
    """
    _, chunk = settings.read.sizes(backbone.model)
    if settings.init_tokens is not None and settings.init_tokens < 1:
        raise ValueError(f"init_tokens must be 1 or more; got {settings.init_tokens}")
    return text.ids[: settings.init_tokens or chunk]


def fresh_memory(ids: Tensor, backbone: Backbone, settings: RunSettings) -> Memory:
    """A memory as the settings say, its basis chosen by `ids` [n].

    Raises:
        ValueError: settings that do not fit the backbone.
    """
    return create(
        backbone.model,
        ids,
        settings.init,
        layers=parse_layers(settings.layers, len(find_sites(backbone.model))),
        start_id=backbone.start_id,
        name=backbone.name,
        tokenizer_sha256=backbone.tokenizer_sha256,
    )


def run_key(backbone: Backbone, texts: Sequence[Text], settings: RunSettings, **more: Any) -> str:
    """Hash of everything that a run's result depends on; `more`: what does besides."""
    start = settings.start_from
    what = more | {
        "library": __version__,
        "settings": asdict(settings),
        "start_from": hashlib.sha256(Path(start).read_bytes()).hexdigest() if start else None,
        "sizes": settings.read.sizes(backbone.model),
        "start_id": backbone.start_id,
        "texts": [[t.name, t.sha256, hashlib.sha256(t.ids.numpy().tobytes()).hexdigest()] for t in texts],
        "backbone": fingerprint(backbone.model),
        "dtype": str(next(backbone.model.parameters()).dtype),
        "tokenizer": backbone.tokenizer_sha256,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def sum_scores(scores: Sequence[Score]) -> Score:
    """The score of several texts taken as one."""
    total = Score(0, 0, 0.0)
    for score in scores:
        total = total + score
    return total


def figures(score: Score, memory_parameters: int, backbone_parameters: int, seconds: float) -> dict[str, Any]:
    """The figures that every command prints with --json; `nll` is the sum over all tokens, in nats."""
    return brief(score) | {
        "memory_parameters": memory_parameters,
        "backbone_parameters": backbone_parameters,
        "seconds": round(seconds, 3),
    }


def brief(score: Score) -> dict[str, Any]:
    """The figures of a score alone; `nll` is the sum over all tokens, in nats."""
    return {
        "tokens": score.tokens,
        "bytes": score.n_bytes,
        "nll": score.nll,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }


def parse_layers(text: str, n_layers: int) -> list[int] | None:
    """Layer numbers from "all" (None), "upper-half", or a list such as "0,3-5".

    Raises:
        ValueError: none of these, or a layer that the model does not have.
    """
    if text == "all":
        return None
    if text == "upper-half":
        return list(range(n_layers // 2, n_layers))
    try:
        parts = [part.partition("-") for part in text.split(",")]
        spans = [(int(first), int(last if dash else first)) for first, dash, last in parts]
        if any(first > last for first, last in spans):
            raise ValueError("a range that runs backwards")
    except ValueError as error:
        raise ValueError(
            f'layers {text!r} are not understood; give "all", "upper-half", or numbers such as 0,3-5'
        ) from error
    if max(last for _, last in spans) >= n_layers:
        raise ValueError(f"layers {text!r} do not fit this backbone, which has layers 0..{n_layers - 1}")
    return sorted({layer for first, last in spans for layer in range(first, last + 1)})


def check_writable(folder: Path) -> None:
    """Finds out before hours of reading, not after."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"the folder {folder} cannot be written ({error.strerror}); choose another -o") from error


def may_be_replaced(path: Path) -> bool:
    """Whether an old output is empty or begins like a safetensors file: a text that was named by mistake does not."""
    with path.open("rb") as file:
        head = file.read(9)
    return not head or head[8:] == b"{"
