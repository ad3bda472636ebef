"""What a memory costs: gain on the book that was learnt, against change everywhere else.

    cell = measure(backbone, book, unrelated, config, ForgettingSettings())
    print(cell["points"][0]["gain"], cell["points"][0]["kl"])

A method reads a book's first tokens. Then it is frozen, and its gain is how much better than the backbone it predicts
the same book's later text (nats per token); its cost is KL(backbone || backbone + memory) on unrelated text, averaged
over tokens, and the change of bits per byte there. Neither is a number by itself: together, over ranks, step sizes and
the output scale at reading time, they are a frontier.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from locas.backbone import Backbone
from locas.evaluate.cells import Cells, identity, key_of
from locas.evaluate.comparison import BitExact, Comparison, can_scale, compare
from locas.evaluate.dialogue import parse_method
from locas.evaluate.learners import Learner, Option, Setup, make, resolve
from locas.evaluate.mmlu import Mmlu
from locas.stream import ReadSettings
from locas.text import Document


@dataclass(frozen=True)
class ForgettingSettings:
    """How much text is learnt, and how much is looked at afterwards.

    Attributes:
        later_tokens: of the book, right after what was learnt: on these the gain is measured.
        unrelated_tokens: of each unrelated text, from its middle on.
        scales: dials at reading time, on the output of a finished memory (or of LoRA's adapters): 1 is as learnt.
        seed: of the learners.
    """

    later_tokens: int = 8192
    unrelated_tokens: int = 4096
    scales: tuple[float, ...] = (1.0,)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("later_tokens", "unrelated_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more; got {getattr(self, name)}")
        if not self.scales or any(not (s >= 0 and math.isfinite(s)) for s in self.scales):
            raise ValueError(f"scales must be numbers of 0 or more; got {self.scales}")
        if len(set(self.scales)) != len(self.scales):
            raise ValueError(f"a scale is given twice: {self.scales}")


@dataclass(frozen=True)
class Config:
    """One method at one rank and step size. lr_factor: its learning rate in units of the method's own."""

    method: str
    learner: str
    options: tuple[tuple[str, Option], ...]
    rank: int | None
    lr_factor: float

    @property
    def label(self) -> str:
        rank = "" if self.rank is None else f" r{self.rank}"
        return f"{self.method}{rank}" + ("" if self.lr_factor == 1 else f" lr x{self.lr_factor:g}")


def configs(
    backbone: Backbone, methods: Sequence[str], ranks: Sequence[int], lr_factors: Sequence[float], read: ReadSettings
) -> list[tuple[Config, Setup]]:
    """Every method at every rank and step size; methods without a rank are taken once for all ranks.

    Raises:
        ValueError: an unknown method or option, or a configuration twice.
    """
    found = []
    for text in methods:
        method = parse_method(text)
        if method.learner is None or "+" in text:
            raise ValueError(f"{text!r} learns nothing; give methods such as locas, templora-tuned or dynamic")
        given = dict(method.options)
        own = resolve(method.learner, backbone, read, given)
        ranked = own.init is not None or (own.recipe is not None and own.recipe.trains == "lora")
        choices = ranks if ranked and "rank" not in given else [None]
        for rank, factor in product(choices, lr_factors):
            options = given | ({} if rank is None else {"rank": rank}) | _rate(own, factor)
            setup = resolve(method.learner, backbone, read, options)
            found.append((Config(text, method.learner, tuple(sorted(options.items())), setup.rank, factor), setup))
    labels = [c.label for c, _ in found]
    if len(set(labels)) != len(labels):
        raise ValueError(f"a configuration is given twice: {', '.join(labels)}")
    return found


def _rate(setup: Setup, factor: float) -> dict[str, Option]:
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"a step size must be a positive multiple of the method's own; got {factor}")
    if setup.recipe is None and setup.init is None:
        raise ValueError(f"{setup.name} learns nothing; give methods such as locas, templora-tuned or dynamic")
    own = setup.recipe.lr if setup.recipe is not None else setup.read.write.lr
    return {} if factor == 1 else {"lr": own * factor}


# -------------------------------------------------------------------- texts


@dataclass(frozen=True)
class Learnt:
    """A book: ids [n] of which the first `stop` are learnt and the rest looked at."""

    name: str
    ids: Tensor
    stop: int
    sha256: str


@dataclass(frozen=True)
class Unrelated:
    """Text from the middle of a document. ids: [n]; n_bytes: UTF-8 bytes that they cover."""

    name: str
    ids: Tensor
    n_bytes: int
    sha256: str


def book(backbone: Backbone, document: Document, max_tokens: int | None, settings: ForgettingSettings) -> Learnt:
    """The book's first `max_tokens` to learn (None: all but the last `later_tokens`), then those to look at.

    Raises:
        ValueError: the book is too short to have later text.
    """
    ids, _ = backbone.encode(document.text)
    stop = ids.numel() - settings.later_tokens
    if max_tokens is not None:
        stop = min(stop, max_tokens)
    if stop < 1:
        raise ValueError(
            f"{document.name} has {ids.numel()} tokens: too few to learn some and to look at {settings.later_tokens} "
            "later ones; use fewer with --later-tokens, or a longer book"
        )
    return Learnt(document.name, ids[: stop + settings.later_tokens], stop, document.sha256)


def unrelated_text(backbone: Backbone, document: Document, settings: ForgettingSettings) -> Unrelated:
    """Up to `unrelated_tokens` from the first white space behind the document's middle."""
    middle = len(document.text) // 2
    start = next((i for i in range(middle, len(document.text)) if document.text[i].isspace()), 0)
    text = document.text[start:].strip() or document.text
    ids, n_bytes = backbone.encode(text, settings.unrelated_tokens)
    return Unrelated(document.name, ids, n_bytes, document.sha256)


# -------------------------------------------------------------------- running


def run(
    backbone: Backbone,
    books: Sequence[Learnt],
    unrelated: Sequence[Unrelated],
    chosen: Sequence[tuple[Config, Setup]],
    read: ReadSettings,
    settings: ForgettingSettings,
    cells: Cells,
    *,
    mmlu: Mmlu | None = None,
    say: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measures every configuration on every book; what `cells` already has is not done again.

    Args:
        backbone: model and tokenizer; unchanged afterwards, which every measurement checks.
        books: to learn, each by a fresh learner.
        unrelated: to look at; a text that is the book itself is left out there.
        chosen: see `configs`.
        read: window, chunk and write rule, as given to `configs`.
        settings: how much is looked at.
        cells: where results are kept.
        mmlu: questions to ask before, and after learning at each method's own step size.
        say: told what happens.
        on_progress: called with how many books times configurations are done, and of how many.

    Returns:
        {"rows": one for each configuration, book and scale, see `measure`, "failed": configurations that diverged,
        "mmlu": the backbone's own accuracy, and which questions were asked, or None}

    Raises:
        ValueError: two books, or two unrelated texts, of one name.
        RuntimeError: see `measure`.
    """
    for names in ([b.name for b in books], [u.name for u in unrelated]):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two texts are called {twice[0]}; rename one, or give the folder that holds both")
    who = identity(backbone)
    result: dict[str, Any] = {"rows": [], "failed": [], "mmlu": None}
    if mmlu is not None:
        before = cells.get(key_of(what="mmlu", backbone=who, mmlu=mmlu.key), lambda: mmlu(backbone))
        result["mmlu"] = before | {"questions_sha256": mmlu.questions_sha256}
    for number, (learnt, (config, setup)) in enumerate(product(books, chosen), 1):
        others = [u for u in unrelated if u.sha256 != learnt.sha256]
        asked = mmlu if config.lr_factor == 1 else None
        key = key_of(
            what="forgetting",
            backbone=who,
            book=[learnt.sha256, learnt.stop, learnt.ids.numel()],
            unrelated=[[u.name, u.sha256, u.ids.numel()] for u in others],
            setup=setup.record(),
            compared=resolve("truncation", backbone, read).record(),
            settings=asdict(settings),
            mmlu=asked.key if asked is not None else None,
        )
        if key not in cells:
            say(f"{learnt.name}: {config.label}")
            cells.put(key, measure(backbone, learnt, others, config, read, settings, asked))
        cell = cells[key]
        about = {"book": learnt.name, "label": config.label, **asdict(config)}
        if "failed" in cell:
            result["failed"].append(about | {"failed": cell["failed"]})
        else:
            learning = {k: v for k, v in cell.items() if k not in ("points", "mmlu")}
            for point in cell["points"]:
                row = about | learning | point
                result["rows"].append(row | ({"mmlu": cell["mmlu"]} if point["scale"] == 1 else {}))
        on_progress(number, len(books) * len(chosen))
    return result


def measure(
    backbone: Backbone,
    learnt: Learnt,
    unrelated: Sequence[Unrelated],
    config: Config,
    read: ReadSettings,
    settings: ForgettingSettings,
    mmlu: Mmlu | None = None,
) -> dict[str, Any]:
    """Learns a book, then looks at its later text and at unrelated ones.

    Returns:
        tokens, seconds, parameters, online_nll: of learning (nats per token); points: for each scale, gain (nats per
        token, on later text), later_kl, kl and bits_per_byte_change (mean over unrelated texts), unrelated: {NAME: kl,
        bits_per_byte, bits_per_byte_change, tokens}; bit_exact: True; mmlu. Or failed: why, where learning diverged.

    Raises:
        RuntimeError: the backbone is not what it was when nothing is attached.
    """
    check = BitExact(backbone, learnt.ids)
    learner = make(config.learner, backbone, read, seed=settings.seed, options=dict(config.options))
    try:
        began = time.perf_counter()
        nll = torch.cat([record.nll for record in learner.read(learnt.ids[: learnt.stop])]).double()
        cell: dict[str, Any] = {
            "tokens": learnt.stop,
            "seconds": round(time.perf_counter() - began, 2),
            "parameters": learner.n_parameters,
            "online_nll": float(nll.nanmean()),
        }
        check("after learning")
        dials = [s for s in settings.scales if s == 1 or can_scale(backbone, learner)]
        cell["points"] = _points(backbone, learner, learnt, unrelated, read, dials)
        cell["mmlu"] = None
        if mmlu is not None:
            with learner.active():
                cell["mmlu"] = mmlu(backbone)
    except FloatingPointError as error:
        cell = {"failed": str(error)}
    finally:
        learner.close()
    check("after closing the learner")
    return cell | {"bit_exact": True}


def _points(
    backbone: Backbone,
    learner: Learner,
    learnt: Learnt,
    unrelated: Sequence[Unrelated],
    read: ReadSettings,
    scales: Sequence[float],
) -> list[dict[str, Any]]:
    later = compare(backbone, learner, learnt.ids, read, first_token=learnt.stop, scales=scales)
    others = [compare(backbone, learner, text.ids, read, scales=scales) for text in unrelated]
    return [_point(scale, later[i], unrelated, [found[i] for found in others]) for i, scale in enumerate(scales)]


def _point(
    scale: float, later: Comparison, unrelated: Sequence[Unrelated], others: Sequence[Comparison]
) -> dict[str, Any]:
    texts = {}
    for text, found in zip(unrelated, others, strict=True):
        bits = [nll * found.tokens / math.log(2) / text.n_bytes for nll in (found.before, found.after)]
        texts[text.name] = {
            "kl": found.kl,
            "bits_per_byte": bits[0],
            "bits_per_byte_change": bits[1] - bits[0],
            "tokens": found.tokens,
        }
    return {
        "scale": scale,
        "gain": later.before - later.after,
        "later_nll": later.before,
        "later_kl": later.kl,
        "later_tokens": later.tokens,
        "kl": _mean([t["kl"] for t in texts.values()]),
        "bits_per_byte_change": _mean([t["bits_per_byte_change"] for t in texts.values()]),
        "unrelated": texts,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
