"""`locas anchor`: a memory that keeps to its text, and how much of its gain and of its cost elsewhere is left."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from locas.anchor import SAMPLE_TOKENS, anchored, check_strength, own_text
from locas.backbone import Backbone
from locas.cli.bars import bar
from locas.cli.common import (
    BackboneOptions,
    Maybe,
    OutputOptions,
    TextOptions,
    UserError,
    backbone_memory,
    check_memory,
    out,
    print_json,
)
from locas.evaluate.comparison import Comparison, compare
from locas.memory import Memory
from locas.run_memories import check_output
from locas.stream import ReadSettings
from locas.text import Document

_LEAST_TOKENS = 8  # of a text, half of which is fitted to


@dataclass(frozen=True)
class Anchor:
    """Keep a memory to its text: it answers that as before, and changes other text less.

    Values are fitted anew, in closed form: near what they add on the memory's text, near nothing on text that the
    backbone writes by itself (or that --others names). What is left of the gain and of the change elsewhere is then
    measured, on tokens that were not fitted to.

        locas anchor book.safetensors -o kept.safetensors --text book.txt
        locas anchor book.safetensors -o kept.safetensors --text book.txt --strength 3 --others notes/
    """

    memory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MEMORY")]
    """A memory file."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """The memory file to write (.safetensors); may be the same."""
    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")]
    """What the memory was made from, or is for: text files, folders, or - for standard input."""
    strength: float = 1.0
    """How much the change elsewhere counts beside the memory's own text: 0.3 is mild, 3 strong."""
    others: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = ()
    """Text that should be left alone; not given: what the backbone writes by itself."""
    tokens: int = SAMPLE_TOKENS
    """Tokens of each kind of text that are fitted to; of --text half at most, of which the rest is measured."""
    seed: int = 0
    """Of what the backbone writes."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    gutenberg: bool = False
    """Strip the header and licence of Project Gutenberg e-books."""
    reflow: bool = False
    """Join hard-wrapped lines into paragraphs, one a line."""
    encoding: Maybe[str] = None
    """Encoding of the files; found out where not given."""
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        began = time.perf_counter()
        check_strength(self.strength)
        if self.tokens < _LEAST_TOKENS:
            raise UserError(f"--tokens must be {_LEAST_TOKENS} or more, better thousands; got {self.tokens}")
        check_output(Path(self.output))
        check_memory(self.memory)
        options, documents = self._collect(self.text)
        other_options, other_documents = self._collect(self.others) if self.others else (None, [])
        backbone = self.backbone.load()
        memory = backbone_memory(self.memory, backbone)
        ids = _ids(options, documents, backbone)[: 2 * self.tokens]
        most = self.tokens + self.tokens // 4  # a fifth is measured
        if other_options is None:
            with bar(f"the backbone writes {most:,} tokens") as on_progress:
                others = own_text(
                    backbone.model, most, start_id=backbone.start_id, seed=self.seed, on_progress=on_progress
                )
        else:
            others = _ids(other_options, other_documents, backbone)[:most]
        if min(ids.numel(), others.numel()) < _LEAST_TOKENS:
            raise UserError(
                f"anchoring needs {_LEAST_TOKENS} tokens of each kind of text, better thousands; there are "
                f"{ids.numel()} of --text and {others.numel()} of the other"
            )
        half, most = ids.numel() // 2, others.numel() * 4 // 5
        with bar("anchoring"):
            found = anchored(
                memory, backbone.model, ids[:half], others[:most], self.strength, start_id=backbone.start_id
            )
        found.memory.save(self.output)
        results: dict[str, Any] = {"memory": self.output, "strength": self.strength}
        results |= {"difference": found.difference, "elsewhere": found.elsewhere}
        with bar("measuring") as on_progress:
            for done, (name, tokens, first) in enumerate((("on_text", ids, half), ("on_others", others, most)), 1):
                results[name] = _measured(backbone, memory, found.memory, tokens, first)
                on_progress(done, 2)
        results["seconds"] = round(time.perf_counter() - began, 3)
        if self.show.json:
            print_json(results)
        else:
            size = Path(self.output).stat().st_size / 2**20
            name = escape(self.output)
            out.print(f"[bold]{name}[/bold]: {memory.n_parameters:,} parameters, {size:.1f} MiB", soft_wrap=True)
            out.print(_table(results))
        return 0

    def _collect(self, paths: tuple[str, ...]) -> tuple[TextOptions, list[Document]]:
        options = TextOptions(paths, self.gutenberg, self.reflow, self.encoding)
        return options, options.collect()


def _ids(options: TextOptions, documents: list[Document], backbone: Backbone) -> Tensor:
    return torch.cat([text.ids for text in options.tokenize(documents, backbone)])


@dataclass(frozen=True)
class _Held:
    """A memory that learns nothing more; implements `locas.evaluate.comparison.Learnt`."""

    memory: Memory
    model: nn.Module
    name: str = "the memory"

    def active(self) -> AbstractContextManager[Any]:
        return self.memory.attached(self.model)


def _compared(backbone: Backbone, memory: Memory, ids: Tensor, first: int) -> Comparison:
    """The backbone with and without the memory, on the tokens from `first` on."""
    return compare(backbone, _Held(memory, backbone.model), ids, ReadSettings(), first_token=first)[0]


def _measured(backbone: Backbone, old: Memory, new: Memory, ids: Tensor, first: int) -> dict[str, Any]:
    """Gain and change of both memories over no memory."""
    before, after = (_compared(backbone, memory, ids, first) for memory in (old, new))
    return {
        "tokens": before.tokens,
        "gain_before": before.before - before.after,
        "gain_after": after.before - after.after,
        "kl_before": before.kl,
        "kl_after": after.kl,
    }


def _table(results: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("nats a token", "before", "after", "left", "tokens"):
        table.add_column(title, justify="left" if title == "nats a token" else "right")
    for title, what, where in (
        ("gain over no memory, on the text", "gain", "on_text"),
        ("change elsewhere (KL)", "kl", "on_others"),
    ):
        found = results[where]
        before, after = found[f"{what}_before"], found[f"{what}_after"]
        left = f"{100 * after / before:.0f}%" if before > 0 else ""
        table.add_row(title, f"{before:.4f}", f"{after:.4f}", left, f"{found['tokens']:,}")
    return table
