"""`locas bench`: what reading, learning and using a memory cost on this machine."""

from __future__ import annotations

import gc
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from locas.backbone import Backbone, Dtype, load_backbone
from locas.cli.bench_tables import NAMES, heading, tables
from locas.cli.common import Maybe, OutputOptions, UserError, check_folder, err, out, print_json
from locas.evaluate import bench, bench_scaling, shapes
from locas.evaluate.bench import BenchSettings
from locas.evaluate.provenance import environment
from locas.forward import device_of
from locas.store import write_atomically

Part = Literal["reading", "generating", "memory", "memories", "length", "documents", "window", "rank"]
_QUICK: tuple[Part, ...] = ("reading", "generating", "memory")
_QUICK_ROUNDS = 10
_DEFAULT_WINDOW = 2048  # of the shapes, whose context is longer
_WINDOWS = (4, 2, 1)  # parts of the window that are measured too


@dataclass(frozen=True)
class Bench:
    """Measure what reading, learning and using a memory cost here, relative to truncated reading of the same window.

    All methods read the same chunks in turn, round after round; ratios are medians over the rounds, with quartiles.
    --quick takes a few minutes on two cores.

        locas bench --quick
        locas bench --backbones builtin,qwen3-0.6b --device cpu,cuda -o bench/
        locas bench --backbones qwen3-0.6b --parts reading --rounds 3 --warmup 1   # a quarter of an hour on two cores
        locas bench --backbones qwen3-4b:4 --parts reading --window 1024     # 4 of its layers, for a small machine
    """

    backbones: str = "builtin"
    """With commas: builtin, a folder or hub name, qwen3-0.6b, -1.7b or -4b (random weights; name:N: only N layers)."""
    parts: str = ",".join(get_args(Part))
    """What to measure, separated by commas: reading (with learning), generating (with a memory attached), memory (peak
    of RAM or GPU memory); and how it grows with memories (in a batch that generates), length (how far into a document),
    documents (side by side), window, rank."""
    quick: bool = False
    """Only reading, generating and memory, with fewer rounds."""
    methods: Maybe[str] = None
    """Methods of reading, separated by commas (default: all; TempLoRA needs pip install "locas[peft]")."""
    settings: BenchSettings = field(default_factory=BenchSettings)
    dtype: Dtype = "auto"
    """Precision of the backbone; auto: bfloat16 on CUDA, float32 on CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ...; several, separated by commas, are measured one after another."""
    output: Annotated[Maybe[str], tyro.conf.arg(aliases=["-o"], metavar="DIR")] = None
    """Folder for bench.json and bench.png (pip install "locas[plots]")."""
    profile: Maybe[str] = None
    """Also profile one chunk of this method (such as locas_exact): a table, and a trace for Perfetto
    (profile-NAME.json, in -o or else in the working folder)."""
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        parts = self._parts()
        if self.profile is not None and self.profile not in NAMES:
            raise UserError(f"--profile {self.profile}: choose from {', '.join(NAMES)}")
        names, devices = _list(self.backbones), _list(self.device)
        if not names:
            raise UserError("--backbones names none; give builtin, a folder, or a shape such as qwen3-0.6b")
        if not devices:
            raise UserError("--device names none; give auto, cpu or cuda")
        if unknown := [name for name in _list(self.methods or "") if name not in NAMES]:
            raise UserError(f"there is no method {', '.join(unknown)}; there are {', '.join(NAMES)}")
        _ = self.settings.read  # a chunk that does not fit into the window is refused
        if self.output is not None:
            check_folder(self.output)
        for device in devices:  # all of them, before the first is measured
            _where(device)
            for name in names:
                self._check_room(name, device)
        if self.output is not None:
            Path(self.output).mkdir(parents=True, exist_ok=True)
        runs: list[dict[str, Any]] = []
        for device in devices:
            for name in names:
                runs.append(self._run(name, device, parts))
                if self.output is not None:
                    self._write(_result(runs), runs)
        if self.show.json:
            print_json(_result(runs))
        return 0

    def _run(self, name: str, device: str, parts: tuple[str, ...]) -> dict[str, Any]:
        backbone = load(name, self.dtype, device)
        result = self._measure(backbone, parts)
        if not self.show.json:
            out.print(heading(result), style="bold", soft_wrap=True, markup=False, highlight=False)
            for title, table in tables(result):
                out.print(title, style="italic", soft_wrap=True, markup=False, highlight=False)
                out.print(table)
                out.print()
        if self.profile is not None:
            self._profile(backbone, self.profile)
        del backbone
        gc.collect()
        return result

    def _check_room(self, name: str, device: str) -> None:
        found = _shape(name, self.dtype, device)
        if found is None:
            return
        settings = self._settings()
        window = settings.window or _DEFAULT_WINDOW
        chunk = settings.chunk or max(1, window // 2)
        templora = "templora" in _list(self.methods or "templora") and not {"reading", "memory"}.isdisjoint(
            self._parts()
        )
        shape, dtype, where, layers = found
        shapes.check_room(
            shape, dtype=dtype, device=where, window=window, chunk=chunk, layers=layers, templora=templora
        )

    def _parts(self) -> tuple[str, ...]:
        if self.quick and self.parts != Bench.parts:
            raise UserError(f"--quick measures {', '.join(_QUICK)}, and --parts chooses others; leave one of them out")
        if self.quick:
            return _QUICK
        chosen = tuple(_list(self.parts))
        unknown = [part for part in chosen if part not in get_args(Part)]
        if unknown or not chosen:
            raise UserError(f"--parts {self.parts!r}: choose from {', '.join(get_args(Part))}")
        return chosen

    def _methods(self) -> list[str]:
        if self.methods:
            return _list(self.methods)
        if importlib.util.find_spec("peft") is None:
            err.print('without TempLoRA, which needs PEFT: pip install "locas[peft]"', style="yellow", markup=False)
            return [name for name in NAMES if name != "templora"]
        return list(NAMES)

    def _settings(self) -> BenchSettings:
        return replace(self.settings, rounds=min(self.settings.rounds, _QUICK_ROUNDS)) if self.quick else self.settings

    def _measure(self, backbone: Backbone, parts: tuple[str, ...]) -> dict[str, Any]:
        settings = self._settings()
        window, chunk = settings.read.sizes(backbone.model)
        result: dict[str, Any] = environment(backbone) | {
            "settings": vars(settings) | {"window": window, "chunk": chunk},
            "seeds": [settings.seed],
        }
        methods = self._methods()
        rounds = settings.rounds + settings.warmup
        with _bar(backbone.name, rounds * sum(_WEIGHT[p] for p in parts)) as step:
            for part in parts:
                result |= _PARTS[part](backbone, settings, methods, step)
        return result

    def _profile(self, backbone: Backbone, method: str) -> None:
        name = f"{backbone.name.replace('/', '-').replace(':', '-')}-{device_of(backbone.model).type}-{method}"
        trace = str(Path(self.output or ".") / f"profile-{name}.json")
        err.print(bench.profile_chunk(backbone, self._settings(), method, trace), soft_wrap=True, markup=False)
        err.print(f"trace: {trace} (open it in ui.perfetto.dev)", soft_wrap=True, markup=False)

    def _write(self, result: dict[str, Any], runs: list[dict[str, Any]]) -> None:
        folder = Path(self.output or ".")
        write_atomically(folder / "bench.json", (json.dumps(result, indent=1) + "\n").encode())
        try:
            from locas.evaluate.bench_chart import draw

            draw(runs, folder / "bench.png")
        except ModuleNotFoundError as error:
            err.print(f"no picture: {error}", style="yellow", soft_wrap=True, markup=False)


def load(name: str, dtype: Dtype, device: str) -> Backbone:
    """A backbone by name: the built-in one, a checkpoint, or a shape with random weights.

    Raises:
        UserError: the number of layers after the colon is none, or the device is not there.
    """
    found = _shape(name, dtype, device)
    if found is None:
        return load_backbone(None if name == "builtin" else name, dtype=dtype, device=device)
    shape, precision, where, layers = found
    return shapes.random_backbone(shape, dtype=precision, device=where, layers=layers)


def _shape(name: str, dtype: Dtype, device: str) -> tuple[str, torch.dtype, torch.device, int | None] | None:
    """What the name of a shape says (shape, dtype, device, layers); None: it is no shape's."""
    shape, _, layers = name.partition(":")
    if shape not in shapes.SHAPES:
        return None
    if layers and (not layers.isdecimal() or int(layers) < 1):
        raise UserError(f"--backbones {name}: after the colon goes a number of layers, 1 or more")
    where = _where(device)
    chosen = dtype if dtype != "auto" else ("float32" if where.type == "cpu" else "bfloat16")
    return shape, getattr(torch, chosen), where, int(layers) if layers else None


def _where(device: str) -> torch.device:
    """The device of that name. UserError: it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = device.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not (number or "0").isdecimal() or int(number or 0) >= there:
        raise UserError(f"there is no {device.upper()} device here; use --device cpu (or leave --device out)")
    return torch.device(device)


def _list(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _result(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One run as it is; of several the first one's keys, and all of them."""
    return runs[0] | ({"runs": runs} if len(runs) > 1 else {})


# -------------------------------------------------------------------- the parts


def _reading(backbone: Backbone, settings: BenchSettings, methods: list[str], step: Any) -> dict[str, Any]:
    timings = bench.reading(backbone, settings, methods, step)
    _, chunk = settings.read.sizes(backbone.model)
    return {
        "relative_time": {m: t.ratio for m, t in timings.items()},
        "quartiles": {m: t.quartiles for m, t in timings.items()},
        "tokens_per_second": {m: chunk / sorted(t.seconds)[len(t.seconds) // 2] for m, t in timings.items()},
        "seconds": {m: t.seconds for m, t in timings.items()},
    }


def _generating(backbone: Backbone, settings: BenchSettings, _: Any, step: Any) -> dict[str, Any]:
    rows = {"one": 1, "many": settings.many}
    timings = bench_scaling.over_memories(backbone, settings, tuple(rows.values()), step)
    return {"generating": {name: _extra(timings[f"{n}"]) for name, n in rows.items()} | {"rows": rows}}


def _memories(backbone: Backbone, settings: BenchSettings, _: Any, step: Any) -> dict[str, Any]:
    timings = bench_scaling.over_memories(backbone, settings, (1, 4, 16), step)
    return {"memories": _figures(timings)}


def _extra(timing: bench.Timing) -> dict[str, Any]:
    return {"extra_time": timing.ratio - 1, "quartiles": [q - 1 for q in timing.quartiles]}


def _memory(backbone: Backbone, settings: BenchSettings, methods: list[str], step: Any) -> dict[str, Any]:
    chosen = list(dict.fromkeys([bench.REFERENCE, *methods]))
    found = bench.peaks(backbone, settings, chosen)
    for _i in range(settings.rounds + settings.warmup):
        step()
    return {"peak_bytes": found, "relative_memory": {m: n / found[bench.REFERENCE] for m, n in found.items()}}


def _length(backbone: Backbone, settings: BenchSettings, _: Any, step: Any) -> dict[str, Any]:
    kept, recomputed = (
        _figures(bench_scaling.over_lengths(backbone, settings, (10_000, 100_000, 1_000_000), reuse, step))
        for reuse in (True, False)
    )
    return {"length": kept, "length_exact": recomputed}


def _documents(backbone: Backbone, settings: BenchSettings, _: Any, step: Any) -> dict[str, Any]:
    figures = _figures(bench_scaling.over_documents(backbone, settings, (1, 4, 16), step))
    return {"documents": {n: f | {"throughput": int(n) / f["ratio"]} for n, f in figures.items()}}


def _window(backbone: Backbone, settings: BenchSettings, _: Any, step: Any) -> dict[str, Any]:
    window, _chunk = settings.read.sizes(backbone.model)
    windows = sorted({max(2, window // part) for part in _WINDOWS})
    return {"window": _figures(bench_scaling.over_windows(backbone, settings, windows, step))}


def _rank(backbone: Backbone, settings: BenchSettings, _: Any, step: Any) -> dict[str, Any]:
    return {"rank": _figures(bench_scaling.over_ranks(backbone, settings, (2, 16, 64, 256), step))}


def _figures(timings: dict[str, bench.Timing]) -> dict[str, dict[str, Any]]:
    return {name: {"ratio": t.ratio, "quartiles": t.quartiles} for name, t in timings.items()}


_PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "reading": _reading,
    "generating": _generating,
    "memory": _memory,
    "memories": _memories,
    "length": _length,
    "documents": _documents,
    "window": _window,
    "rank": _rank,
}
_WEIGHT = dict.fromkeys(get_args(Part), 1) | {"generating": 2, "memories": 3, "length": 2, "window": 3}  # a round's


@contextmanager
def _bar(name: str, rounds: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(f"measuring on {escape(name)}", total=rounds)
        yield lambda: bar.advance(task)


__all__ = ["Bench", "load"]
