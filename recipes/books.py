"""The headline comparison: every test book, read online by every method.

    python recipes/books.py ../shared/data/books/test -o runs/books                    # whole books
    python recipes/books.py ../shared/data/books/test -o runs/books --max-tokens 12288 \
        --results results/books_12k.json                                               # their beginnings

Baselines run with the settings that `recipes/tune_baselines.py` chose on the development books. Losses, page and
pictures go to the folder; figures also to `results/books.json`, with a picture of the differences beside it. Stop it at
any time: the same command goes on, and beginnings of what was read further are not read again. Two processes may work
on different books (--books) with one folder; a last run over all of them puts the results together. With --join a
method is added to results that are there:

    python recipes/books.py ../shared/data/books/test -o runs/books --methods lora-eva --join results/books.json

Readings that take longer than a machine is at hand are done some books at a time, and put together at the end:

    python recipes/books.py ../shared/data/books/test -o runs/1 --methods templora-tuned --books 7987,6412 \
        --results results/parts/1.json
    python recipes/books.py ../shared/data/books/test -o runs/2 --methods templora-tuned --books ALL,THE,OTHERS \
        --parts results/parts/1.json --join results/books_whole.json --results results/books_whole.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from locas.cli import main as locas
from locas.evaluate.book import Method
from locas.evaluate.books_figures import joined, together
from locas.evaluate.report import differences_picture
from locas.evaluate.weights import RECIPES
from locas.store import write_atomically

ROOT = Path(__file__).parents[1]
METHODS = (
    "truncation",
    "locas",
    "locas:attention_gradient=full",
    "locas-recomputed",
    "locas-recomputed:damping=0.1:lr=0.1",
    "locas-recomputed:reuse=true:chunk=256",
    "truncation:reuse=true:chunk=256",
    "locas-paper",
    "templora-paper",
    "templora-tuned",
    "lora-pissa",
    "lora-eva",
    "ffn-inplace",
    "dynamic",
)  # attention is truncation where the window is all that the backbone was trained for


def methods(names: list[str], tuned: Path) -> list[str]:
    """The methods with the options that were chosen for them, e.g. "dynamic:lr=0.0003:steps=2"."""
    chosen = json.loads(tuned.read_text())["chosen"] if tuned.exists() else {}
    return [_short(chosen.get(name, name)) for name in names]


def _short(method: str) -> str:
    """Without the options that the method has anyway, so that results are called the same."""
    parsed = Method.parse(method)
    recipe = RECIPES.get(parsed.name)
    given = {k: v for k, v in parsed.options.items() if getattr(recipe, k, None) != v}
    return ":".join([parsed.name, *(f"{k}={v}" for k, v in given.items())])


def main() -> int:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the books")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for losses, page and pictures")
    parser.add_argument("--max-tokens", type=int, help="read so many of each book's first tokens (default: all)")
    parser.add_argument("--books", help="only these, by file stem, with commas between")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas between (default: %(default)s)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--model", help="backbone (default: the built-in one)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--tuned", type=Path, default=ROOT / "results" / "tune_baselines.json")
    parser.add_argument("--parts", type=Path, nargs="+", default=[], help="results of the same methods on other books")
    parser.add_argument("--join", type=Path, help="earlier results on the same books, whose methods are kept")
    parser.add_argument(
        "--results", type=Path, help="where the figures go (default: results/books.json, or nowhere with --books)"
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    books = sorted(p for p in args.folder.glob("*.txt") if not args.books or p.stem in args.books.split(","))
    names = ",".join(methods(args.methods.split(","), args.tuned))
    command = ["eval", "books", *map(str, books), "--gutenberg", "--reflow", "--methods", names]
    command += ["--seeds", args.seeds, "-o", str(args.output)]
    command += ["--max-tokens", str(args.max_tokens)] if args.max_tokens else []
    command += ["--model", args.model] if args.model else []
    status = locas(command)
    goes_to = args.results or (None if args.books else ROOT / "results" / "books.json")
    if status == 0 and goes_to:
        found = together([json.loads(path.read_text()) for path in (*args.parts, args.output / "results.json")])
        if args.join:
            found = joined(json.loads(args.join.read_text()), found, methods(list(METHODS), args.tuned))
        goes_to.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(goes_to, (json.dumps(found, indent=1) + "\n").encode())
        write_atomically(goes_to.with_suffix(".png"), differences_picture(found))
    return status


if __name__ == "__main__":
    sys.exit(main())
