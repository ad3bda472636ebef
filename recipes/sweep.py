"""Choose settings on the development books: read each book with each setting of a grid, beside truncated reading.

    python recipes/sweep.py ../shared/data/books/dev --grid scale --books 5962,26239 --max-tokens 30000
    python recipes/sweep.py ../shared/data/books/dev --grid whole            # every book, to its end
    python recipes/sweep.py ../shared/data/books/dev --ablations -o results/ablations.json --max-tokens 16000
    python recipes/sweep.py --table                                          # what has been measured so far

Results go to one JSON file, a row for each (grid entry, book); what is already there is not run again, so a sweep can
be stopped and gone on with at any time, with the same backbone and versions (see `_setup.py`). The text is stripped of
Project Gutenberg's wrapping and reflowed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from _setup import book_paths, options, quiet_backbone, read_report, resumed, write_report

import locas
from locas.backbone import Backbone
from locas.evaluate.provenance import environment
from locas.run_settings import PRESETS
from locas.text import collect

INIT, READ, WRITE = locas.InitSettings, locas.ReadSettings, locas.WriteSettings
KEPT = PRESETS["default"].read  # as `locas memorize` reads
PAPER = WRITE(rule="adamw", lr=4e-3, floor=1.0)  # the same step throughout


@dataclass(frozen=True)
class Entry:
    """One setting of a grid; None as `init` is truncated reading."""

    name: str
    init: locas.InitSettings | None = field(default_factory=INIT)
    read: locas.ReadSettings = field(default_factory=READ)
    layers: tuple[int, ...] | None = None


def grids() -> dict[str, list[Entry]]:
    """Every grid, by name."""
    scale = [
        Entry(
            f"rank {rank}, tau {per_slot:g} a slot, lr {lr:g}",
            INIT(rank=rank, tau_scale=per_slot * rank),
            _constant(lr),
        )
        for rank, choices in (
            (2, ((4.0, 0.1), (16.0, 0.1), (16.0, 0.05), (4.0, 0.2), (64.0, 0.05))),
            (64, ((2.0, 0.1), (2.0, 0.2), (4.0, 0.05), (4.0, 0.1), (4.0, 0.2))),
            (16, ((4.0, 0.1), (4.0, 0.2), (8.0, 0.1))),
        )
        for per_slot, lr in choices
    ]
    return {
        "scale": scale,
        "momentum": [
            Entry(f"momentum {m:g}, lr {lr:g}", INIT(tau_scale=256.0), READ(write=WRITE(momentum=m, lr=lr, floor=1.0)))
            for m in (0.0, 0.5, 0.7, 0.8, 0.9)
            for lr in (0.05, 0.1)
        ],
        "schedule": [
            Entry(f"row step {lr:g}, held for {hold}, floor {floor:g}", read=_schedule(lr, hold, floor))
            for lr, hold, floor in (
                (0.07, 8, 0.35),
                (0.07, 4, 0.35),
                (0.07, 16, 0.35),
                (0.05, 16, 0.5),
                (0.1, 4, 0.25),
                (0.2, 1, 0.125),
            )
        ],
        "long chunk": [
            *(Entry(f"momentum {m:g}", read=READ(write=WRITE(momentum=m))) for m in (0.0, 0.3, 0.5, 0.7, 0.85)),
            *(Entry(f"tau {t:g} a slot", INIT(tau_scale=64.0 * t)) for t in (2.0, 8.0, 16.0)),
            *(
                Entry(f"{n} steps, row step {lr:g}", read=READ(steps=n, write=WRITE(lr=lr)))
                for n, lr in ((2, 0.035), (2, 0.07))
            ),
        ],
        "speed": [
            Entry(f"{context}, {gradient}{where}", read=replace(read, attention_gradient=gradient), layers=layers)  # type: ignore[arg-type]
            for context, read in (("window recomputed", READ()), ("context kept", READ(reuse=True, chunk=1024)))
            for gradient in ("full", "values", "stop")
            for where, layers in (("", None), (", upper half", (3, 4, 5)))
        ],
        "memorize": [  # what it reads with, at every attention gradient, and in shorter chunks
            *(
                Entry(f"memorize, {g}", read=replace(KEPT, chunk=256, attention_gradient=g))  # type: ignore[arg-type]
                for g in ("full", "values", "stop")
            ),
            Entry("memorize, values, chunk 128", read=replace(KEPT, chunk=128)),
            Entry(
                "memorize, values, chunk 128, held for 16",
                read=replace(KEPT, chunk=128, write=replace(KEPT.write, hold=16)),
            ),
        ],
        "metric": [  # of curvature: at how many writes it is made anew
            Entry(
                f"memorize, metric anew at one write in {n}",
                read=replace(KEPT, write=replace(KEPT.write, damping_every=n)),
            )
            for n in (1, 8)
        ],
        "kept chunk": [  # with the context kept, short chunks cost little more than long ones
            Entry(f"context kept, chunk {c}{more}", read=READ(reuse=True, chunk=c, write=write))
            for c, more, write in (
                (1024, "", WRITE()),
                (512, "", WRITE()),
                (256, "", WRITE()),
                (256, ", held for 32", WRITE(hold=32)),
                (256, ", momentum 0.7", WRITE(momentum=0.7)),
                (128, "", WRITE()),
            )
        ],
        "window": [
            Entry(f"window {w}, chunk {c}", read=READ(window=w, chunk=c))
            for w, c in ((512, 256), (1024, 512), (2048, 256), (2048, 512), (2048, 1024))
        ],
        "steps": [Entry("two steps", read=READ(steps=2)), Entry("no clipping", read=READ(write=WRITE(clip=False)))],
        "start": [Entry("start token in every window", read=READ(start_in_every_window=True))],
        "init": [
            Entry(f"{name}, rank {rank}", INIT(rank=rank, init=name))  # type: ignore[arg-type]
            for rank in (64, 8)
            for name in ("top-k", "bottom-k", "random-rows", "gaussian", "activation")
        ],
        "adamw": [Entry(f"adamw lr {lr:g}", read=_adamw(lr)) for lr in (4e-3, 8e-3, 1.6e-2)],
        "paper": [Entry("paper", INIT(tau_scale=1.0), READ(write=PAPER))],
        "mlp": [
            *(
                Entry(
                    f"mlp, {init}, tau {s:g} a slot, row step {lr:g}",
                    _mlp(init, s),
                    replace(KEPT, write=replace(KEPT.write, lr=lr)),
                )
                for init, s, lr in (
                    *(("top-k", 4.0, lr) for lr in (0.07, 0.035, 0.14)),
                    *(("top-k", s, 0.07) for s in (2.0, 8.0)),
                    *((name, 4.0, 0.07) for name in ("bottom-k", "random-rows", "gaussian", "activation", "step-wise")),
                    *(("step-wise", s, 0.07) for s in (0.25, 0.5, 1.0)),
                    *(("step-wise", 4.0, lr) for lr in (0.01, 0.02)),
                )
            ),
            *(
                Entry(f"mlp, paper, {init}", INIT(variant="mlp", init=init, tau_scale=1.0), READ(write=PAPER))
                for init in ("paper", "top-k")
            ),
        ],
        "layers": [Entry("upper half", layers=(3, 4, 5))],
        "whole": [Entry("default")],
        "rank 2": [Entry("rank 2", INIT(rank=2))],
        **ablations(),
    }


def ablations() -> dict[str, list[Entry]]:
    """One setting at a time away from the default, and initialisations at the paper's settings as well as at ours."""
    scales = (("the paper's tau", 1.0), ("1 a slot", 64.0), ("4 a slot", 256.0), ("16 a slot", 1024.0))
    return {
        "ablate-init": [
            Entry(f"ours, rank {rank}: {name}{_of(seed)}", INIT(rank=rank, init=init, seed=seed))  # type: ignore[arg-type]
            for rank in (64, 8)
            for name, init, seed in _strategies()
        ],
        "ablate-init-paper": [
            Entry(f"paper, {rate}: {name}{_of(seed)}", INIT(init=init, seed=seed, tau_scale=1.0), _adamw(lr))  # type: ignore[arg-type]
            for rate, lr in (("lr 4e-3", 4e-3), ("lr 1.6e-2", 1.6e-2))
            for name, init, seed in _strategies()
        ],
        "ablate-rank": [Entry(f"rank {r}", INIT(rank=r)) for r in (2, 4, 8, 16, 32, 64, 128)],
        "ablate-lr": [Entry(f"row step {lr:g}", read=_muon(lr)) for lr in (0.018, 0.035, 0.07, 0.14, 0.28)],
        "ablate-rule": [Entry(f"adamw {lr:g}", read=_adamw(lr)) for lr in (2e-3, 4e-3, 8e-3)],
        "ablate-chunk": [Entry(f"chunk {c}", read=READ(chunk=c)) for c in (128, 256, 512, 1024)],
        "ablate-steps": [Entry(f"{n} steps a chunk", read=READ(steps=n)) for n in (1, 2, 3)],
        "ablate-layers": [
            Entry(f"layers {name}", layers=layers)
            for name, layers in (
                ("3-5", (3, 4, 5)),
                ("0-2", (0, 1, 2)),
                ("1, 3, 5", (1, 3, 5)),
                ("5", (5,)),
                ("0", (0,)),
            )
        ],
        "ablate-clip": [
            Entry("clipping off", read=READ(write=WRITE(clip=False))),
            Entry("paper, clipping off", INIT(tau_scale=1.0), READ(write=replace(PAPER, clip=False))),
        ],
        "ablate-tau": [Entry(f"tau: {name}", INIT(tau_scale=scale)) for name, scale in scales],
        "ablate-window": [Entry(f"window {w}", read=READ(window=w, chunk=w // 2)) for w in (256, 512, 1024, 2048)],
    }


def _strategies() -> list[tuple[str, str, int]]:
    """(name, strategy, seed): three seeds for the random ones."""
    fixed = [(name, name, 0) for name in ("top-k", "bottom-k", "activation")]
    return fixed + [(name, name, seed) for name in ("random-rows", "gaussian") for seed in (0, 1, 2)]


def _of(seed: int) -> str:
    return f", seed {seed}" if seed else ""


def _adamw(lr: float) -> locas.ReadSettings:
    return READ(write=replace(PAPER, lr=lr))


def _muon(lr: float) -> locas.ReadSettings:
    return READ(write=WRITE(lr=lr))


def _schedule(lr: float, hold: int, floor: float) -> locas.ReadSettings:
    return READ(write=WRITE(lr=lr, hold=hold, floor=floor))


def _constant(lr: float) -> locas.ReadSettings:
    return READ(write=WRITE(lr=lr, floor=1.0))


def _mlp(init: str, per_slot: float) -> locas.InitSettings:
    return INIT(variant="mlp", init=init, tau_scale=per_slot * 64)  # type: ignore[arg-type]


def loss(backbone: Backbone, ids: torch.Tensor, entry: Entry) -> tuple[float, float, int]:
    """(sum of the tokens' losses in nats, seconds, memory parameters) of one reading."""
    began = time.perf_counter()
    model, start_id = backbone.model, backbone.start_id
    read = entry.read
    if read.start_in_every_window is None:
        read = READ(**(_shallow(read) | {"start_in_every_window": backbone.start_in_every_window}))
    memory = None
    if entry.init is not None:
        first = ids[: read.sizes(model)[1]]
        layers = None if entry.layers is None else list(entry.layers)
        memory = locas.create(model, first, entry.init, layers=layers, start_id=start_id)
    records = locas.read(model, memory, ids, read, start_id=start_id)
    nll = torch.cat([record.nll for record in records]).double()
    return float(nll.nansum()), time.perf_counter() - began, memory.n_parameters if memory else 0


def _shallow(settings: Any) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def rows(
    backbone: Backbone, book: Path, entries: list[Entry], max_tokens: int | None, known: set[str]
) -> Iterator[dict[str, Any]]:
    """What is not yet known of one book."""
    (document,) = collect([book], gutenberg=True, reflow=True)
    ids, n_bytes = backbone.encode(document.text, max_tokens)
    for entry in entries:
        what = {"book": book.stem, "tokens": ids.numel(), "bytes": n_bytes, "settings": asdict(entry)}
        if _key(what) in known:
            continue
        nll, seconds, parameters = loss(backbone, ids, entry)
        yield what | {"nll": nll, "seconds": round(seconds, 1), "parameters": parameters}


def _key(row: dict[str, Any]) -> str:
    """What a row is known by, within a result file (which is of one backbone)."""
    settings = {k: v for k, v in row["settings"].items() if k != "name"}
    return json.dumps([row["book"], row["tokens"], settings], sort_keys=True)


def table(results: list[dict[str, Any]]) -> str:
    """Perplexity change against truncated reading, a line for each setting, a column for each book."""
    plain = baselines(results)
    lines: dict[tuple[str, str], dict[str, float]] = {}
    for row in results:
        base = baseline(row, plain)
        if base is None or row["settings"]["init"] is None:
            continue
        kind = "whole" if row["whole"] else f"{row['tokens']:,}"
        change = 100 * (math.exp((row["nll"] - base["nll"]) / row["tokens"]) - 1)
        lines.setdefault((kind, row["settings"]["name"]), {})[row["book"]] = change
    out = []
    for (kind, name), changes in lines.items():
        cells = "  ".join(f"{book} {change:+.2f}%" for book, change in sorted(changes.items()))
        out.append(f"{kind:>7}  {name:<44} mean {sum(changes.values()) / len(changes):+.2f}%   {cells}")
    return "\n".join(out)


def baselines(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of truncated reading, by what is read and in which windows and chunks."""
    return {_place(row): row for row in results if row["settings"]["init"] is None}


def baseline(row: dict[str, Any], plain: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Truncated reading of the same tokens: in the same chunks, or where a memory kept its context in longer ones."""
    return plain.get(_place(row), plain.get(_place(row, truncated=True)))


def _place(row: dict[str, Any], truncated: bool = False) -> str:
    read = row["settings"]["read"]
    chunk = None if truncated and read.get("reuse") else read["chunk"]
    return json.dumps([row["book"], row["tokens"], read["window"], chunk, read["start_in_every_window"]])


def main() -> int:
    """Runs what the arguments ask for."""
    parser = options(__doc__)
    parser.add_argument("--grid", choices=sorted(grids()), action="append", help="which settings (may be repeated)")
    parser.add_argument("--ablations", action="store_true", help="all grids whose name begins with ablate-")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/sweep.json"))
    args = parser.parse_args()
    if args.table or args.folder is None:
        print(table(read_report(args.output)["results"]))
        return 0
    backbone, books = quiet_backbone(args), book_paths(args)
    report = resumed(args.output, where := environment(backbone))
    for name in (args.grid or []) + (list(ablations()) if args.ablations else []):
        entries = grids()[name]
        sizes = {(r.window, r.chunk, r.start_in_every_window) for r in (e.read.truncated() for e in entries)}
        truncated = [
            Entry("truncated reading", None, READ(window=w, chunk=c, start_in_every_window=s))
            for w, c, s in sorted(sizes, key=str)
        ]
        for book in books:
            known = {_key(row) for row in report["results"]}
            for row in rows(backbone, book, truncated + entries, args.max_tokens, known):
                more = {"grid": name, "whole": args.max_tokens is None, "commit": where["commit"]}
                report["results"].append(row | more)
                report |= where | {"seeds": [0], "settings": where["backbone"]}
                write_report(args.output, report)
                what = f"{name:>9}  {row['book']:>6}  {row['settings']['name']:<44}"
                print(f"{what} {row['nll'] / row['tokens']:.4f} nats  {row['seconds']:.0f} s", flush=True)
    print(table(report["results"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
