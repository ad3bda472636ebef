"""From per-token losses of books to the figures that are reported."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from locas.evaluate.book import Book, Method
from locas.evaluate.books import REFERENCE, BooksRun, Losses
from locas.evaluate.statistics import LEVEL, RESAMPLES, cut, paired, perplexities
from locas.metrics import Score, brief

FORMAT, VERSION = "locas-books", 1
MARKS_TOKENS = (50_000, 100_000, 150_000, 200_000)  # where the literature reports
Figures = dict[str, Any]
_MEMORY = ("peak_bytes", "relative_memory")
_ALIKE_BITS = 1e-4  # by which one method may differ between two readings: rounding on another machine


def results(run: BooksRun) -> Figures:
    """The result file of a run that is complete.

    Raises:
        ValueError: a file of losses is damaged or of another run.
        FileNotFoundError: something has not been measured yet.
    """
    measured: dict[str, dict[str, list[Losses]]] = {m.label: {b.name: [] for b in run.books} for m in run.methods}
    for unit in run.units:
        measured[unit.method.label][unit.book.name].append(run.losses(unit))
    plain = measured[REFERENCE]
    methods = {m.label: _method(run, m, measured[m.label], plain) for m in run.methods}
    commits = {x.manifest["commit"] for books in measured.values() for runs in books.values() for x in runs}
    return {
        "format": FORMAT,
        "version": VERSION,
        **run.environment,
        "measured_at_commits": sorted(str(c) for c in commits),
        "seeds": run.seeds,
        "settings": {"read": asdict(run.read), "methods": {k: s.record() for k, s in run.setups.items()}},
        "books": [_book(b) | {"text": run.text_path(b).relative_to(run.folder).as_posix()} for b in run.books],
        "methods": methods,
        "paired": _pairs(methods),
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL, "over": "books", "seed": 0},
    }


def joined(earlier: Figures, later: Figures, order: Sequence[str] = ()) -> Figures:
    """Two result files on the same books as one, so that a method can be added without reading all of them again.

    What only the earlier one has says so (`cost_of_before`) if it is of another commit: its time and memory are
    relative to truncated reading as it was then. So does, in any result file, a method whose losses were measured at
    another commit than truncated reading's.

    Args:
        earlier: a result file.
        later: another; where both have a method, its figures are taken.
        order: labels of methods in the order wanted; others follow.

    Raises:
        ValueError: other books, another backbone, or a method that both have and that does not read alike in them.
    """
    _check_alike(earlier, later)
    kinds = [{(b["name"], b["tokens"], b["sha256"]) for b in report["books"]} for report in (earlier, later)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"these results cannot be joined: the books differ, {sorted(kinds[0] - kinds[1])} and "
            f"{sorted(kinds[1] - kinds[0])} are in one of them only"
        )
    for name in earlier["methods"].keys() & later["methods"].keys():
        one, other = earlier["methods"][name]["per_book"], later["methods"][name]["per_book"]
        for book in one:
            bits = [one[book]["bits_per_byte"], other[book]["bits_per_byte"]]
            if abs(bits[0] - bits[1]) > _ALIKE_BITS:
                raise ValueError(
                    f"these results cannot be joined: {name} needs {bits[0]:.6f} bits per byte on {book} in one and "
                    f"{bits[1]:.6f} in the other; what was measured has changed, measure it again"
                )

    def place(label: str) -> int:
        return order.index(label) if label in order else len(order)

    mark = {} if earlier["commit"] == later["commit"] else {"cost_of_before": True}
    before = {label: m | mark for label, m in earlier["methods"].items()}
    methods = before | later["methods"]
    methods = {label: methods[label] for label in sorted(methods, key=place)}
    settings = earlier["settings"]["methods"] | later["settings"]["methods"]
    return later | {
        "measured_at_commits": sorted({*earlier["measured_at_commits"], *later["measured_at_commits"]}),
        "seeds": sorted({*earlier["seeds"], *later["seeds"]}),
        "settings": later["settings"] | {"methods": {label: settings[label] for label in methods}},
        "methods": methods,
        "paired": _pairs(methods),
    }


def together(parts: Sequence[Figures]) -> Figures:
    """Result files of the same methods on different books as one, so that long readings can be done some at a time.

    Args:
        parts: result files; what they all have in common is the last one's.

    Raises:
        ValueError: a book twice, other methods, or methods with other settings or seeds.
    """
    *others, last = parts
    books = sorted((book for part in parts for book in part["books"]), key=lambda book: str(book["name"]))
    if len({book["name"] for book in books}) < len(books):
        raise ValueError("these results cannot be put together: a book is in two of them")
    for part in others:
        _check_alike(part, last)
        for key in ("seeds", "settings"):
            if part[key] != last[key]:
                raise ValueError(f"these results cannot be put together: {key} differ, {part[key]} and {last[key]}")
    names = [book["name"] for book in books]
    methods = {}
    for label, method in last["methods"].items():
        on = {name: on for part in parts for name, on in part["methods"][label]["per_book"].items()}
        undone = sum(part["methods"][label]["undone"] for part in parts)
        before = any(part["methods"][label].get("cost_of_before") for part in parts)
        mark = {"cost_of_before": True} if before else {}
        methods[label] = method | {"undone": undone} | mark | _over_books({name: on[name] for name in names})
    commits = {commit for part in parts for commit in part["measured_at_commits"]}
    return last | {
        "measured_at_commits": sorted(commits),
        "books": books,
        "methods": methods,
        "paired": _pairs(methods),
    }


def with_memory_of(report: Figures, beginnings: Figures) -> Figures:
    """A result file with the peaks of memory that were measured on its books' beginnings, of the methods that both have
    with the same settings: a peak is that of an early chunk, and does not depend on how far a book is read.

    Args:
        report: a result file.
        beginnings: another of the same books, read less far; what it has from an earlier commit (`cost_of_before`) is
            left out.

    Raises:
        ValueError: another backbone, or books that the beginnings lack.
    """
    _check_alike(report, beginnings)
    texts = {book["name"]: book["sha256"] for book in beginnings["books"]}
    lacking = [book["name"] for book in report["books"] if texts.get(book["name"]) != book["sha256"]]
    if lacking:
        raise ValueError(f"these results are of other books: there is no beginning of {', '.join(lacking)}")
    methods, taken = dict(report["methods"]), []
    for label, method in report["methods"].items():
        other = beginnings["methods"].get(label, {"cost_of_before": True})
        settings = [x["settings"]["methods"].get(label) for x in (report, beginnings)]
        if not other.get("cost_of_before") and settings[0] == settings[1]:
            new = {book: {k: other["per_book"][book][k] for k in _MEMORY} for book in method["per_book"]}
            per_book = {book: on | new[book] for book, on in method["per_book"].items()}
            methods[label] = method | _over_books(per_book)
            taken.append(label)
    tokens = max(book["tokens"] for book in beginnings["books"])
    about = {"commit": beginnings["commit"], "tokens": tokens, "methods": taken}
    return report | {"methods": methods, "memory_measured": about}


def _check_alike(one: Figures, other: Figures) -> None:
    for key in ("format", "version", "backbone", "bootstrap"):
        if one[key] != other[key]:
            raise ValueError(f"these results cannot be joined: {key} is {one[key]} and {other[key]}")


def _method(
    run: BooksRun, method: Method, measured: dict[str, list[Losses]], plain: dict[str, list[Losses]]
) -> Figures:
    runs = list(itertools.chain.from_iterable(measured.values()))
    first = runs[0]
    of_one_commit = all(
        x.manifest["commit"] == plain[book][0].manifest["commit"] for book, some in measured.items() for x in some
    )
    per_book = {
        b.name: _on_book(b, measured[b.name], plain[b.name])
        | {"losses": [_file(run, seed, b.name, method) for seed in run.seeds_of(method)]}
        for b in run.books
    }
    return {
        "parameters": first.n_parameters,
        "parameters_relative": first.n_parameters / run.backbone.n_parameters,
        "undone": sum(x.undone for x in runs),
        "seeds": sorted({int(x.manifest["seed"]) for x in runs}),
        **({} if of_one_commit else {"cost_of_before": True}),
        **_over_books(per_book),
    }


def _over_books(per_book: dict[str, Figures]) -> Figures:
    """What follows from one method's figures of each book."""
    books = list(per_book.values())
    return {
        **_pool(books),
        "bits_per_byte_mean_over_books": _mean(b["bits_per_byte"] for b in books),
        "at": {
            str(mark): {"books": len(some), **_pool(some)}
            for mark in MARKS_TOKENS
            if (some := [b["at"][str(mark)] for b in books if str(mark) in b["at"]])
        },
        "seconds": sum(b["seconds"] for b in books),
        "relative_time": _mean(b["relative_time"] for b in books),
        "peak_bytes": max(b["peak_bytes"] for b in books),
        "relative_memory": _mean(b["relative_memory"] for b in books),
        "per_book": per_book,
    }


def _on_book(book: Book, runs: Sequence[Losses], plain: Sequence[Losses]) -> Figures:
    """One method on one book: means over seeds, and what each seed gave."""
    n = book.ids.numel()
    stops = plain[0].stops  # of every method, also of one that reads in shorter chunks: means over others say nothing
    whole = _upto(book, runs, n, stops)
    return {
        **whole,
        "bits_per_byte_of_seeds": [Score.of(x.nll, len(book.text)).bits_per_byte for x in runs],
        "at": {str(mark): _upto(book, runs, mark, stops) for mark in MARKS_TOKENS if mark <= n},
        "seconds": _mean(x.seconds for x in runs),
        "relative_time": _mean(x.relative_time for x in runs),
        "peak_bytes": max(x.peak_bytes for x in runs),
        "relative_memory": max(x.peak_bytes for x in runs) / p if (p := plain[0].peak_bytes) else math.nan,
    }


def _upto(book: Book, runs: Sequence[Losses], tokens: int, stops: Sequence[int]) -> Figures:
    """Figures of a book's first `tokens` tokens, mean over seeds; `nll` is the sum, in nats. stops: ends of chunks."""
    n_bytes = int(book.ends[tokens - 1])
    scores = [Score.of(x.nll[:tokens], n_bytes) for x in runs]
    nll = _mean(s.nll for s in scores)
    scored = scores[0].tokens
    chunked = _mean(perplexities(x.nll[:tokens], cut(stops, tokens))[1] for x in runs)
    return {**brief(Score(scored, n_bytes, nll)), "perplexity_chunk_mean": chunked}


def _pool(parts: Sequence[Figures]) -> Figures:
    """Several books taken as one text; chunk-mean perplexity weighted by tokens, as its definition has it."""
    total = Score(0, 0, 0.0)
    for part in parts:
        total = total + Score(part["tokens"], part["bytes"], part["nll"])
    chunked = sum(p["perplexity_chunk_mean"] * p["tokens"] for p in parts if p["tokens"])
    return {**brief(total), "perplexity_chunk_mean": chunked / total.tokens if total.tokens else math.nan}


def _pairs(methods: Figures) -> list[Figures]:
    """Every method minus every one listed before it, in bits per byte, book by book."""
    pairs = []
    for other, one in itertools.combinations(methods, 2):
        bits = [{k: b["bits_per_byte"] for k, b in methods[m]["per_book"].items()} for m in (one, other)]
        found = paired(*bits)
        pairs.append(
            {
                "method": one,
                "minus": other,
                "mean": found.interval.mean,
                "low": found.interval.low,
                "high": found.interval.high,
                "better_on": found.better,
                "books": len(found.differences),
                "per_book": found.differences,
            }
        )
    return pairs


def _book(book: Book) -> Figures:
    return {"name": book.name, "tokens": book.ids.numel(), "bytes": len(book.text), "sha256": book.sha256}


def _file(run: BooksRun, seed: int, book: str, method: Method) -> str:
    """Where the losses lie, relative to the run's folder."""
    (unit,) = [u for u in run.units if (u.seed, u.book.name, u.method.label) == (seed, book, method.label)]
    return (unit.measured() or unit.path).relative_to(run.folder).as_posix()


def _mean(values: Iterable[float]) -> float:
    """The mean of those that are numbers."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan
