"""`locas eval dialogue`: questions about long conversations (LoCoMo), with memories and with retrieval."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.markup import escape
from rich.table import Table

from locas.cli.bars import bar
from locas.cli.common import BackboneOptions, Maybe, OutputOptions, UserError, check_folder, err, out, print_json
from locas.evaluate.cells import Cells, finite
from locas.evaluate.dialogue import DialogueSettings, parse_method, run, setups
from locas.evaluate.dialogue_figures import summarise
from locas.evaluate.locomo import load, stems
from locas.evaluate.provenance import environment
from locas.store import write_atomically
from locas.stream import ReadSettings

METHODS = "none,context,bm25,templora-tuned,locas,locas+bm25"


@dataclass(frozen=True)
class EvalDialogue:
    """Questions about long conversations (LoCoMo): each conversation is read once, then all of its questions are asked.

    Needs: pip install "locas[eval]". Run the same command again to go on with a stopped run.

        locas eval dialogue locomo.json -o results
        locas eval dialogue locomo.json -o results --methods none,bm25,locas+bm25 --max-conversations 1
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A LoCoMo JSON file."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="DIR")]
    """Folder for the results: dialogue.json, and cells.json, from which a stopped run goes on."""
    methods: str = METHODS
    """What answers, separated by commas. none: the question alone; context: the latest turns that fit; bm25: retrieved
    turns; or what has read the conversation (locas, templora-tuned, ...), alone or with +bm25 or +context.
    Hyperparameters follow a name: locas:rank=16."""
    max_conversations: Maybe[int] = None
    """Only so many of the first conversations."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    ask: DialogueSettings = field(default_factory=DialogueSettings)
    window: Maybe[int] = None
    """Tokens that the model sees at once while it reads (default: 2,048 or the backbone's trained context)."""
    chunk: Maybe[int] = None
    """Tokens that are scored, and then learnt, at once (default: half the window; for locas an eighth)."""
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        methods = [parse_method(m) for m in self.methods.split(",") if m.strip()]
        if not methods:
            raise UserError(f"--methods {self.methods!r} names no method; give for example {METHODS}")
        if self.max_conversations is not None and self.max_conversations < 1:
            raise UserError(f"--max-conversations must be 1 or more; got {self.max_conversations}")
        read = ReadSettings(window=self.window, chunk=self.chunk)
        check_folder(self.output)
        stems("says at once if the stemmer is missing")
        conversations = load(self.path)[: self.max_conversations]
        folder = Path(self.output)
        folder.mkdir(parents=True, exist_ok=True)
        cells = Cells(folder / "cells.json")
        backbone = self.backbone.load()
        with bar("conversations") as on_progress:
            results = run(backbone, conversations, methods, read, self.ask, cells, _say, on_progress)
        summary: dict[str, Any] = {
            "file": Path(self.path).name,
            "conversations": [c.name for c in conversations],
            **environment(backbone),
            "seeds": [self.ask.seed],
            "settings": {"ask": asdict(self.ask), "read": asdict(read), "setups": setups(backbone, methods, read)},
            **summarise(results, methods),
        }
        write_atomically(folder / "dialogue.json", (json.dumps(finite(summary), indent=1) + "\n").encode())
        if self.show.json:
            print_json(summary)
        else:
            out.print(dialogue_table(summary))
            out.print(f"\nall figures: {folder / 'dialogue.json'}", soft_wrap=True, markup=False)
        return 0


def dialogue_table(summary: dict[str, Any]) -> Table:
    """F1 for each category, and the gold answer's likelihood."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = list(dict.fromkeys(c for m in summary["methods"].values() for c in m["categories"]))
    for title in ("", *(f"F1 {name}" for name in names), "trap F1", "gold nats/token", "gold > others"):
        table.add_column(title, justify="left" if not title else "right")
    for name, method in summary["methods"].items():
        categories, every = method["categories"], method["answerable"]
        table.add_row(
            escape(name),
            *(_percent(categories.get(c, {}).get("f1")) for c in names),
            _percent(categories.get("adversarial", {}).get("trap_f1")),
            "" if every["gold_ll_per_token"] is None else f"{every['gold_ll_per_token']:.3f}",
            _percent(every["gold_over_others"]),
        )
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _say(text: str) -> None:
    err.print(text, soft_wrap=True, markup=False)
