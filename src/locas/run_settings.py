"""What a run's result depends on: texts, settings, backbone; and the hash of it all that names its state file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from locas._version import __version__
from locas.backbone import Backbone
from locas.initialise import InitSettings
from locas.memory import Memory, create
from locas.sites import find_sites, fingerprint
from locas.stream import ReadSettings
from locas.write import WriteSettings


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
        thaw: slots that are frozen in its file learn again.
        cycle: slots that NL-SVD leaves whenever a step-wise Locas-MLP is full (`locas.cycle`); 0: no such cycle.
        compare: also score every text without memory.
    """

    init: InitSettings = field(default_factory=InitSettings)
    read: ReadSettings = field(default_factory=ReadSettings)
    layers: str = "all"
    init_tokens: int | None = None
    start_from: str | None = None
    grow: int = 0
    freeze: bool = False
    thaw: bool = False
    cycle: int = 0
    compare: bool = False

    def __post_init__(self) -> None:
        if self.grow < 0:
            raise ValueError(f"a memory grows by 1 slot or more (0: not at all); got {self.grow}")
        if self.start_from is None and (self.grow or self.freeze or self.thaw):
            raise ValueError("only a memory that exists can grow, be frozen or be thawed: name it (--memory FILE)")
        if self.freeze and self.thaw:
            raise ValueError("to freeze a memory's slots and to thaw them exclude each other; leave one out")
        if self.cycle < 0:
            raise ValueError(f"the cycle leaves 1 slot or more (0: no cycle); got {self.cycle}")


# Settings that runs did not always have count where they are set, so that states from before are found.
_LATER = {"thaw": False, "cycle": 0}

# "default" is what our own sweeps on the development books show to be best (LOG.md); "paper" is what arXiv:2602.05085
# states, AdamW where it is silent, and every window recomputed.
PRESETS: dict[str, RunSettings] = {
    "default": RunSettings(
        read=ReadSettings(reuse=True, attention_gradient="values", write=WriteSettings(damping=0.1))
    ),
    "paper": RunSettings(
        init=InitSettings(init="paper", tau_scale=1.0),
        read=ReadSettings(write=WriteSettings(rule="adamw", lr=4e-3, floor=1.0)),
    ),
}


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


def fresh_memory(text: Text, backbone: Backbone, settings: RunSettings) -> Memory:
    """A memory as the settings say, its basis chosen by the text's first tokens.

    Raises:
        ValueError: settings that do not fit the backbone.
    """
    return create(
        backbone.model,
        first_ids(text, backbone, settings),
        settings.init,
        layers=parse_layers(settings.layers, len(find_sites(backbone.model))),
        start_id=backbone.start_id,
        name=backbone.name,
        tokenizer_sha256=backbone.tokenizer_sha256,
    )


def parse_layers(text: str, n_layers: int) -> list[int] | None:
    """Layer numbers from "all" (None), "upper-half", or a list such as "0,3-5".

    Raises:
        ValueError: none of these, or a layer that the model does not have.
    """
    if text == "all":
        return None
    if text == "upper-half":
        return list(range(n_layers // 2, n_layers))
    spans = layer_spans(text)
    if max(last for _, last in spans) >= n_layers:
        raise ValueError(f"layers {text!r} do not fit this backbone, which has layers 0..{n_layers - 1}")
    return sorted({layer for first, last in spans for layer in range(first, last + 1)})


def layer_spans(text: str) -> list[tuple[int, int]]:
    """(first, last) of each part of a list of layers such as "0,3-5"; "all" and "upper-half" have none.

    Raises:
        ValueError: it is none of these, whatever the model.
    """
    if text in ("all", "upper-half"):
        return []
    try:
        parts = [part.partition("-") for part in text.split(",")]
        spans = [(int(first), int(last if dash else first)) for first, dash, last in parts]
        if any(first > last for first, last in spans):
            raise ValueError("a range that runs backwards")
    except ValueError as error:
        raise ValueError(
            f'layers {text!r} are not understood; give "all", "upper-half", or numbers such as 0,3-5'
        ) from error
    return spans


def run_key(backbone: Backbone, texts: Sequence[Text], settings: RunSettings, **more: Any) -> str:
    """Hash of everything that a run's result depends on; `more`: what does besides."""
    start = settings.start_from
    said = {k: v for k, v in asdict(settings).items() if k not in _LATER or v != _LATER[k]}
    what = more | {
        "library": __version__,
        "settings": said,
        "start_from": hashlib.sha256(Path(start).read_bytes()).hexdigest() if start else None,
        "sizes": settings.read.sizes(backbone.model),
        "start_id": backbone.start_id,
        "texts": [[t.name, t.sha256, hashlib.sha256(t.ids.numpy().tobytes()).hexdigest()] for t in texts],
        "backbone": fingerprint(backbone.model),
        "dtype": str(next(backbone.model.parameters()).dtype),
        "tokenizer": backbone.tokenizer_sha256,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
