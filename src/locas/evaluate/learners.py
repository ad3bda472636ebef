"""Everything that learns a text while reading it, behind one interface.

    learner = make("templora-tuned", backbone, ReadSettings())
    for record in learner.read(ids):      # scores a chunk, then learns from it
        print(record.stop, record.nll.mean())
    with learner.active():                # the backbone acts with all that was learnt
        backbone.model.generate(...)
    learner.close()

Same tokens, windows of the same length, same scoring code for all: that of `locas.stream.Reader`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

from torch import Tensor

from locas.anchor import SAMPLE_TOKENS, anchored_bank, check_strength, own_text
from locas.attach import attached
from locas.backbone import Backbone
from locas.bank import Bank
from locas.evaluate.changes import need_peft
from locas.evaluate.weights import RECIPES, Recipe, WeightLearner
from locas.forward import attention_is_torchs, trained_context
from locas.initialise import InitSettings, create_bank, variant_of
from locas.run_settings import PRESETS, parse_layers
from locas.sites import find_sites
from locas.stream import ChunkRecord, Reader, ReadSettings
from locas.write import WriteSettings

Option = float | int | str | bool | None
Options = Mapping[str, Option]
LONG_WINDOW_TOKENS = 16_384  # the paper's long attention


class Learner(Protocol):
    """Something that learns a text while reading it.

    Attributes:
        name: of the method.
        n_parameters: extra trainable numbers; 0 where nothing is learnt.
    """

    name: str

    @property
    def n_parameters(self) -> int: ...

    def read(self, ids: Tensor) -> Iterator[ChunkRecord]:
        """Scores each chunk of `ids` [n] first, then learns it; may be called again with another text."""

    def active(self) -> AbstractContextManager[Any]:
        """Inside, the backbone acts with all that was learnt so far; outside it is what it was."""

    def tensors(self) -> list[Tensor]:
        """What the method keeps besides the backbone."""

    def close(self) -> None:
        """Ends it; the backbone is byte for byte what it was. May be called twice."""


class Truncated:
    """No memory: the window's context only."""

    n_parameters = 0

    def __init__(self, name: str, backbone: Backbone, settings: ReadSettings) -> None:
        settings.sizes(backbone.model)
        self.name, self.backbone, self.settings = name, backbone, settings
        self._reader: Reader | None = None

    def read(self, ids: Tensor) -> Iterator[ChunkRecord]:
        """Scores each chunk of `ids` [n]."""
        self._reader = Reader(self.backbone.model, None, [ids], self.settings, start_id=self.backbone.start_id)
        for (record,) in self._reader:
            assert record is not None
            yield record

    def active(self) -> AbstractContextManager[None]:
        """Nothing was learnt."""
        return nullcontext()

    def tensors(self) -> list[Tensor]:
        """The context, where it is kept."""
        return [] if self._reader is None else self._reader.tensors()

    def close(self) -> None:
        """Nothing to undo."""
        self._reader = None


class Locas:
    """A memory, made from the first chunk that is read. anchor: strength with which it is anchored after each text."""

    def __init__(
        self,
        name: str,
        backbone: Backbone,
        settings: ReadSettings,
        init: InitSettings,
        layers: str = "all",
        anchor: float | None = None,
    ) -> None:
        self.name, self.backbone, self.settings, self.init, self.anchor = name, backbone, settings, init, anchor
        _, self._chunk = settings.sizes(backbone.model)
        sites = find_sites(backbone.model)
        self.layers = parse_layers(layers, len(sites))
        chosen = [s for layer, s in sites.items() if self.layers is None or layer in self.layers]
        gated = variant_of(init, chosen[0]) == "glu"
        self.n_parameters = sum((3 if gated else 2) * init.rank * s.d_model for s in chosen)
        self.bank: Bank | None = None
        self._reader: Reader | None = None
        self._closed = False

    def read(self, ids: Tensor) -> Iterator[ChunkRecord]:
        """Scores each chunk of `ids` [n] with what the memory knows so far, then writes it."""
        model, start_id = self.backbone.model, self.backbone.start_id
        if self._closed:
            raise ValueError(f"{self.name} was closed; make a new learner")
        if self.bank is None:
            self.bank = create_bank(model, ids[: self._chunk], self.init, layers=self.layers, start_id=start_id)
        self._reader = Reader(model, self.bank, [ids], self.settings, start_id=start_id)
        for (record,) in self._reader:
            assert record is not None
            yield record
        if self.anchor is not None:
            others = own_text(model, SAMPLE_TOKENS, start_id=start_id, seed=self.init.seed)
            self.bank, _, _ = anchored_bank(
                self.bank, model, ids[-SAMPLE_TOKENS:], others, self.anchor, start_id=start_id
            )

    def active(self) -> AbstractContextManager[Any]:
        """Inside, the memory is attached."""
        return nullcontext() if self.bank is None else attached(self.backbone.model, self.bank)

    def tensors(self) -> list[Tensor]:
        """See `Reader.tensors`."""
        return [] if self._reader is None else self._reader.tensors()

    def close(self) -> None:
        """Drops the memory."""
        self.bank, self._reader, self._closed = None, None, True


@dataclass(frozen=True)
class Setup:
    """A method with every setting resolved: what its results depend on, besides backbone, text and seed.

    Attributes:
        name: of the method.
        read: window, chunk; for memories also the write rule.
        init: how the memory is made, for memories.
        layers: that get one.
        recipe: how weights are trained, for methods that train weights.
        anchor: how strongly a memory is anchored when a text is read; None: not at all.
    """

    name: str
    read: ReadSettings
    init: InitSettings | None = None
    layers: str = "all"
    recipe: Recipe | None = None
    anchor: float | None = None

    @property
    def rank(self) -> int | None:
        """Slots of a memory, or the rank that LoRA is told; None: it has none, or finds it itself."""
        if self.init is not None:
            return self.init.rank
        return None if self.recipe is None else self.recipe.rank

    @property
    def random(self) -> bool:
        """Whether another seed can change what it does."""
        if self.recipe is not None:
            begins_randomly = self.recipe.trains == "lora" and self.recipe.init == "default"
            return begins_randomly or self.recipe.whole_window  # which is in training mode, with dropout
        drawn = self.anchor is not None  # against text that the backbone draws
        return self.init is not None and (drawn or self.init.init in ("random-rows", "gaussian"))

    def record(self) -> dict[str, Any]:
        """Its settings, for keys and result files. Without a memory nothing is said of how one would be written."""
        settings = asdict(self)
        if self.init is None:
            for name in ("steps", "attention_gradient", "recompute_ffn", "fill_eps", "write"):
                del settings["read"][name]
        if self.anchor is None:
            del settings["anchor"]
        return settings


def make(
    name: str, backbone: Backbone, settings: ReadSettings, *, seed: int = 0, options: Options | None = None
) -> Learner:
    """A fresh learner, for one document.

    Args:
        name: one of `LEARNERS`.
        backbone: model and tokenizer; it is never changed, except inside `active()`.
        settings: window, chunk, and the memory's write rule; shared by all that are compared.
        seed: of everything random: initialisation, dropout.
        options: hyperparameters in place of the method's own, by name, e.g. {"rank": 8, "lr": 1e-3}.

    Raises:
        ValueError: an unknown method or option, settings that do not fit, or a missing optional package.
    """
    setup = resolve(name, backbone, settings, options)
    return LEARNERS[name](backbone, setup, seed)


def resolve(name: str, backbone: Backbone, settings: ReadSettings, options: Options | None = None) -> Setup:
    """Every setting that `make` would use. Raises ValueError as `make` does, before anything is built."""
    if name not in LEARNERS:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(LEARNERS)}")
    if settings.start_in_every_window is None:
        settings = replace(settings, start_in_every_window=backbone.start_in_every_window)
    left, allowed = dict(options or {}), ["window", "chunk", *([] if name in RECIPES else _KEPT_CONTEXT)]
    settings = _take(name, _own(name, settings), left, allowed)
    window, chunk = settings.sizes(backbone.model)
    if settings.reuse and "reuse" not in (options or {}):  # not asked for: only where the backbone can
        settings = replace(settings, reuse=settings.keeps_context(backbone.model, window, chunk))
    if settings.attention_gradient != "full" and not attention_is_torchs(backbone.model):
        settings = replace(settings, attention_gradient="full")
    if name == "attention" and "window" not in (options or {}):
        # The longest window that the backbone was trained for, up to the paper's; chunks as everywhere else.
        longest = min(trained_context(backbone.model) or LONG_WINDOW_TOKENS, LONG_WINDOW_TOKENS)
        window = max(window, longest)
    setup = Setup(name, replace(settings, window=window, chunk=chunk))
    if name in RECIPES:
        allowed += [f.name for f in fields(Recipe)]
        recipe = _take(name, RECIPES[name], left, allowed)
        setup = replace(setup, recipe=recipe)
        if recipe.trains == "lora":
            need_peft()
    elif name in MEMORIES:
        setup, more = _memory_setup(setup, backbone, left)
        allowed += more
    if left:
        raise ValueError(f"{name} has no option {', '.join(map(repr, left))}; it has {', '.join(allowed)}")
    return setup


MEMORIES = ("locas", "locas-recomputed", "locas-paper")
_KEPT_CONTEXT = ["reuse", "refresh", "sinks"]


def _own(name: str, settings: ReadSettings) -> ReadSettings:
    """The shared settings with those that are the method's own, before its options.

    `locas` reads and writes as `locas memorize` does: context kept, short chunks, the metric of curvature.
    `locas-recomputed` sees the very windows and chunks of all other methods, and `locas-paper` has what is published,
    and AdamW.
    """
    if name == "locas":
        own = PRESETS["default"].read
        damping = own.write.damping if settings.write.damping is None else settings.write.damping
        return replace(
            settings,
            reuse=own.reuse,
            attention_gradient=own.attention_gradient,
            write=replace(settings.write, damping=damping),
        )
    if name == "locas-paper":
        return replace(settings, write=PRESETS["paper"].read.write)
    return settings


def _memory_setup(setup: Setup, backbone: Backbone, left: dict[str, Any]) -> tuple[Setup, list[str]]:
    """The setup of a memory, and the options that it takes."""
    init, read, name = InitSettings(), setup.read, setup.name
    if name == "locas-paper":
        init = PRESETS["paper"].init
    of_init = [f.name for f in fields(InitSettings) if f.name != "seed"]
    of_write = [f.name for f in fields(WriteSettings)]
    of_read = ["steps", "fill_eps", "attention_gradient", "recompute_ffn"]
    layers = str(left.pop("layers", "all"))
    parse_layers(layers, len(find_sites(backbone.model)))
    anchor = _anchor(name, left.pop("anchor", None))
    read = replace(_take(name, read, left, of_read), write=_take(name, read.write, left, of_write))
    return replace(setup, init=_take(name, init, left, of_init), read=read, layers=layers, anchor=anchor), [
        "layers",
        "anchor",
        *of_init,
        *of_read,
        *of_write,
    ]


def _anchor(name: str, given: Option) -> float | None:
    if given is None:
        return None
    if isinstance(given, bool | str):
        raise ValueError(f"{name}: anchor must be a positive number, or none; got {given!r}")
    check_strength(given)
    return float(given)


def _take(name: str, settings: Any, options: dict[str, Any], mine: Sequence[str]) -> Any:
    """`settings` with those of `options` that are its own, which are taken out of `options`."""
    taken = {key: options.pop(key) for key in mine if key in options and hasattr(settings, key)}
    try:
        return replace(settings, **taken)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


# -------------------------------------------------------------------- builders


def _truncated(backbone: Backbone, setup: Setup, seed: int) -> Learner:
    return Truncated(setup.name, backbone, setup.read)


def _locas(backbone: Backbone, setup: Setup, seed: int) -> Learner:
    assert setup.init is not None
    return Locas(setup.name, backbone, setup.read, replace(setup.init, seed=seed), setup.layers, setup.anchor)


def _weights(backbone: Backbone, setup: Setup, seed: int) -> Learner:
    assert setup.recipe is not None
    return WeightLearner(setup.name, backbone, setup.read, setup.recipe, seed=seed)


LEARNERS: dict[str, Callable[[Backbone, Setup, int], Learner]] = {
    "truncation": _truncated,
    "attention": _truncated,
    **dict.fromkeys(MEMORIES, _locas),
    **dict.fromkeys(RECIPES, _weights),
}
