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
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from locas.cli import main as locas
from locas.evaluate.book import Method
from locas.evaluate.books_figures import joined
from locas.evaluate.report import differences_picture
from locas.evaluate.weights import RECIPES
from locas.store import write_atomically

ROOT = Path(__file__).parents[1]
METHODS = (
    "truncation",
    "locas",
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
    parser.add_argument("--join", type=Path, help="earlier results on the same books, whose methods are kept")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "books.json")
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
    if status == 0 and not args.books:
        found = json.loads((args.output / "results.json").read_text())
        if args.join:
            found = joined(json.loads(args.join.read_text()), found, methods(list(METHODS), args.tuned))
        write_atomically(args.results, (json.dumps(found, indent=1) + "\n").encode())
        write_atomically(args.results.with_suffix(".png"), differences_picture(found))
    return status


if __name__ == "__main__":
    sys.exit(main())
