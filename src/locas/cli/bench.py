"""`locas bench`: what reading, learning and using a memory cost on this machine."""

from __future__ import annotations

import gc
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from locas.backbone import Backbone, Dtype, load_backbone
from locas.cli.common import OutputOptions, UserError, err, out, print_json
from locas.evaluate import bench
from locas.evaluate.bench import BenchSettings
from locas.evaluate.provenance import environment
from locas.store import write_atomically

Part = Literal["reading", "generating", "memory", "length", "documents", "rank"]
_QUICK: tuple[Part, ...] = ("reading", "generating", "memory")
_NAMES = {
    "truncation": "read only (truncated window)",
    "locas_exact": "read + learn, window recomputed",
    "locas_exact_upper": "the same, memory in some layers",
    "locas_reuse": "read + learn, context kept",
    "locas_reuse_upper": "the same, memory in some layers",
    "templora": "TempLoRA as published (PEFT)",
}


@dataclass(frozen=True)
class Bench:
    """Measure what reading, learning and using a memory cost here, relative to truncated reading of the same window.

    All methods read the same chunks in turn, round after round; ratios are medians over the rounds, with quartiles.
    --quick takes a few minutes on two cores.

        locas bench --quick
        locas bench --backbones builtin,qwen3-0.6b --device cuda -o bench/
        locas bench --backbones qwen3-0.6b:4 --parts reading --window 1024     # 4 of its layers, for a small machine
    """

    backbones: str = "builtin"
    """What to measure on, separated by commas: builtin, a folder or hub name, or the shapes qwen3-0.6b, qwen3-1.7b,
    qwen3-4b with random weights (name:N: only N layers)."""
    parts: str = ",".join(get_args(Part))
    """What to measure, separated by commas: reading (with learning), generating (with a memory attached), memory (peak
    of RAM or GPU memory), length (far into a document), documents (side by side), rank."""
    quick: bool = False
    """Only reading, generating and memory, with fewer rounds."""
    methods: str | None = None
    """Methods of reading, separated by commas (default: all; TempLoRA needs pip install "locas[peft]")."""
    settings: BenchSettings = field(default_factory=BenchSettings)
    dtype: Dtype = "auto"
    """Precision of the backbone; auto: bfloat16 on CUDA, float32 on CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = None
    """Folder for bench.json and bench.png (pip install "locas[plots]")."""
    profile: str | None = None
    """Also profile one chunk of this method (such as locas_exact): a table, and with -o a trace for Perfetto."""
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        parts = self._parts()
        if self.output is not None:
            Path(self.output).mkdir(parents=True, exist_ok=True)
        names = [name.strip() for name in self.backbones.split(",") if name.strip()]
        if not names:
            raise UserError("--backbones names none; give builtin, a folder, or a shape such as qwen3-0.6b")
        runs = []
        for name in names:
            backbone = load(name, self.dtype, self.device)
            runs.append(self._measure(backbone, parts))
            if not self.show.json:
                for table in tables(runs[-1]):
                    out.print(table)
                    out.print()
            if self.profile:
                self._profile(backbone)
            del backbone
            gc.collect()
        result = runs[0] | ({"runs": runs} if len(runs) > 1 else {})
        if self.output is not None:
            self._write(result, runs)
        if self.show.json:
            print_json(result)
        return 0

    def _parts(self) -> tuple[str, ...]:
        if self.quick:
            return _QUICK
        chosen = tuple(part.strip() for part in self.parts.split(",") if part.strip())
        unknown = [part for part in chosen if part not in get_args(Part)]
        if unknown or not chosen:
            raise UserError(f"--parts {self.parts!r}: choose from {', '.join(get_args(Part))}")
        return chosen

    def _methods(self) -> list[str]:
        if self.methods:
            return [m.strip() for m in self.methods.split(",")]
        if importlib.util.find_spec("peft") is None:
            err.print('without TempLoRA, which needs PEFT: pip install "locas[peft]"', style="yellow", markup=False)
            return [name for name in _NAMES if name != "templora"]
        return list(_NAMES)

    def _settings(self) -> BenchSettings:
        if not self.quick or self.settings != BenchSettings():
            return self.settings
        return BenchSettings(rounds=10)

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

    def _profile(self, backbone: Backbone) -> None:
        assert self.profile is not None
        trace = str(Path(self.output or ".") / f"profile-{backbone.name.replace('/', '-')}-{self.profile}.json")
        if self.profile not in _NAMES:
            raise UserError(f"--profile {self.profile}: choose from {', '.join(_NAMES)}")
        err.print(bench.profile_chunk(backbone, self._settings(), self.profile, trace), soft_wrap=True, markup=False)
        err.print(f"trace: {trace} (open it in ui.perfetto.dev)", soft_wrap=True, markup=False)

    def _write(self, result: dict[str, Any], runs: list[dict[str, Any]]) -> None:
        folder = Path(self.output or ".")
        write_atomically(folder / "bench.json", (json.dumps(result, indent=1) + "\n").encode())
        try:
            from locas.evaluate.bench_chart import draw

            draw([run for run in runs if "relative_time" in run], folder / "bench.png")
        except ModuleNotFoundError as error:
            err.print(f"no picture: {error}", style="yellow", soft_wrap=True, markup=False)


def load(name: str, dtype: Dtype, device: str) -> Backbone:
    """A backbone by name: the built-in one, a checkpoint, or a shape with random weights.

    Raises:
        UserError: the number of layers after the colon is none.
    """
    shape, _, layers = name.partition(":")
    if shape not in bench.SHAPES:
        return load_backbone(None if name == "builtin" else name, dtype=dtype, device=device)
    if layers and (not layers.isdecimal() or int(layers) < 1):
        raise UserError(f"--backbones {name}: after the colon goes a number of layers, 1 or more")
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    precision = {"auto": torch.bfloat16 if where.startswith("cuda") else torch.float32}
    chosen = precision.get(dtype) or getattr(torch, dtype)
    return bench.random_backbone(shape, dtype=chosen, device=where, layers=int(layers) if layers else None)


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
    timings = bench.generating(backbone, settings, step)
    return {
        "generating": {
            name: {"extra_time": t.ratio - 1, "quartiles": [q - 1 for q in t.quartiles]} for name, t in timings.items()
        }
        | {"rows": {"one": 1, "many": settings.many}}
    }


def _memory(backbone: Backbone, settings: BenchSettings, methods: list[str], step: Any) -> dict[str, Any]:
    chosen = list(dict.fromkeys([bench.REFERENCE, *methods]))
    found = bench.peaks(backbone, settings, chosen)
    for _i in range(settings.rounds + settings.warmup):
        step()
    return {"peak_bytes": found, "relative_memory": {m: n / found[bench.REFERENCE] for m, n in found.items()}}


def _length(backbone: Backbone, settings: BenchSettings, _: Any, step: Any) -> dict[str, Any]:
    positions = (10_000, 100_000, 1_000_000)
    return {"length": _figures(bench.over_lengths(backbone, settings, positions, True, step))}


def _documents(backbone: Backbone, settings: BenchSettings, _: Any, step: Any) -> dict[str, Any]:
    timings = bench.over_documents(backbone, settings, (1, 4, 16), step)
    return {"documents": {n: f | {"throughput": int(n) / f["ratio"]} for n, f in _figures(timings).items()}}


def _rank(backbone: Backbone, settings: BenchSettings, _: Any, step: Any) -> dict[str, Any]:
    return {"rank": _figures(bench.over_ranks(backbone, settings, (2, 16, 64, 256), step))}


def _figures(timings: dict[str, bench.Timing]) -> dict[str, dict[str, Any]]:
    return {name: {"ratio": t.ratio, "quartiles": t.quartiles} for name, t in timings.items()}


_PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "reading": _reading,
    "generating": _generating,
    "memory": _memory,
    "length": _length,
    "documents": _documents,
    "rank": _rank,
}
_WEIGHT = {"reading": 1, "generating": 2, "memory": 1, "length": 1, "documents": 1, "rank": 1}  # calls of a round


@contextmanager
def _bar(name: str, rounds: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(f"measuring on {name}", total=rounds)
        yield lambda: bar.advance(task)


# -------------------------------------------------------------------- what is shown


def tables(result: dict[str, Any]) -> list[Table]:
    """What was measured, as tables."""
    found = []
    settings = result["settings"]
    title = (
        f"{result['backbone']['name']} ({result['backbone']['dtype']}) on {result['device']}: window "
        f"{settings['window']:,}, chunk {settings['chunk']:,}, rank {settings['rank']}"
    )
    if "relative_time" in result:
        table = _table(title, "", "time", "quartiles", "tokens/s", "memory")
        memory = result.get("relative_memory", {})
        for method, ratio in result["relative_time"].items():
            low, high = result["quartiles"][method]
            table.add_row(
                _NAMES[method],
                f"{ratio:.2f}x",
                f"{low:.2f}-{high:.2f}",
                f"{result['tokens_per_second'][method]:,.0f}",
                f"{memory[method]:.2f}x" if method in memory else "",
            )
        found.append(table)
    if "generating" in result:
        table = _table("extra time of a generated token with memory", "", "median", "quartiles")
        for name, rows in result["generating"]["rows"].items():
            figures = result["generating"][name]
            low, high = figures["quartiles"]
            what = "1 row, 1 memory" if rows == 1 else f"{rows} rows, {rows} different memories"
            table.add_row(what, f"{100 * figures['extra_time']:+.1f}%", f"{100 * low:+.1f}% - {100 * high:+.1f}%")
        found.append(table)
    for part, title in (
        ("length", "a chunk that begins at token ... (context kept)"),
        ("documents", "a chunk of so many documents side by side"),
        ("rank", "read + learn at rank ... (window recomputed)"),
    ):
        if part in result:
            table = _table(title, "", "time", "quartiles", *(["throughput"] if part == "documents" else []))
            for name, figures in result[part].items():
                low, high = figures["quartiles"]
                more = [f"{figures['throughput']:.2f}x"] if "throughput" in figures else []
                shown = f"{int(name):,}" if name.isdecimal() else _NAMES[name]
                table.add_row(shown, f"{figures['ratio']:.2f}x", f"{low:.2f}-{high:.2f}", *more)
            found.append(table)
    return found


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


__all__ = ["Bench", "load", "tables"]
