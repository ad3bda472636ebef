"""`locas demo`: the whole idea in two minutes, with nothing but Python's own documentation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.markup import escape
from rich.table import Table

from locas.backbone import load_backbone
from locas.cli.common import OutputOptions, UserError, comparison, err, out, print_json, short
from locas.cli.memorize import drive
from locas.cli.talk import SamplingOptions, continuation
from locas.memory import load, read
from locas.run import Run
from locas.run_settings import PRESETS, Text
from locas.text import one_paragraph_a_line, reflow

_HELD_BACK_EVERY = 20  # paragraphs


@dataclass(frozen=True)
class Demo:
    """Read the Python language reference into a memory, then show in a fresh process that the memory knows it.

    Needs no input and no network: the text is the one that Python's own `help()` shows, and the backbone is built in.
    Some sentences are held back from the reading; the loaded memory is asked about those.
    """

    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = "demo.safetensors"
    """Where the memory goes."""
    max_tokens: int = 24_000
    """How much of the reference to read."""
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        if self.max_tokens < 2_000:
            raise UserError(f"--max-tokens must be 2,000 or more, or there is little to show; got {self.max_tokens}")
        text, held_back = language_reference()
        backbone = load_backbone()
        ids, n_bytes = backbone.encode(text, self.max_tokens)
        held_back = [s for s in held_back if s[0] < n_bytes]
        err.print(
            f"reading {ids.numel():,} tokens of the Python language reference with the built-in backbone "
            f"({backbone.n_parameters / 1e6:.1f}M parameters), once without memory and once with"
        )
        settings = replace(PRESETS["default"], compare=True)
        run = Run(backbone, [Text("language reference", ids, n_bytes, "")], self.output, settings)
        if not drive(run, save_every=float("inf")):
            err.print("stopped; nothing was written")
            return 130
        run.finish()
        results = run.results()
        if not self.show.json:
            out.print("\n[bold]1. While reading[/bold]: every chunk is scored before it is learnt\n")
            out.print(comparison(results))
        results["held_back"] = self._ask_fresh_process([sentence for _, sentence in held_back])
        if self.show.json:
            print_json(results)
        else:
            _tell(results["held_back"], run)
        return 0

    def _ask_fresh_process(self, sentences: list[str]) -> dict[str, Any]:
        """Loads the saved memory in a new Python and asks it about sentences that it has not read."""
        with tempfile.TemporaryDirectory() as folder:
            question = Path(folder, "question.json")
            question.write_text(json.dumps({"memory": str(Path(self.output).resolve()), "sentences": sentences}))
            command = [sys.executable, "-m", "locas.cli.demo", str(question)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"the fresh process failed:\n{done.stderr[-2000:]}")
        return dict(json.loads(done.stdout))


def language_reference() -> tuple[str, list[tuple[int, str]]]:
    """Python's language reference as prose, and what was held back from it: (offset where it stood, sentence)."""
    from pydoc_data.topics import topics

    text, held_back, size = [], [], 0
    seen = 0
    for name in sorted(topics):
        for paragraph in one_paragraph_a_line(reflow(topics[name])).split("\n"):
            plain = re.sub(r"[*`_|]|\s+", lambda m: " " if m[0].isspace() else "", paragraph).strip()
            prose = len(plain) > 120 and plain[0].isupper() and plain.endswith(".")
            seen += prose
            if prose and seen % _HELD_BACK_EVERY == 0:
                held_back.append((size, plain))
            elif plain:
                text.append(plain)
                size += len(plain.encode()) + 1
    return "\n".join(text), held_back


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process makes of sentences it was not shown: scores and continuations, with memory and without."""
    backbone = load_backbone()
    memory = load(question["memory"], backbone.model)
    rows = []
    for sentence in question["sentences"]:
        ids, n_bytes = backbone.encode(sentence)
        nll = {}
        for name, used in (("without", None), ("with", memory)):
            records = read(backbone.model, used, ids, start_id=backbone.start_id, learn=False)
            nll[name] = float(torch.cat([r.nll for r in records]).double().sum())
        rows.append({"sentence": sentence, "tokens": ids.numel(), "bytes": n_bytes, "nll": nll})
    greedy = SamplingOptions(max_new_tokens=24, temperature=0.0)
    for row in rows[:3]:
        ids = backbone.encode(row["sentence"])[0][:12]
        row["prompt"] = backbone.tokenizer.decode(ids)
        row["continuation"] = {
            name: continuation(backbone, used, ids, greedy) for name, used in (("without", None), ("with", memory))
        }
    better = sum(r["nll"]["with"] < r["nll"]["without"] for r in rows)
    return {"sentences": rows, "better": better, "of": len(rows)}


def _tell(held_back: dict[str, Any], run: Run) -> None:
    rows = held_back["sentences"]
    out.print(
        f"\n[bold]2. In a fresh process[/bold], the memory loaded from {escape(str(run.output))} "
        f"({Path(run.output).stat().st_size / 2**20:.1f} MiB): sentences of the reference that were held back\n"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("\nsentence", max_width=58, no_wrap=True)
    for name in ("bits/byte\nwithout", "\nwith"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:8]:
        bits = {k: v / 0.6931471805599453 / row["bytes"] for k, v in row["nll"].items()}
        table.add_row(escape(row["sentence"]), f"{bits['without']:.3f}", f"{bits['with']:.3f}")
    out.print(table)
    out.print(f"\nbetter with the memory: {held_back['better']} of {held_back['of']}")
    out.print("\n[bold]3. Continuations[/bold] (greedy; the backbone is tiny, so look at its choice of words)\n")
    for row in rows[:3]:
        out.print(row["prompt"], style="bold", markup=False)
        for name in ("without", "with"):
            out.print(f"  {name + ' memory':>15}: {' '.join(row['continuation'][name].split())}", markup=False)
    out.print(f'\n[dim]go on: locas generate "A class definition" --memory {escape(short(run.output))} --compare[/dim]')


if __name__ == "__main__":
    import transformers

    transformers.logging.disable_progress_bar()
    json.dump(answer(json.loads(Path(sys.argv[1]).read_text())), sys.stdout)
