"""What it costs to read, to learn and to use a memory, as ratios measured side by side.

    backbone = random_backbone("qwen3-0.6b", dtype=torch.bfloat16, device="cuda")
    timings = reading(backbone, BenchSettings())
    timings["locas_exact"].ratio          # time relative to truncated reading

Every round reads one chunk with each method in turn; a ratio is the median over rounds of time / truncated reading's
time in the same round, so that a machine that slows down slows all of them. Time and memory do not depend on the
weights: large shapes are measured with random ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from locas.attach import attached
from locas.backbone import Backbone
from locas.bank import Bank
from locas.evaluate.learners import make
from locas.evaluate.memory_use import peak_bytes, size_of
from locas.forward import frozen, input_embedding
from locas.initialise import InitSettings, create_bank
from locas.run import parse_layers
from locas.sites import find_sites
from locas.stream import Reader, ReadSettings

REFERENCE = "truncation"
# Shapes of models on the hub, for random weights (config.json of Qwen/Qwen3-...-Base).
SHAPES: dict[str, dict[str, int]] = {
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "qwen3-1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "qwen3-4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
_QWEN3 = {
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}


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
    generated: int = 32
    many: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("rounds", 2), ("warmup", 0), ("generated", 1), ("many", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more; got {getattr(self, name)}")

    @property
    def read(self) -> ReadSettings:
        """Window and chunk."""
        return ReadSettings(window=self.window, chunk=self.chunk)


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


def random_backbone(
    name: str, *, dtype: torch.dtype, device: torch.device | str, layers: int | None = None
) -> Backbone:
    """A model of one of `SHAPES`, with random weights and no tokenizer.

    Args:
        name: of the shape.
        dtype: of the weights.
        device: where they are made.
        layers: so many in place of the shape's own, for a machine that is too small.

    Raises:
        ValueError: no such shape.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}; there are {', '.join(SHAPES)}")
    shape = _QWEN3 | SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})
    config = Qwen3Config(**shape)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.eval()
    return Backbone(name, model, None, None, False, "")


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
    ids = _text(backbone, settings) if ids is None else ids
    makers = methods_of(backbone, settings, ids)
    chosen = list(makers) if methods is None else [REFERENCE, *(m for m in methods if m != REFERENCE)]
    unknown = [m for m in chosen if m not in makers]
    if unknown:
        raise ValueError(f"there is no method {', '.join(unknown)}; there are {', '.join(makers)}")
    return side_by_side({m: makers[m]() for m in chosen}, settings, device_of(backbone), on_round)


def methods_of(
    backbone: Backbone, settings: BenchSettings, ids: Tensor
) -> dict[str, Callable[[], Callable[[], object]]]:
    """By name, what begins to read `ids` and returns what reads the next chunk."""
    read = replace(settings.read, start_in_every_window=backbone.start_in_every_window)

    def memory(layers: str, reuse: bool) -> Callable[[], object]:
        bank = new_bank(backbone, settings, ids, layers)
        return Reader(backbone.model, bank, [ids], replace(read, reuse=reuse), start_id=backbone.start_id).next_chunk

    def plain(reuse: bool) -> Callable[[], object]:
        return Reader(backbone.model, None, [ids], replace(read, reuse=reuse), start_id=backbone.start_id).next_chunk

    def learner(name: str) -> Callable[[], object]:
        chunks: Iterator[object] = make(name, backbone, read).read(ids)
        return lambda: next(chunks)

    return {
        REFERENCE: lambda: plain(False),
        "locas_exact": lambda: memory("all", False),
        "locas_exact_upper": lambda: memory(settings.upper, False),
        "locas_reuse": lambda: memory("all", True),
        "locas_reuse_upper": lambda: memory(settings.upper, True),
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
    """Bytes at the peak of a chunk with each method: the backbone's weights and all tensors besides."""
    ids, device, found = _text(backbone, settings), device_of(backbone), {}
    weights = size_of(backbone.model.parameters())
    makers = methods_of(backbone, settings, ids)

    for name in methods:

        def work(name: str = name) -> None:
            step = makers[name]()
            for _ in range(3):  # the window is full at the second chunk, the rule's state there at the first
                step()

        _, held = peak_bytes(work, device)
        found[name] = weights + held
    return found


# -------------------------------------------------------------------- generating with a memory


def generating(
    backbone: Backbone, settings: BenchSettings, on_round: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """Time of generated tokens with a memory relative to without: one row with one memory, and a batch with a
    different one in each row."""
    ids, device = _text(backbone, settings), device_of(backbone)
    bank = new_bank(backbone, settings, ids)
    generator = torch.Generator().manual_seed(settings.seed)
    bank.rows.add_(torch.randn(bank.rows.shape, generator=generator).to(bank.rows) / bank.d_model)
    found = {}
    for name, rows in (("one", 1), ("many", settings.many)):
        step, first = (_decoder(backbone, ids, rows, n) for n in (settings.generated, 1))
        own = bank if rows == 1 else Bank.stack([bank] * rows)
        index = None if rows == 1 else list(reversed(range(rows)))

        plain, memory = [], []
        for number in range(settings.warmup + settings.rounds):
            # Which goes first changes from round to round: the second finds the processor's caches warm.
            took = {}
            for with_memory in (True, False) if number % 2 else (False, True):
                with attached(backbone.model, own, index) if with_memory else nullcontext():
                    first()  # what a memory needs once, its rows gathered and cast, belongs to no token
                    took[with_memory] = timed(step, device)
            if number >= settings.warmup:
                plain.append(took[False])
                memory.append(took[True])
            on_round()
        found[name] = Timing(memory, plain)
    return found


def _decoder(backbone: Backbone, ids: Tensor, rows: int, tokens: int) -> Callable[[], None]:
    """Generates `tokens` tokens greedily, row by row of a batch, after a short prompt."""
    from transformers import DynamicCache

    model = backbone.model
    prompt = ids[:33].expand(rows, -1)

    def step() -> None:
        with torch.no_grad(), frozen(model):
            past = DynamicCache()
            model(prompt[:, :-1], past_key_values=past, use_cache=True, logits_to_keep=1)
            last = prompt[:, -1:]
            for _ in range(tokens):
                logits = model(last, past_key_values=past, use_cache=True).logits
                last = logits[:, -1:].argmax(-1)

    return step


# -------------------------------------------------------------------- scaling


def over_lengths(
    backbone: Backbone, settings: BenchSettings, positions: Sequence[int], reuse: bool, on_round: Callable[[], None]
) -> dict[str, Timing]:
    """Time of a chunk far into a document, relative to the first of `positions` (in tokens)."""
    _, chunk = settings.read.sizes(backbone.model)
    rounds = settings.warmup + settings.rounds
    ids = _random_ids(backbone, max(positions) + (rounds + 1) * chunk, settings.seed)
    read = replace(settings.read, start_in_every_window=backbone.start_in_every_window, reuse=reuse)
    bank = new_bank(backbone, settings, ids)
    work: dict[str, Callable[[], object]] = {}
    for position in positions:
        reader = Reader(backbone.model, bank.clone(), [ids], read, start_id=backbone.start_id, first_token=position)
        work[f"{position}"] = reader.next_chunk
    return side_by_side(work, settings, device_of(backbone), on_round)


def over_documents(
    backbone: Backbone, settings: BenchSettings, counts: Sequence[int], on_round: Callable[[], None]
) -> dict[str, Timing]:
    """Time of a chunk of n documents read side by side, relative to one document's; the throughput is n / ratio."""
    ids = _text(backbone, settings)
    read = replace(settings.read, start_in_every_window=backbone.start_in_every_window)
    one = new_bank(backbone, settings, ids)
    work: dict[str, Callable[[], object]] = {}
    for n in (1, *(n for n in counts if n != 1)):
        bank = Bank.stack([one] * n)
        work[f"{n}"] = Reader(backbone.model, bank, [ids] * n, read, start_id=backbone.start_id).next_chunk
    return side_by_side(work, settings, device_of(backbone), on_round)


def over_ranks(
    backbone: Backbone, settings: BenchSettings, ranks: Sequence[int], on_round: Callable[[], None]
) -> dict[str, Timing]:
    """Time of reading and learning with memories of several ranks, relative to truncated reading."""
    ids = _text(backbone, settings)
    work = {REFERENCE: methods_of(backbone, settings, ids)[REFERENCE]()}
    for rank in ranks:
        work[f"{rank}"] = methods_of(backbone, replace(settings, rank=rank), ids)["locas_exact"]()
    return side_by_side(work, settings, device_of(backbone), on_round)


# -------------------------------------------------------------------- helpers


def device_of(backbone: Backbone) -> torch.device:
    """Where the model is."""
    device = next(input_embedding(backbone.model).parameters()).device
    assert isinstance(device, torch.device)
    return device


def _text(backbone: Backbone, settings: BenchSettings) -> Tensor:
    _, chunk = settings.read.sizes(backbone.model)
    return _random_ids(backbone, (settings.warmup + settings.rounds + 1) * chunk, settings.seed)


def _random_ids(backbone: Backbone, n: int, seed: int) -> Tensor:
    vocabulary = next(input_embedding(backbone.model).parameters()).shape[0]
    return torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(seed)).to(device_of(backbone))


def profile_chunk(backbone: Backbone, settings: BenchSettings, method: str, path: str) -> str:
    """Profiles one chunk with torch's profiler: a trace for chrome://tracing or Perfetto at `path`; returns the table
    of the costliest operations."""
    from torch.profiler import ProfilerActivity, profile

    device = device_of(backbone)
    step = methods_of(backbone, settings, _text(backbone, settings))[method]()
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        _synchronise(device)
    profiler.export_chrome_trace(path)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table: Any = profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=48)
    return str(table)


__all__ = [
    "REFERENCE",
    "SHAPES",
    "BenchSettings",
    "Timing",
    "generating",
    "new_bank",
    "over_documents",
    "over_lengths",
    "over_ranks",
    "peaks",
    "profile_chunk",
    "random_backbone",
    "reading",
]
