"""`locas eval forgetting`: what learning a book gains there, and changes everywhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.markup import escape
from rich.table import Table

from locas.cli.bars import bar
from locas.cli.common import (
    BackboneOptions,
    Maybe,
    OutputOptions,
    TextOptions,
    UserError,
    check_folder,
    err,
    out,
    print_json,
    said_skipped,
)
from locas.evaluate.cells import Cells, finite
from locas.evaluate.dialogue import parse_method
from locas.evaluate.forgetting import ForgettingSettings, book, configs, run, unrelated_text
from locas.evaluate.forgetting_figures import draw, summarise
from locas.evaluate.mmlu import Mmlu
from locas.evaluate.provenance import environment
from locas.store import write_atomically
from locas.stream import ReadSettings
from locas.text import collect


@dataclass(frozen=True)
class EvalForgetting:
    """Learn the first tokens of books, then measure the gain on their later text against the change on unrelated text.

    Each method learns each book at each rank and step size; --scales also dials what was learnt up or down. That gives
    a frontier: forgetting.json, forgetting.html and forgetting.png. With --mmlu, MMLU through lm-evaluation-harness
    before and after. Run the same command again to go on with a stopped run.

        locas eval forgetting book.txt --unrelated a.txt b.txt -o results
        locas eval forgetting books/ --unrelated others/ -o results --ranks 16,64 --lr-factors 0.5,1,2 --mmlu mmlu/
    """

    text: TextOptions
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="DIR")]
    """Folder for the results."""
    unrelated: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = ()
    """Texts that are not learnt; --gutenberg, --reflow and --encoding hold for them too. Not given: the other books."""
    methods: str = "locas,templora-tuned"
    """What learns, separated by commas; hyperparameters follow a name: locas:tau_scale=64."""
    ranks: str = "16,64"
    """Ranks, separated by commas, for methods that have one."""
    lr_factors: str = "1"
    """Step sizes, separated by commas, as multiples of each method's own learning rate."""
    scales: str = "1"
    """Scales, separated by commas, at which a finished memory (or LoRA's adapters) is looked at; 1: as learnt."""
    later_tokens: int = 8192
    """Tokens of each book, right after those that are learnt, on which the gain is measured."""
    unrelated_tokens: int = 4096
    """Tokens of each unrelated text, from its middle on."""
    mmlu: Annotated[Maybe[str], tyro.conf.arg(metavar="DIR")] = None
    """Folder with MMLU as test/SUBJECT_test.csv and dev/SUBJECT_dev.csv."""
    mmlu_limit: Maybe[int] = None
    """Questions of each subject; default: all."""
    mmlu_shots: Maybe[int] = None
    """Solved examples before each question; default: 5, or 0 for a backbone of less than 2,048 tokens."""
    mmlu_subjects: str = ""
    """Only these subjects, separated by commas."""
    window: Maybe[int] = None
    """Tokens that the model sees at once (default: 2,048 or the backbone's trained context)."""
    chunk: Maybe[int] = None
    """Tokens that are scored, and then learnt, at once (default: half the window; for locas an eighth)."""
    seed: int = 0
    """Of everything random."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        settings = ForgettingSettings(
            later_tokens=self.later_tokens,
            unrelated_tokens=self.unrelated_tokens,
            scales=tuple(_numbers("--scales", self.scales, float)),
            seed=self.seed,
        )
        read = ReadSettings(window=self.window, chunk=self.chunk)
        ranks, factors = _numbers("--ranks", self.ranks, int), _numbers("--lr-factors", self.lr_factors, float)
        methods = [m.strip() for m in self.methods.split(",") if m.strip()]
        if not methods:
            raise UserError(f"--methods {self.methods!r} names no method; give for example locas,templora-tuned")
        for method in methods:
            parse_method(method)
        mmlu = self._mmlu()
        check_folder(self.output)
        documents = self.text.collect()
        others = self._unrelated() if self.unrelated else documents
        folder = Path(self.output)
        folder.mkdir(parents=True, exist_ok=True)
        cells = Cells(folder / "cells.json")
        backbone = self.backbone.load()
        chosen = configs(backbone, methods, ranks, factors, read)
        books = [book(backbone, d, self.text.max_tokens, settings) for d in documents]
        unrelated = [unrelated_text(backbone, d, settings) for d in others]
        alone = [b.name for b in books if all(u.sha256 == b.sha256 for u in unrelated)]
        if alone:
            raise UserError(f"there is no text unrelated to {alone[0]}; name some with --unrelated")
        with bar("books and methods") as on_progress:
            result = run(
                backbone, books, unrelated, chosen, read, settings, cells, mmlu=mmlu, say=_say, on_progress=on_progress
            )
        summary = self._summary(settings, read, chosen, backbone) | summarise(result) | {"rows": result["rows"]}
        write_atomically(folder / "forgetting.json", (json.dumps(finite(summary), indent=1) + "\n").encode())
        self._draw(summary, folder)
        if self.show.json:
            print_json(summary)
        else:
            out.print(frontier_table(summary))
            for line in comparisons(summary):
                out.print(line, soft_wrap=True, markup=False)
        return 0

    def _mmlu(self) -> Mmlu | None:
        if self.mmlu is None:
            if self.mmlu_limit is not None or self.mmlu_shots is not None or self.mmlu_subjects:
                raise UserError("--mmlu-limit, --mmlu-shots and --mmlu-subjects go with --mmlu DIR")
            return None
        subjects = tuple(s.strip() for s in self.mmlu_subjects.split(",") if s.strip())
        return Mmlu(self.mmlu, shots=self.mmlu_shots, limit=self.mmlu_limit, subjects=subjects)

    def _unrelated(self) -> list[Any]:
        return collect(
            self.unrelated,
            gutenberg=self.text.gutenberg,
            reflow=self.text.reflow,
            encoding=self.text.encoding,
            on_skip=said_skipped,
        )

    def _summary(self, settings: ForgettingSettings, read: ReadSettings, chosen: Any, backbone: Any) -> dict[str, Any]:
        return {
            **environment(backbone),
            "seeds": [self.seed],
            "settings": {
                "forgetting": asdict(settings),
                "max_tokens": self.text.max_tokens,
                "read": asdict(read),
                "configurations": {config.label: asdict(setup) for config, setup in chosen},
            },
        }

    def _draw(self, summary: dict[str, Any], folder: Path) -> None:
        try:
            paths = draw(summary["points"], folder)
        except ModuleNotFoundError as error:
            _say(f"no plot was drawn: {error}")
            return
        _say(f"plot: {paths[0]}")


def frontier_table(summary: dict[str, Any]) -> Table:
    """A line for each configuration and scale."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "scale", "gain", "KL elsewhere", "bits per byte elsewhere", "parameters", "seconds", "MMLU"):
        table.add_column(title, justify="right" if title else "left")
    mmlu = (summary["mmlu"] or {}).get("after", {})
    if summary["mmlu"]:
        table.add_row("nothing learnt", "", "", "", "", "", "", f"{100 * summary['mmlu']['accuracy']:.1f}")
    for p in summary["points"]:
        accuracy = mmlu.get(p["label"]) if p["scale"] == 1 else None
        table.add_row(
            escape(p["label"]),
            f"{p['scale']:g}",
            f"{p['gain']:+.4f}",
            f"{p['kl']:.4f}",
            f"{p['bits_per_byte_change']:+.4f}",
            f"{p['parameters']:,}",
            f"{p['seconds']:.1f}",
            "" if accuracy is None else f"{100 * accuracy:.1f}",
        )
    for row in summary["failed"]:
        table.add_row(escape(f"{row['label']} ({row['book']})"), "", "diverged")
    return table


def comparisons(summary: dict[str, Any]) -> list[str]:
    """At equal gain, how two methods' KL compares."""
    lines = []
    for pair in summary["at_equal_gain"]:
        if pair["left_out"]:
            books = ", ".join(pair["left_out"])
            lines.append(f"{pair['method']} and {pair['against']}: one of them gains nothing on {books}")
        for x in pair["at"]:
            lines.append(
                f"at {x['share']:.0%} of the gain that both reach: KL with {pair['method']} is {x['ratio']:.2f} of "
                f"that with {pair['against']}"
            )
    return lines


def _numbers(flag: str, text: str, kind: Any) -> Sequence[Any]:
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(f"{flag} {text!r} is not understood; give numbers with commas between") from error
    if not found:
        raise UserError(f"{flag} names no number; got {text!r}")
    return found


def _say(text: str) -> None:
    err.print(text, soft_wrap=True, markup=False)


__all__ = ["EvalForgetting", "comparisons", "frontier_table"]
