"""What recipes that measure memories on development books share: a result file that grows row by row, and losses."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from _setup import book_paths, quiet_backbone, read_report, resumed, write_report
from torch import Tensor

import locas
from locas.attach import attached
from locas.backbone import Backbone
from locas.evaluate.provenance import environment
from locas.evaluate.statistics import paired_bootstrap
from locas.memory import Memory
from locas.text import collect

Row = dict[str, Any]
SEED = 0
WORTH_NATS = 0.01  # a token: of a smaller gain, no share is told


def parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """The options that all of them have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path, help="folder with the development books")
    options.add_argument("--books", help="only these, by file stem, with commas between")
    options.add_argument("--rank", type=int, default=64)
    options.add_argument("--skip-tokens", type=int, default=0, help="of each book, left out (title pages, contents)")
    options.add_argument("--read-tokens", type=int, default=16384, help="of each book, read into its memory")
    options.add_argument("--later-tokens", type=int, default=8192, help="that follow, on which gains are measured")
    options.add_argument("--model", help="backbone (default: the built-in one)")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("-o", "--output", type=Path, default=Path(output))
    options.add_argument("--table", action="store_true", help="print what has been measured, and stop")
    return options


def run(
    args: argparse.Namespace,
    recipe: str,
    rows: Callable[[Books, argparse.Namespace, list[Row]], Iterator[Row]],
    table: Callable[[Row], str],
    read: locas.ReadSettings | None = None,
) -> int:
    """Measures what is missing, writing the result after every row, so that a killed run goes on where it was, with
    the same backbone and versions (see `resumed`).

    Args:
        args: of `parser`.
        recipe: its name, for the result file.
        rows: yields the rows that are not among the known ones, which were measured at the same place (rank, tokens,
            the backbone's weights).
        table: makes a report's tables, which are printed at the end.
        read: how memories read; None: in chunks of half a window, every window recomputed.
    """
    if args.table or args.folder is None:
        print(table(read_report(args.output)))
        return 0
    backbone, paths = quiet_backbone(args), book_paths(args)
    report = resumed(args.output, where := environment(backbone))
    weights = where["backbone"]["weights_sha256"]
    for row in report["results"]:  # before rows named their weights: the file's own
        row.setdefault("weights_sha256", weights)
    place = {k: getattr(args, k) for k in ("rank", "skip_tokens", "read_tokens", "later_tokens")}
    place |= {"backbone": backbone.name, "weights_sha256": weights, "seed": SEED}
    place |= {} if read is None else {"read": asdict(read)}
    known = [row for row in report["results"] if {k: row.get(k) for k in place} == place]
    for row in rows(Books(backbone, paths, args, read), args, known):
        report["results"].append(place | row | {"commit": where["commit"]})
        report |= where | {"recipe": recipe}
        write_report(args.output, report)
        print(json.dumps(row), flush=True)
    print(table(report))
    return 0


class Books:
    """The books' token ids, and what is measured more than once: memories and losses, each made when first asked for.

    Attributes:
        names: file stems, in order.
        settings: how memories read.
        ids: {name: token ids, what is read and what follows}.
    """

    def __init__(
        self, backbone: Backbone, paths: list[Path], args: argparse.Namespace, read: locas.ReadSettings | None = None
    ) -> None:
        self.backbone, self.read_tokens = backbone, args.read_tokens
        everywhere = backbone.start_in_every_window
        self.settings = replace(read or locas.ReadSettings(), start_in_every_window=everywhere)
        self._scoring = locas.ReadSettings(start_in_every_window=everywhere)
        self.names = [path.stem for path in paths]
        self.ids: dict[str, Tensor] = {}
        for path in paths:
            (document,) = collect([path], gutenberg=True, reflow=True)
            ids, _ = backbone.encode(document.text, args.skip_tokens + args.read_tokens + args.later_tokens)
            self.ids[path.stem] = ids[args.skip_tokens :]
        self._memories: dict[tuple[str, int], Memory] = {}
        self._losses: dict[tuple[str, int | None], tuple[float, float]] = {}

    def read_part(self, name: str) -> Tensor:
        return self.ids[name][: self.read_tokens]

    def memory(self, name: str, rank: int) -> Memory:
        """That has read the book's beginning, with the default settings."""
        if (name, rank) not in self._memories:
            self._memories[name, rank] = self.learnt(name, locas.InitSettings(rank=rank, seed=SEED))
        return self._memories[name, rank]

    def learnt(self, name: str, init: locas.InitSettings) -> Memory:
        """A memory made so, that has read the book's beginning; never kept."""
        model, start, ids = self.backbone.model, self.backbone.start_id, self.read_part(name)
        memory = locas.create(model, ids[:256], init, start_id=start)
        list(locas.read(model, memory, ids, self.settings, start_id=start))
        return memory

    def without(self, name: str) -> tuple[float, float]:
        """`losses` with no memory."""
        return self._kept(name, None)

    def with_own(self, name: str, rank: int) -> tuple[float, float]:
        """`losses` with the book's own memory of this rank."""
        return self._kept(name, rank)

    def _kept(self, name: str, rank: int | None) -> tuple[float, float]:
        if (name, rank) not in self._losses:
            self._losses[name, rank] = self.losses(name, None if rank is None else self.memory(name, rank))
        return self._losses[name, rank]

    def losses(self, name: str, memory: Memory | None, model: Any = None) -> tuple[float, float]:
        """Nats a token on what follows and on the part that was read, nothing being learnt."""
        model, start = model or self.backbone.model, self.backbone.start_id
        if memory is not None and model is not self.backbone.model:
            with attached(model, memory.bank):  # a rounded backbone is another one: its fingerprint may differ
                return self.losses(name, None, model)
        records = locas.read(model, memory, self.ids[name], self._scoring, start_id=start, learn=False)
        nll = torch.cat([record.nll for record in records]).double()
        return float(nll[self.read_tokens :].nanmean()), float(nll[: self.read_tokens].nanmean())


def by_place(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """(what was read, rows), for each kind of run in a file; the backbone is named where there are several."""
    backbones = {(row["backbone"], row.get("weights_sha256", "")[:8]) for row in rows}
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        rank, skip, read, later = (row[key] for key in ("rank", "skip_tokens", "read_tokens", "later_tokens"))
        left_out = f", the first {skip:,} left out" if skip else ""
        where = f"rank {rank}, {read:,} tokens of each book{left_out}, {later:,} that follow"
        if len(backbones) > 1:
            where += f", backbone {row['backbone']} {row.get('weights_sha256', '')[:8]}".rstrip()
        how = json.dumps(row.get("read"), sort_keys=True)  # rows of two kinds of reading are two tables
        found.setdefault((where, how), []).append(row)
    return [(where, some) for (where, _), some in found.items()]


def mean(values: list[float], sign: str = "") -> str:
    """The mean, and its 95% bootstrap interval where there are two values or more."""
    centre, low, high = paired_bootstrap(values)
    span = "" if math.isnan(low) else f" [{low:{sign}.4f}, {high:{sign}.4f}]"
    return f"{centre:{sign}.4f}{span}"


def share(values: list[float]) -> str:
    """The same in per cent; nothing where there is nothing."""
    if not values:
        return ""
    centre, low, high = (100 * x for x in paired_bootstrap(values))
    return f"{centre:.0f}%" + ("" if math.isnan(low) else f" [{low:.0f}, {high:.0f}]")
