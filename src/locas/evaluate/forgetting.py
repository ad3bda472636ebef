"""What a memory costs: gain on the book that was learnt, against change everywhere else.

    cell = measure(backbone, book, unrelated, config, ForgettingSettings())
    print(cell["points"][0]["gain"], cell["points"][0]["kl"])

A method reads a book's first tokens. Then it is frozen, and its gain is how much better than the backbone it predicts
the same book's later text (nats per token); its cost is KL(backbone || backbone + memory) on unrelated text, averaged
over tokens, and the change of bits per byte there. Neither is a number by itself: together, over ranks, step sizes and
the output scale at reading time, they are a frontier.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from locas.backbone import Backbone
from locas.evaluate.cells import Cells, identity, key_of
from locas.evaluate.dialogue import parse_method
from locas.evaluate.learners import Learner, Locas, Option, Setup, make, resolve
from locas.evaluate.mmlu import Mmlu
from locas.forward import IGNORED, chunk_logits, frozen, token_nll
from locas.stream import Reader, ReadSettings
from locas.text import Document

_HELD_BYTES = 2**28  # of the backbone's logits that are kept while the memory's are made


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
            shown = rank if rank is not None or not ranked else int(given["rank"])
            found.append((Config(text, method.learner, tuple(sorted(options.items())), shown, factor), setup))
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

    Returns:
        {"rows": one for each configuration, book and scale, see `measure`, "failed": configurations that diverged,
        "mmlu": the backbone's own accuracy, or None}

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
        result["mmlu"] = cells.get(key_of(what="mmlu", backbone=who, mmlu=mmlu.key), lambda: mmlu(backbone))
    for learnt, (config, setup) in product(books, chosen):
        others = [u for u in unrelated if u.sha256 != learnt.sha256]
        asked = mmlu if config.lr_factor == 1 else None
        key = key_of(
            what="forgetting",
            backbone=who,
            book=[learnt.sha256, learnt.stop, learnt.ids.numel()],
            unrelated=[[u.name, u.sha256, u.ids.numel()] for u in others],
            setup=asdict(setup),
            read=asdict(read),
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


# -------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Comparison:
    """The backbone without and with what was learnt, on one text, means over its tokens in nats.

    before, after: negative log-likelihoods; kl: KL(backbone || backbone with it); tokens: that were scored.
    """

    tokens: int
    before: float
    after: float
    kl: float


def compare(
    backbone: Backbone,
    learner: Learner,
    ids: Tensor,
    read: ReadSettings,
    *,
    first_token: int = 0,
    scales: Sequence[float] = (1.0,),
) -> list[Comparison]:
    """Scores a text with what a learner has learnt and without; nothing is learnt from it.

    Windows and chunks are those of truncated reading.

    Args:
        backbone: model and tokenizer.
        learner: that has read something.
        ids: [n] token ids.
        read: window and chunk.
        first_token: tokens before it are context only.
        scales: see `scaled`.

    Returns:
        One for each scale.

    Raises:
        ValueError: there is nothing to score, or this learner cannot be scaled.
        FloatingPointError: a loss is not finite.
    """
    if read.start_in_every_window is None:
        read = replace(read, start_in_every_window=backbone.start_in_every_window)
    reader = Reader(backbone.model, None, [ids], read, start_id=backbone.start_id, first_token=first_token)
    total, tokens = torch.zeros(len(scales), 3, dtype=torch.float64), 0
    for windows in _blocks(backbone, reader):
        before = [_logits(backbone, w) for w in windows]
        tokens += sum(int((w.targets != IGNORED).sum()) for w in windows)
        for i, scale in enumerate(scales):
            with learner.active(), scaled(backbone, learner, scale):
                for window, logits in zip(windows, before, strict=True):
                    total[i] += _sums(window.targets, logits, _logits(backbone, window))
    if tokens == 0:
        raise ValueError("there is no token to score: a first token needs one before it")
    if not bool(total.isfinite().all()):
        raise FloatingPointError(f"with what {learner.name} learnt, the loss is not finite; use a smaller step size")
    return [Comparison(tokens, *row) for row in (total / tokens).tolist()]


def _sums(targets: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """[3] float64: both losses and the divergence, summed over a window's targets [1, chunk]."""
    counted = targets != IGNORED
    figures = (token_nll(before, targets), token_nll(after, targets), divergence(before, after))
    return torch.stack([f[counted].double().sum().cpu() for f in figures])


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(one) || softmax(other)) over the last axis, in nats; exactly 0 where they are equal.

    Args:
        one: [..., vocab] logits.
        other: the same.

    Returns:
        [...] float32 or better.
    """
    dtype = torch.float64 if one.dtype == torch.float64 else torch.float32
    p, q = one.to(dtype).log_softmax(dim=-1), other.to(dtype).log_softmax(dim=-1)
    # 0 * (-inf - x) is 0 here: what the first one rules out costs nothing.
    return torch.where(p.exp() == 0, 0.0, p.exp() * (p - q)).sum(dim=-1)


def _blocks(backbone: Backbone, reader: Reader) -> Iterator[list[Any]]:
    """Windows with something to score, as many at once as may be held."""
    vocabulary = int(backbone.model.get_input_embeddings().weight.shape[0])
    most = max(1, _HELD_BYTES // (4 * reader.chunk_tokens * vocabulary))
    block: list[Any] = []
    while not reader.done:
        window = reader.window()
        reader.position = window.start + reader.chunk_tokens
        if window.targets.shape[1]:
            block.append(window)
        if block and (len(block) == most or reader.done):
            yield block
            block = []


def _logits(backbone: Backbone, window: Any) -> Tensor:
    """[1, chunk, vocab] of a window's targets."""
    with frozen(backbone.model), torch.no_grad():
        return chunk_logits(backbone.model, window.inputs, window.prefix_tokens)[:, -window.targets.shape[1] :]


# -------------------------------------------------------------------- the dial


def can_scale(backbone: Backbone, learner: Learner) -> bool:
    """Whether what was learnt is a sum with one factor: a memory, or LoRA that began at zero."""
    if isinstance(learner, Locas):
        return True
    recipe = getattr(learner, "recipe", None)
    return recipe is not None and recipe.trains == "lora" and recipe.init == "default"


@contextmanager
def scaled(backbone: Backbone, learner: Learner, scale: float) -> Iterator[None]:
    """Inside, and inside `learner.active()`, what was learnt counts `scale` times: tau, or LoRA's alpha / rank.

    Raises:
        ValueError: this learner has no such dial.
    """
    if scale == 1:
        yield
        return
    if not can_scale(backbone, learner):
        raise ValueError(f"what {learner.name} learnt cannot be scaled; its only scale is 1")
    if isinstance(learner, Locas):
        assert learner.bank is not None
        tau = learner.bank.tau.clone()
        learner.bank.tau.mul_(scale)
        try:
            yield
        finally:
            learner.bank.tau.copy_(tau)
        return
    layers = [m for m in backbone.model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    before = [dict(m.scaling) for m in layers]
    try:
        for module in layers:
            module.scaling = {name: value * scale for name, value in module.scaling.items()}
        yield
    finally:
        for module, value in zip(layers, before, strict=True):
            module.scaling = value


# -------------------------------------------------------------------- nothing is left behind


class BitExact:
    """Remembers a backbone's weights and what it says about a text; calling it raises unless they are the same."""

    def __init__(self, backbone: Backbone, ids: Tensor) -> None:
        self.backbone, self.ids = backbone, ids[: min(64, ids.numel())]
        self._before = self._now()

    def __call__(self, when: str) -> None:
        logits, weights = self._now()
        if weights != self._before[1] or not torch.equal(logits, self._before[0]):
            raise RuntimeError(f"{when} the backbone is not what it was: this is a bug in the method that learnt")

    def _now(self) -> tuple[Tensor, str]:
        model = self.backbone.model
        with frozen(model), torch.no_grad():
            logits = chunk_logits(model, self.ids[None].to(next(model.parameters()).device), 0).cpu()
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        return logits, digest.hexdigest()
