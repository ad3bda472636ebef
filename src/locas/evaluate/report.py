"""A books evaluation as one page that opens offline, with its charts as pictures beside it.

write_report("results/books")      # reads results.json and what it names; writes report.html and *.png
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locas.evaluate import charts
from locas.evaluate.book import load_text
from locas.evaluate.books import REFERENCE, Losses, load_losses
from locas.evaluate.books_figures import FORMAT, VERSION, Figures
from locas.evaluate.page import Section, page
from locas.evaluate.words import best_stretch, coloured, top_words
from locas.store import write_atomically

ALL = "all books"
_BINS = 50  # points of a line along a book
_EXCERPT_TOKENS = 320
_WORDS = 15


@dataclass(frozen=True)
class _Found:
    """What a folder holds. losses: {(method, book): of its first seed}; main: the method that is looked at closely."""

    folder: Path
    results: Figures
    losses: dict[tuple[str, str], Losses]
    books: list[str]
    methods: list[str]
    main: str | None
    palette: dict[str, str]


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` and pictures of its charts into the folder of a books evaluation; returns the page.

    Raises:
        FileNotFoundError: there is no results.json, or a file that it names.
        ValueError: it is not one of ours, of another version, or a file is damaged.
        ModuleNotFoundError: the plotting library is missing; the message says how to install it.
    """
    charts.altair()
    found = _load(Path(folder))
    sections = []
    for section in _sections(found):
        sections.append(section)
        for name, chart, title in section.charts:
            write_atomically(found.folder / f"{name}.png", charts.picture(chart, title))
    path = found.folder / "report.html"
    write_atomically(path, page(found.results, sections).encode())
    return path


def _load(folder: Path) -> _Found:
    path = folder / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; give the folder that `locas eval books -o` wrote")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        known = results["format"] == FORMAT and results["version"] == VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result file of `locas eval books` ({error!r})") from error
    if not known:
        raise ValueError(f"{path} is {results['format']} {results['version']}; this locas reads {FORMAT} {VERSION}")
    methods, books = list(results["methods"]), {b["name"]: b["tokens"] for b in results["books"]}
    losses = {
        (m, b): load_losses(folder / results["methods"][m]["per_book"][b]["losses"][0], tokens)
        for m in methods
        for b, tokens in books.items()
    }
    main = _main(results)
    return _Found(folder, results, losses, list(books), methods, main, charts.colours(methods, REFERENCE, main))


def _main(results: Figures) -> str | None:
    """The method that is looked at closely: the first memory, else the first that learns."""
    methods = list(results["methods"])
    memories = [m for m in methods if results["settings"]["methods"][m]["init"] is not None]
    learning = [m for m in methods if results["methods"][m]["parameters"]]
    return next(iter(memories + learning), None)


def differences_picture(results: Figures) -> bytes:
    """Every method minus truncated reading, a dot for each book, as a PNG: from a result file alone.

    Raises:
        ModuleNotFoundError: the plotting library is missing; the message says how to install it.
    """
    charts.altair()
    palette = charts.colours(list(results["methods"]), REFERENCE, _main(results))
    against = [p for p in results["paired"] if p["minus"] == REFERENCE]
    return charts.picture(*_difference_chart(against, REFERENCE, palette))


# -------------------------------------------------------------------- sections


def _sections(found: _Found) -> Iterator[Section]:
    several = len(found.methods) > 1
    rows, names = _along(found)
    yield Section(
        "Perplexity along the book",
        "Every token is scored before it is learnt. What lies below the grey line is what learning gave."
        if several
        else "Every token is scored once.",
        [("along", charts.along(rows, names, found.palette), f"Perplexity along the book: {names[0]}")],
    )
    if several:
        yield Section("Book by book", _paired_text(found), _paired_charts(found))
        yield _cost(found)
    if found.main is not None:
        yield _learnt(found)
        lengths = _norms(found)
        if lengths:
            yield Section(
                "Slots",
                f"Length of the rows of {found.main}'s slots after the last chunk, over all books: 5th to 95th "
                "percentile (line), quartiles (bar), median (tick). Norm clipping keeps them at 1 or below.",
                [("norms", charts.norms(lengths), f"Length of the slots' rows, {found.main}")],
            )


def _along(found: _Found) -> tuple[list[charts.Row], list[str]]:
    """(perplexity in stretches of equal length, what there is to choose: the mean over books first, then each book)."""
    longest = max(x.nll.numel() for x in found.losses.values())
    chunk = max(x.stops[0] for x in found.losses.values())
    stretch = max(chunk, math.ceil(longest / _BINS / chunk) * chunk)
    curves = {key: _stretches(losses.nll.double(), stretch, chunk) for key, losses in found.losses.items()}
    shown = {book: {m: curves[m, book] for m in found.methods} for book in found.books}
    if len(found.books) > 1:
        # As far as half of the books go, over those that go so far: over fewer it would jump where one ends.
        lengths = {book: len(curves[REFERENCE, book]) for book in found.books}
        length = sorted(lengths.values(), reverse=True)[(len(lengths) - 1) // 2]
        members = [book for book, n in lengths.items() if n >= length]
        name = ALL if len(members) == len(found.books) else f"the {len(members)} longest books"
        mean = {m: [_mean([curves[m, b][i] for b in members]) for i in range(length)] for m in found.methods}
        shown = {name: mean} | shown
    rows: list[charts.Row] = []
    for book, of_methods in shown.items():
        end = found.losses[REFERENCE, book].nll.numel() if book in found.books else longest
        for method, curve in of_methods.items():
            rows += [
                {
                    "method": method,
                    "book": book,
                    "tokens": min((i + 1) * stretch, end),
                    "perplexity": math.exp(min(nll, 50.0)),
                }
                for i, nll in enumerate(curve)
                if math.isfinite(nll)
            ]
    return rows, list(shown)


def _stretches(nll: Tensor, stretch: int, least: int) -> list[float]:
    """The mean loss of each stretch; a few last words, fewer than `least`, say little and are left out."""
    parts = [part for i, part in enumerate(nll.split(stretch)) if part.numel() >= least or i == 0]
    return [float(part.nanmean()) for part in parts]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _paired_text(found: _Found) -> str:
    interval = found.results["bootstrap"]
    text = "Each dot is a book; the diamond is the mean over books"
    if len(found.books) > 1:
        text += f", the bar its {interval['level']:.0%} bootstrap interval over books"
    return text + ". Left of zero is better."


def _paired_charts(found: _Found) -> list[tuple[str, Any, str]]:
    made = []
    against = [p for p in found.results["paired"] if p["minus"] == REFERENCE]
    made.append(("against-truncation", *_difference_chart(against, REFERENCE, found.palette)))
    ours = [p for p in found.results["paired"] if found.main in (p["method"], p["minus"])]
    ours = [_turned(p, found.main) for p in ours if REFERENCE not in (p["method"], p["minus"])]
    if ours:
        made.append(("against-others", *_difference_chart(ours, None, found.palette)))
    return made


def _difference_chart(pairs: list[Figures], minus: str | None, palette: dict[str, str]) -> tuple[charts.Chart, str]:
    """Every method minus one; without `minus`, the main method minus every other, which then names the row."""
    rows, means = [], []
    for pair in sorted(pairs, key=lambda p: p["mean"]):
        label = pair["method"] if minus else pair["minus"]
        owner = {"method": label, "colour_of": label}
        rows += [owner | {"book": b, "difference": d} for b, d in pair["per_book"].items()]
        bounds = {k: pair["mean"] if pair[k] is None else pair[k] for k in ("low", "high")}
        means.append(owner | {"mean": pair["mean"], **bounds})
    chart = charts.differences(rows, means, palette)
    return chart, f"Each method minus {minus}" if minus else f"{pairs[0]['method']} minus the others"


def _turned(pair: Figures, first: str | None) -> Figures:
    """The pair with `first` as the method that the other is taken from."""
    if pair["method"] == first:
        return pair
    negated = {k: None if pair[k] is None else -pair[k] for k in ("mean", "low", "high")}
    return pair | {
        "method": pair["minus"],
        "minus": pair["method"],
        "mean": negated["mean"],
        "low": negated["high"],
        "high": negated["low"],
        "per_book": {b: -d for b, d in pair["per_book"].items()},
    }


def _cost(found: _Found) -> Section:
    means = {p["method"]: p["mean"] for p in found.results["paired"] if p["minus"] == REFERENCE}
    rows = [
        {
            "method": m,
            "difference": means.get(m, 0.0),
            "time": x["relative_time"],
            "parameters": x["parameters"],
            "memory": x["relative_memory"],
        }
        for m, x in found.results["methods"].items()
    ]
    time = charts.cost(rows, "time", "time relative to truncation (log)", found.palette)
    parameters = charts.cost(rows, "parameters", "trained parameters (log)", found.palette)
    return Section(
        "What it costs, what it earns",
        "Mean difference in bits per byte against truncated reading (lower is better) beside the time, timed in turn "
        "with truncated reading in the same run, and beside the parameters.",
        [("cost-time", time, "Time against quality"), ("cost-parameters", parameters, "Parameters against quality")],
    )


def _learnt(found: _Found) -> Section:
    """The words and a stretch of every book on which the main method helps most."""
    rows: list[charts.Row] = []
    texts: list[str] = []
    for book in found.results["books"]:
        name = book["name"]
        text, ends = load_text(found.folder / book["text"])
        plain, learnt = found.losses[REFERENCE, name].nll, found.losses[str(found.main), name].nll
        for word in top_words(text, ends, plain, learnt, _WORDS):
            numbers = {"gain": word.gain, "count": word.count, "before": word.before, "after": word.after}
            rows.append({"book": name, "word": word.word, **numbers})
        texts.append(_excerpt(name, text, ends, plain, learnt, is_open=not texts))
    return Section(
        f"What {found.main} learnt",
        "The words on which it saves most, and of each book the stretch where it helps most: green tokens were "
        "predicted better than without it, orange ones worse; touch one for its losses.",
        [("words", charts.words(rows, found.books), f"Words that {found.main} learnt: {found.books[0]}")],
        "".join(texts),
    )


def _excerpt(name: str, text: bytes, ends: Tensor, plain: Tensor, learnt: Tensor, *, is_open: bool) -> str:
    start, stop = best_stretch(plain - learnt, _EXCERPT_TOKENS)
    body = ("… " if start else "") + coloured(text, ends, plain, learnt, start, stop)
    return (
        f"<details{' open' if is_open else ''}><summary>{html.escape(name)}, tokens {start:,} to {stop:,}</summary>"
        f'<p class="text">{body}</p></details>'
    )


def _norms(found: _Found) -> list[charts.Row]:
    """Quantiles of the slots' row lengths, by layer and part, over all books; none where a longer reading was cut."""
    lengths: dict[tuple[int, str], list[Tensor]] = {}
    for book in found.books:
        for name, tensor in found.losses[str(found.main), book].tensors.items():
            if name.startswith("slots."):
                _, layer, part = name.split(".")
                lengths.setdefault((int(layer), part), []).append(tensor)
    if any(len(parts) < len(found.books) for parts in lengths.values()):
        return []
    points = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    names = ("low", "q1", "median", "q3", "high")
    return [
        {"layer": layer, "part": part}
        | dict(zip(names, torch.quantile(torch.cat(parts), points).tolist(), strict=True))
        for (layer, part), parts in sorted(lengths.items())
    ]
