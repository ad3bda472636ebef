"""What it costs to read, to learn and to use a memory, as ratios measured side by side.

    backbone = shapes.random_backbone("qwen3-0.6b", dtype=torch.bfloat16, device="cuda")
    timings = reading(backbone, BenchSettings())
    timings["locas_exact"].ratio          # time relative to truncated reading

Every round reads one chunk with each method in turn; a ratio is the median over rounds of time / truncated reading's
time in the same round, so that a machine that slows down slows all of them. Time and memory do not depend on the
weights: large shapes are measured with random ones.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from locas.attention import AttentionGradient
from locas.backbone import Backbone
from locas.bank import Bank
from locas.evaluate.learners import make
from locas.evaluate.memory_use import no_log_lines, peak_bytes, size_of
from locas.forward import device_of, input_embedding
from locas.initialise import InitSettings, create_bank
from locas.run_settings import PRESETS, parse_layers
from locas.sites import find_sites
from locas.stream import Reader, ReadSettings

REFERENCE = "truncation"
_SHORT = 4  # short chunks: so many in place of one, or fewer where it is not divisible by that
_FULL = 3  # chunks: the window is full at the second, the write rule's state there at the first


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        rank: slots of each layer's memory.
        upper: the layers of the cheaper memory: "upper-half", or numbers.
        rounds: measurements of each method.
        warmup: rounds before them that do not count; the windows fill up meanwhile.
        window: tokens of a window; None: as when reading.
        chunk: tokens of a chunk; None: half the window.
        attention_gradient: of all methods that learn, except `locas_exact_full`; see `ReadSettings`.
        generated: tokens generated in one measurement of reading with a memory.
        many: rows, and memories, of the batch that is generated with.
        seed: of text and memories.
    """

    rank: int = 64
    upper: str = "upper-half"
    rounds: int = 16
    warmup: int = 3
    window: int | None = None
    chunk: int | None = None
    attention_gradient: AttentionGradient = PRESETS["default"].read.attention_gradient
    generated: int = 32
    many: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("rounds", 2), ("warmup", 0), ("generated", 1), ("many", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more; got {getattr(self, name)}")

    @property
    def read(self) -> ReadSettings:
        """Window and chunk, each window recomputed; written as `locas memorize` writes."""
        return replace(
            PRESETS["default"].read,
            reuse=False,
            window=self.window,
            chunk=self.chunk,
            attention_gradient=self.attention_gradient,
        )


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, and of truncated reading in the same rounds."""

    seconds: list[float]
    reference: list[float]

    @property
    def ratios(self) -> list[float]:
        """Time relative to the reference, round by round."""
        return [mine / other for mine, other in zip(self.seconds, self.reference, strict=True)]

    @property
    def ratio(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile of the ratios."""
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high


# -------------------------------------------------------------------- reading and learning


def reading(
    backbone: Backbone,
    settings: BenchSettings,
    methods: Sequence[str] | None = None,
    on_round: Callable[[], None] = lambda: None,
    ids: Tensor | None = None,
) -> dict[str, Timing]:
    """Times methods of reading side by side.

    Args:
        backbone: model; its tokenizer is not used.
        settings: see `BenchSettings`.
        methods: of `methods_of`; None: all. Truncated reading is always among them.
        on_round: called after every round.
        ids: [n] text to read; None: random tokens. It must last for all rounds.

    Raises:
        ValueError: an unknown method, sizes that do not fit the backbone, or too short a text.
    """
    ids = some_text(backbone, settings) if ids is None else ids
    makers = methods_of(backbone, settings, ids)
    chosen = list(makers) if methods is None else [REFERENCE, *(m for m in methods if m != REFERENCE)]
    _check_methods(chosen, makers)
    return side_by_side({m: makers[m]() for m in chosen}, settings, device_of(backbone.model), on_round)


def methods_of(
    backbone: Backbone, settings: BenchSettings, ids: Tensor
) -> dict[str, Callable[[], Callable[[], object]]]:
    """By name, what begins to read `ids` and returns what reads the next chunk, or the short ones in its place.

    Reading begins so far into a text that what writes do more often at its beginning is over."""
    read = replace(settings.read, start_in_every_window=backbone.start_in_every_window)
    _, chunk = read.sizes(backbone.model)
    read = replace(read, chunk=chunk)
    before = 2 * read.write.damping_every * chunk
    document = torch.cat([ids.repeat(-(-before // ids.numel()))[:before], ids])

    def reader(bank: Bank | None, **how: Any) -> Reader:
        made = Reader(backbone.model, bank, [document], replace(read, **how), start_id=backbone.start_id)
        made.position = before
        return made

    def memory(layers: str, **how: Any) -> Callable[[], object]:
        return reader(new_bank(backbone, settings, ids, layers), **how).next_chunk

    def short() -> Callable[[], object]:
        parts = math.gcd(chunk, _SHORT)
        own = reader(new_bank(backbone, settings, ids), reuse=True, chunk=chunk // parts)
        return lambda: [record for _ in range(parts) for record in own.next_chunk()]

    def learner(name: str) -> Callable[[], object]:
        chunks: Iterator[object] = make(name, backbone, read).read(ids)
        return lambda: next(chunks)

    return {
        REFERENCE: lambda: reader(None).next_chunk,
        "locas_exact": lambda: memory("all"),
        "locas_exact_upper": lambda: memory(settings.upper),
        "locas_exact_lean": lambda: memory("all", recompute_ffn=True),
        "locas_exact_full": lambda: memory("all", attention_gradient="full"),
        "locas_reuse": lambda: memory("all", reuse=True),
        "locas_reuse_upper": lambda: memory(settings.upper, reuse=True),
        "locas_reuse_short": short,
        "templora": lambda: learner("templora-paper"),
    }


def new_bank(backbone: Backbone, settings: BenchSettings, ids: Tensor, layers: str = "all") -> Bank:
    """A memory as reading makes it, from the text's first chunk."""
    _, chunk = settings.read.sizes(backbone.model)
    chosen = parse_layers(layers, len(find_sites(backbone.model)))
    init = InitSettings(rank=settings.rank, seed=settings.seed)
    return create_bank(backbone.model, ids[:chunk], init, layers=chosen, start_id=backbone.start_id)


def side_by_side(
    work: Mapping[str, Callable[[], object]],
    settings: BenchSettings,
    device: torch.device,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Runs each piece of work in turn, round after round; the first one is the reference."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(settings.warmup + settings.rounds):
        for name, step in work.items():
            took = timed(step, device)
            if number >= settings.warmup:
                seconds[name].append(took)
        on_round()
    reference = next(iter(seconds.values()))
    return {name: Timing(mine, reference) for name, mine in seconds.items()}


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds, with everything that was queued on the device done before and after."""
    _synchronise(device)
    began = time.perf_counter()
    step()
    _synchronise(device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks(backbone: Backbone, settings: BenchSettings, methods: Sequence[str]) -> dict[str, int]:
    """Bytes at the peak of a chunk with each method: the backbone's weights and all tensors besides.

    Raises:
        ValueError: an unknown method, or sizes that do not fit the backbone.
    """
    _, chunk = settings.read.sizes(backbone.model)
    ids, device, found = random_ids(backbone, (_FULL + 1) * chunk, settings.seed), device_of(backbone.model), {}
    weights = size_of(backbone.model.parameters())
    makers = methods_of(backbone, settings, ids)
    _check_methods(methods, makers)

    for name in methods:

        def work(name: str = name) -> None:
            step = makers[name]()
            for _ in range(_FULL):
                step()

        _, held = peak_bytes(work, device)
        found[name] = weights + held
    return found


# -------------------------------------------------------------------- helpers


def _check_methods(chosen: Sequence[str], makers: Mapping[str, object]) -> None:
    unknown = [m for m in chosen if m not in makers]
    if unknown:
        raise ValueError(f"there is no method {', '.join(unknown)}; there are {', '.join(makers)}")


def some_text(backbone: Backbone, settings: BenchSettings) -> Tensor:
    """Random tokens for all rounds."""
    _, chunk = settings.read.sizes(backbone.model)
    return random_ids(backbone, (settings.warmup + settings.rounds + 1) * chunk, settings.seed)


def random_ids(backbone: Backbone, n: int, seed: int) -> Tensor:
    """[n] random tokens, on the model's device."""
    vocabulary = next(input_embedding(backbone.model).parameters()).shape[0]
    ids = torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(seed))
    return ids.to(device_of(backbone.model))


def profile_chunk(backbone: Backbone, settings: BenchSettings, method: str, path: str) -> str:
    """Profiles one chunk with torch's profiler: a trace for chrome://tracing or Perfetto at `path`; returns the table
    of the costliest operations."""
    from torch.profiler import ProfilerActivity, profile

    device = device_of(backbone.model)
    _, chunk = settings.read.sizes(backbone.model)
    step = methods_of(backbone, settings, random_ids(backbone, (_FULL + 2) * chunk, settings.seed))[method]()
    for _ in range(_FULL):
        step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with no_log_lines(), profile(activities=activities, acc_events=True) as profiler:
        step()
        _synchronise(device)
    profiler.export_chrome_trace(path)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table: Any = profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=48)
    return str(table)


__all__ = [
    "REFERENCE",
    "BenchSettings",
    "Timing",
    "methods_of",
    "new_bank",
    "peaks",
    "profile_chunk",
    "random_ids",
    "reading",
    "side_by_side",
    "some_text",
    "timed",
]
