"""Choose every baseline's learning rate and steps on development books; never on test books.

    python recipes/tune_baselines.py ../shared/data/books/dev -o runs/tune --max-tokens 30000
    python recipes/tune_baselines.py --table

Each baseline gets the settings with the lowest mean of bits per byte over the books; `recipes/books.py` uses them. What
is already measured is not run again. A setting that diverges on a book counts as infinitely bad.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import locas
from locas.evaluate.book import Book, Method
from locas.evaluate.books import REFERENCE, BooksRun
from locas.evaluate.cells import finite
from locas.metrics import Score
from locas.store import write_atomically
from locas.text import collect

ROOT = Path(__file__).parents[1]
BOOKS = "5962,26239"  # prose in the form that the built-in backbone knows


def grid() -> Iterator[str]:
    """Every setting that is tried."""
    yield REFERENCE
    yield from (f"templora-tuned:lr={lr:g}" for lr in (5e-4, 1e-3, 2e-3, 4e-3))
    for steps in (1, 2):
        yield from (f"lora-pissa:lr={lr:g}:steps={steps}" for lr in (3e-4, 1e-3, 3e-3))
        yield from (f"lora-eva:lr={lr:g}:steps={steps}" for lr in (1e-3, 2e-3, 4e-3))
        yield from (f"ffn-inplace:lr={lr:g}:steps={steps}" for lr in (1e-4, 3e-4, 1e-3))
        yield from (f"dynamic:lr={lr:g}:steps={steps}" for lr in (1e-4, 3e-4, 6e-4))
        yield from (f"locas:lr={lr:g}:steps={steps}" for lr in (0.05, 0.1))


def bits(backbone: locas.Backbone, book: Book, folder: Path, method: str) -> dict[str, Any]:
    """Bits per byte and seconds of one setting on one book; infinite where it diverged."""
    run = BooksRun(backbone, [book], folder, [Method.parse(method)])
    unit = run.units[-1]
    row = {"method": method, "book": book.name, "setup": asdict(unit.setup)}
    try:
        for _ in run:
            pass
    except FloatingPointError as error:
        print(error, file=sys.stderr)
        return row | {"bits_per_byte": math.inf}
    found = run.losses(unit)
    score = Score.of(found.nll, len(book.text))
    cost = {"relative_time": found.relative_time, "parameters": found.n_parameters}
    return row | {"bits_per_byte": score.bits_per_byte, "tokens": score.tokens, **cost}


def choose(rows: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, str]]:
    """({method: mean bits per byte}, {name: its best method})."""
    values: dict[str, list[float]] = {}
    for row in rows:
        value = row["bits_per_byte"]
        values.setdefault(row["method"], []).append(math.inf if value is None else value)
    means = {method: sum(v) / len(v) for method, v in values.items()}
    chosen: dict[str, str] = {}
    for method in sorted(means, key=lambda m: means[m]):
        chosen.setdefault(method.partition(":")[0], method)
    chosen.pop("locas", None)  # its defaults were chosen by recipes/sweep.py; here only for comparison
    return means, chosen


def main() -> int:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="folder with the development books")
    parser.add_argument("-o", "--output", type=Path, help="folder for losses")
    parser.add_argument("--books", default=BOOKS, help="by file stem, with commas between (default: %(default)s)")
    parser.add_argument("--only", help="only methods whose name begins so")
    parser.add_argument("--max-tokens", type=int, default=30_000)
    parser.add_argument("--model", help="backbone (default: the built-in one)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "tune_baselines.json")
    parser.add_argument("--table", action="store_true", help="print what has been measured, and stop")
    args = parser.parse_args()
    if args.table or args.folder is None or args.output is None:
        report = json.loads(args.results.read_text())
        for method, mean in sorted(report["means"].items(), key=lambda item: item[1] or math.inf):
            print(f"{mean or math.inf:.4f}  {method}{'  *' if method in report['chosen'].values() else ''}")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    backbone = locas.load_backbone(args.model)
    paths = [args.folder / f"{stem}.txt" for stem in args.books.split(",")]
    documents = collect(paths, gutenberg=True, reflow=True)
    books = [Book.of(document, backbone, args.max_tokens) for document in documents]
    rows: list[dict[str, Any]] = []
    for method in [m for m in grid() if not args.only or m.startswith(args.only)]:
        for book in books:
            rows.append(bits(backbone, book, args.output, method))
            print(f"{rows[-1]['bits_per_byte']:.4f}  {book.name}  {method}", flush=True)
        means, chosen = choose(rows)
        environment = BooksRun(backbone, books, args.output, []).environment
        settings = {"books": args.books, "max_tokens": args.max_tokens}
        report = {**environment, "seeds": [0], "settings": settings, "means": means, "chosen": chosen, "results": rows}
        write_atomically(args.results, (json.dumps(finite(report), indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
