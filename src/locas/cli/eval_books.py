"""`locas eval books`: whole books, read online by several methods."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from locas.cli.common import (
    BackboneOptions,
    Maybe,
    OutputOptions,
    UserError,
    brief_name,
    check_folder,
    err,
    out,
    print_json,
    said_skipped,
)
from locas.evaluate.book import Book, Method
from locas.evaluate.books import REFERENCE, BooksRun
from locas.evaluate.books import Progress as BooksProgress
from locas.evaluate.books_figures import Figures, results
from locas.evaluate.learners import LEARNERS
from locas.evaluate.pg19 import SOURCE, pg19
from locas.store import write_atomically
from locas.stream import ReadSettings
from locas.text import Document, collect

METHODS = "truncation,templora-paper,templora-tuned,locas"


@dataclass(frozen=True)
class EvalBooks:
    """Read whole books online with several methods: every token is scored once, before it was learnt.

    Prints perplexity, bits per byte, extra parameters, time and memory relative to truncated reading. With -o,
    per-token losses, results.json and report.html are kept, and the same command goes on with a stopped run.

        locas eval books books/ --gutenberg --reflow --methods truncation,locas --max-tokens 20000
        locas eval books books/ -o results/books --methods truncation,templora-tuned,locas,locas:rank=8 --seeds 0,1
        locas eval books --pg19 test -o results/pg19 --model Qwen/Qwen3-0.6B-Base --device cuda

    Methods: truncation (no memory), attention (no memory, the longest window), locas (as `locas memorize` reads),
    locas-recomputed (in the chunks of all others, every window recomputed), locas-paper, templora-paper,
    templora-tuned, lora-pissa, lora-eva (parameters as the default memory's), ffn-inplace, dynamic (all weights
    trained). Options follow a name: locas:rank=8:lr=0.05.
    """

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = ()
    """Text files, folders (all text files in them, sorted), or - for standard input: one book a file."""
    output: Annotated[Maybe[str], tyro.conf.arg(aliases=["-o"], metavar="DIR")] = None
    """Folder for losses, results.json, report.html and its pictures; without it nothing is kept."""
    methods: str = METHODS
    """What reads, separated by commas; truncation is added where it is missing."""
    seeds: str = "0"
    """Seeds, separated by commas, for methods with something random."""
    max_tokens: Maybe[int] = None
    """Read at most so many tokens of each book."""
    gutenberg: bool = False
    """Strip the header and licence of Project Gutenberg e-books."""
    reflow: bool = False
    """Join hard-wrapped lines into paragraphs, one a line."""
    encoding: Maybe[str] = None
    """Encoding of the files; found out where not given."""
    pg19: Maybe[str] = None
    """Also (or only) read this split of PG-19 from the Hugging Face hub: test, validation or train."""
    pg19_source: str = SOURCE
    """Dataset on the hub, or folder, that --pg19 is loaded from."""
    max_books: Maybe[int] = None
    """Only so many of the first books."""
    window: Maybe[int] = None
    """Tokens that the model sees at once, for every method (default: 2,048 or the backbone's trained context)."""
    chunk: Maybe[int] = None
    """Tokens that are scored, and then learnt, at once (default: half the window; for locas an eighth)."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        methods, seeds = parse_methods(self.methods), parse_seeds(self.seeds)
        read = ReadSettings(window=self.window, chunk=self.chunk)
        if self.output is not None:
            check_folder(self.output)
        documents = self.collect()
        backbone = self.backbone.load()
        books = [Book.of(d, backbone, self.max_tokens) for d in documents]
        with _folder(self.output) as folder:
            run = BooksRun(backbone, books, folder, methods, read, seeds)
            if not drive(run):
                return self._stopped()
            found = results(run)
            if self.output is not None:
                path = folder / "results.json"
                write_atomically(path, (json.dumps(_finite(found), indent=1) + "\n").encode())
                self._report(folder)
        if self.show.json:
            print_json(found)
        else:
            out.print(table(found))
            for line in comparisons(found):
                out.print(line, soft_wrap=True, markup=False)
        return 0

    def collect(self) -> list[Document]:
        """Every book's text."""
        for name in ("max_tokens", "max_books"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be 1 or more; got {value}")
        documents: list[Document] = []
        if self.paths or self.pg19 is None:
            documents = collect(
                self.paths,
                gutenberg=self.gutenberg,
                reflow=self.reflow,
                encoding=self.encoding,
                on_skip=said_skipped,
            )
        if self.pg19 is not None:
            limit = None if self.max_books is None else self.max_books - len(documents)
            documents += pg19(self.pg19, source=self.pg19_source, max_books=limit, unwrap=self.reflow)
        return documents[: self.max_books]

    def _report(self, folder: Path) -> None:
        from locas.evaluate.report import write_report

        try:
            page = write_report(folder)
        except ModuleNotFoundError as error:
            _say(f"no report was drawn: {error}")
            return
        if not self.show.json:
            _say(f"report: {page}")

    def _stopped(self) -> int:
        kept = (
            "what was finished is kept; the same command goes on with it" if self.output else "nothing was kept (no -o)"
        )
        _say(f"\nstopped: {kept}")
        if self.show.json:
            print_json({"stopped": True})
        return 130


def parse_methods(text: str) -> list[Method]:
    """Methods from "truncation,locas:rank=8"."""
    methods = [Method.parse(part) for part in text.split(",") if part.strip()]
    if not methods:
        raise UserError(f"--methods names no method; give some of {', '.join(LEARNERS)}")
    for method in methods:
        if method.name not in LEARNERS:
            raise UserError(f"there is no method {method.name!r}; there are {', '.join(LEARNERS)}")
    return methods


def parse_seeds(text: str) -> list[int]:
    """Seeds from "0,1,2"."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds {text!r} is not understood; give whole numbers with commas between") from error
    if min(seeds) < 0:
        raise UserError(f"--seeds must be 0 or more; got {text}")
    return seeds


def drive(run: BooksRun) -> bool:
    """Measures what is missing, showing where it stands; False if Ctrl-C stopped it."""
    missing = run.missing
    known = len(run.units) - len(missing)
    if known:
        _say(f"{known} of {len(run.units)} measurements are there already")
    try:
        with _bar(sum(u.book.ids.numel() for u in missing)) as show:
            for progress in run:
                show(progress)
    except KeyboardInterrupt:
        return False
    return True


def table(found: Figures) -> Table:
    """The figures of all methods, over all books."""
    view = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "bits per byte", "perplexity", "chunk mean", "parameters", "time", "memory"):
        view.add_column(title, justify="right" if title else "left", overflow="fold")
    for name, m in found["methods"].items():
        view.add_row(
            escape(name),
            f"{m['bits_per_byte']:.4f}",
            f"{m['perplexity']:.2f}",
            f"{m['perplexity_chunk_mean']:.2f}",
            f"{m['parameters']:,}",
            f"{m['relative_time']:.2f}x",
            f"{m['relative_memory']:.2f}x",
        )
    return view


def comparisons(found: Figures) -> Iterator[str]:
    """A line for each method beside truncated reading, and for each memory beside every other method."""
    for pair in found["paired"]:
        ours = any(found["settings"]["methods"][pair[k]]["init"] is not None for k in ("method", "minus"))
        if pair["minus"] == REFERENCE or ours:
            span = "" if pair["books"] < 2 else f" [{pair['low']:+.4f}, {pair['high']:+.4f}]"
            yield (
                f"{pair['method']} minus {pair['minus']}: {pair['mean']:+.4f}{span} bits per byte, better on "
                f"{pair['better_on']} of {pair['books']} books"
            )


@contextlib.contextmanager
def _folder(output: str | None) -> Iterator[Path]:
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    yield Path(output)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Any]:
    """A live bar on a terminal, a line for each finished measurement elsewhere."""
    if not err.is_terminal:
        yield _Lines(total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("reading", total=total, figures="")

        def show(progress: BooksProgress) -> None:
            unit, n = progress.unit, progress.unit.book.ids.numel()
            bar.update(
                task,
                description=escape(f"{brief_name(unit.book.name)} {unit.method.label}"),
                completed=progress.tokens,
                figures=f"{progress.record.stop:,}/{n:,} tokens",
            )

        yield show


class _Lines:
    """One line for each measurement that was finished, for logs."""

    def __init__(self, total: int) -> None:
        self.total, self.sum, self.count = total, 0.0, 0

    def __call__(self, progress: BooksProgress) -> None:
        unit, record = progress.unit, progress.record
        self.sum, self.count = (0.0, 0) if record.start == 0 else (self.sum, self.count)
        scored = record.nll[~record.nll.isnan()].double()
        self.sum, self.count = self.sum + float(scored.sum()), self.count + scored.numel()
        if record.stop == unit.book.ids.numel() and self.count:
            share = 100 * progress.tokens / self.total
            _say(
                f"{share:3.0f}%  {unit.book.name}  {unit.method.label}  seed {unit.seed}  "
                f"{self.sum / self.count:.4f} nats a token"
            )


def _finite(value: Any) -> Any:
    from locas.evaluate.cells import finite

    return finite(value)


def _say(text: str) -> None:
    err.print(text, soft_wrap=True, markup=False)


__all__ = ["EvalBooks", "comparisons", "drive", "parse_methods", "parse_seeds", "table"]
