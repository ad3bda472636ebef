"""Choose every baseline's learning rate and steps on development books; never on test books.

    python recipes/tune_baselines.py ../shared/data/books/dev -o runs/tune --max-tokens 30000
    python recipes/tune_baselines.py ../shared/data/books/dev -o runs/tune --only templora-tuned,dynamic  # some of them
    python recipes/tune_baselines.py --table           # what was chosen (*), and whether it is at the edge of the grid

Each baseline gets the settings with the lowest mean of bits per byte over the books; `recipes/books.py` uses them. What
the folder has is not run again, and the result file keeps what is not measured again: it must be of the same books,
backbone and versions (see `_setup.py`). A setting that diverges on a book counts as infinitely bad. Nothing takes more
updates a chunk than TempLoRA's two: some would gain a little by a third, at half as much time again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from _setup import book_paths, options, quiet_backbone, read_report, resumed, write_report

import locas
from locas.evaluate.book import Book, Method
from locas.evaluate.books import REFERENCE, BooksRun
from locas.evaluate.provenance import environment
from locas.evaluate.weights import RECIPES
from locas.metrics import Score
from locas.text import collect

ROOT = Path(__file__).parents[1]
MOST_STEPS = RECIPES["templora-tuned"].steps  # for a chunk; settings with more may be in the file, and are not chosen
BOOKS = "5962,26239"  # prose in the form that the built-in backbone knows


def grid() -> Iterator[str]:
    """Every setting that is tried: where the best was at an edge, one value beyond it was added (see `edges`)."""
    yield REFERENCE
    yield from (f"templora-tuned:lr={lr:g}" for lr in (1e-3, 2e-3, 4e-3, 8e-3))  # two steps are its own
    for steps in range(1, MOST_STEPS + 1):
        yield from (f"lora-pissa:lr={lr:g}:steps={steps}" for lr in (3e-4, 1e-3, 3e-3))
        yield from (f"lora-eva:lr={lr:g}:steps={steps}" for lr in (1e-3, 2e-3, 4e-3, 8e-3))
        yield from (f"ffn-inplace:lr={lr:g}:steps={steps}" for lr in (1e-4, 3e-4, 1e-3, 3e-3))
        yield from (f"dynamic:lr={lr:g}:steps={steps}" for lr in (1e-4, 3e-4, 6e-4))
    for steps in (1, 2):
        yield from (f"locas-recomputed:lr={lr:g}:steps={steps}" for lr in (0.05, 0.07, 0.1, 0.14))


def bits(backbone: locas.Backbone, book: Book, folder: Path, method: str) -> dict[str, Any]:
    """Bits per byte and seconds of one setting on one book; infinite where it diverged."""
    run = BooksRun(backbone, [book], folder, [Method.parse(method)])
    unit = run.units[-1]
    row = {"method": method, "book": book.name, "setup": unit.setup.record(), "commit": run.environment["commit"]}
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
    for method in sorted((m for m in means if (_resolved(m)["steps"] or 1) <= MOST_STEPS), key=lambda m: means[m]):
        chosen.setdefault(method.partition(":")[0], method)
    chosen.pop("locas-recomputed", None)  # its defaults were chosen by recipes/sweep.py; here only for comparison
    return means, chosen


def edges(method: str, tried: Iterable[str]) -> list[str]:
    """Where the best may lie beyond what was tried, e.g. ["lr above 0.001"]: for each option, beside the values that
    were tried with the others as they are. Nothing is below one step."""
    chosen = _resolved(method)
    name, found = method.partition(":")[0], []
    others = [_resolved(m) for m in tried if m.partition(":")[0] == name]
    for key, value in chosen.items():
        values = [options[key] for options in others if options | {key: value} == chosen]
        found += [f"{key} above {value:g}"] if value == max(values) else []
        found += [f"{key} below {value:g}"] if value == min(values) and (key, value) != ("steps", 1) else []
    return found


def _resolved(method: str) -> dict[str, Any]:
    """Learning rate and steps, as given or the method's own."""
    parsed = Method.parse(method)
    recipe = RECIPES.get(parsed.name)
    return {key: parsed.options.get(key, getattr(recipe, key, None)) for key in ("lr", "steps")}


def earlier(path: Path, here: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the result file.

    Raises:
        SystemExit: it is of other books, or see `resumed`.
    """
    report = resumed(path, here, "--results")
    if report["results"] and report["settings"] != settings:
        raise SystemExit(f"{path} was measured with {report['settings']}, not {settings}; give another --results")
    rows: list[dict[str, Any]] = report["results"]
    return rows


def main() -> int:
    """Runs what the arguments ask for."""
    parser = options(__doc__, books=BOOKS, max_tokens=30_000)
    parser.add_argument("-o", "--output", type=Path, help="folder for losses")
    parser.add_argument("--only", help="only methods whose name begins so, with commas between")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "tune_baselines.json")
    args = parser.parse_args()
    if args.table or args.folder is None or args.output is None:
        report = read_report(args.results)
        for method, mean in sorted(report.get("means", {}).items(), key=lambda item: item[1] or math.inf):
            mark = ""
            if method in report["chosen"].values():
                beyond = edges(method, report["means"]) if method.partition(":")[0] in RECIPES else []
                mark = "  *" + (f" at the edge: no {', no '.join(beyond)} was tried" if beyond else "")
            print(f"{mean or math.inf:.4f}  {method}{mark}")
        return 0
    backbone, settings = quiet_backbone(args), {"books": args.books, "max_tokens": args.max_tokens}
    rows = earlier(args.results, where := environment(backbone), settings)
    documents = collect(book_paths(args), gutenberg=True, reflow=True)
    books = [Book.of(document, backbone, args.max_tokens) for document in documents]
    wanted = [m for m in grid() if not args.only or m.startswith(tuple(args.only.split(",")))]
    for method in wanted:
        measured = [bits(backbone, book, args.output, method) for book in books]
        for row in measured:
            print(f"{row['bits_per_byte']:.4f}  {row['book']}  {method}", flush=True)
        rows = [row for row in rows if row["method"] != method] + measured
        means, chosen = choose(rows)
        more = {"seeds": [0], "settings": settings, "means": means, "chosen": chosen, "results": rows}
        write_report(args.results, where | more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
