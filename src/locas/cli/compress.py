"""`locas compress`: a memory file with fewer slots, and how much of its gain is left."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.markup import escape
from torch import Tensor

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
from locas.compress import Compressed, Method, compress
from locas.grow import thaw
from locas.memory import Memory, read
from locas.metrics import Score, brief
from locas.run_memories import check_output
from locas.stream import ReadSettings


@dataclass(frozen=True)
class Compress:
    """Make a memory smaller, and measure on a text how much of what it gains is left.

    The first tokens of the text show which slots matter; on the rest, the memory's gain in nats against no memory is
    compared with the smaller one's.

        locas compress book.safetensors -o small.safetensors --rank 16 --text book.txt
    """

    memory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MEMORY")]
    """A memory file."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """The memory file to write (.safetensors)."""
    rank: int
    """Slots for each layer afterwards."""
    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")]
    """Text files, folders, or - for standard input, of the kind that the memory is for."""
    method: Method = "eliminate"
    """eliminate: drop slots that cost least, refit values; distil: train keys too; nl-svd: the paper's (Locas-MLP)."""
    sample_tokens: int = 4096
    """Tokens at the text's beginning that are fitted to, at most half of it."""
    thaw: bool = False
    """Compress frozen slots too; afterwards none is frozen (default: they stay as they are, to the last bit)."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    gutenberg: bool = False
    """Strip the header and licence of Project Gutenberg e-books."""
    reflow: bool = False
    """Join hard-wrapped lines into paragraphs, one a line."""
    encoding: Maybe[str] = None
    """Encoding of the files; found out where not given."""
    max_tokens: Maybe[int] = None
    """Look at no more than so many tokens of the text."""
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        began = time.perf_counter()
        if self.sample_tokens < 4:
            raise UserError(f"--sample-tokens must be 4 or more; got {self.sample_tokens}")
        if self.rank < 1:
            raise UserError(f"--rank must be 1 or more; got {self.rank}")
        check_output(Path(self.output))
        check_memory(self.memory)
        options = TextOptions(self.text, self.gutenberg, self.reflow, self.encoding, self.max_tokens)
        documents = options.collect()
        backbone = self.backbone.load()
        memory = backbone_memory(self.memory, backbone)
        memory = thaw(memory) if self.thaw else memory
        ids = torch.cat([text.ids for text in options.tokenize(documents, backbone)])
        fitted = min(self.sample_tokens, ids.numel() // 2)
        with bar("compressing") as on_progress:
            small = compress(
                memory,
                backbone.model,
                ids[:fitted],
                self.rank,
                method=self.method,
                start_id=backbone.start_id,
                on_progress=on_progress,
            )
        small.memory.save(self.output)
        results = _results(backbone, memory, small, ids, fitted)
        results |= {"memory": self.output, "method": self.method, "seconds": round(time.perf_counter() - began, 3)}
        if self.show.json:
            print_json(results)
        else:
            self._print(results, memory, small.memory)
        return 0

    def _print(self, results: dict[str, Any], old: Memory, new: Memory) -> None:
        size = Path(self.output).stat().st_size / 2**20
        out.print(
            f"[bold]{escape(str(self.output))}[/bold]: {old.n_parameters:,} -> {new.n_parameters:,} parameters, "
            f"{size:.1f} MiB",
            soft_wrap=True,
        )
        out.print(f"difference of its function on the text: {100 * results['function_error']:.1f}%")
        gain, left = results["gain_nats"], results["gain_left_nats"]
        survives = f", {100 * left / gain:.0f}% of it" if gain > 0 else ""
        out.print(
            f"gain over no memory on {results['tokens']:,} tokens: {gain:,.1f} nats before, {left:,.1f} after{survives}"
        )


def _results(backbone: Backbone, memory: Memory, small: Compressed, ids: Tensor, fitted: int) -> dict[str, Any]:
    """Losses without memory, with the old and with the new one, on the tokens that were not fitted to."""
    scores = {name: score_rest(backbone, m, ids, fitted) for name, m in
              (("without", None), ("before", memory), ("after", small.memory))}  # fmt: skip
    without, before, after = (scores[name].nll for name in ("without", "before", "after"))
    return {
        "rank": max(small.memory.bank.ranks.values()),
        "parameters_before": memory.n_parameters,
        "parameters": small.memory.n_parameters,
        "function_error": small.error,
        "function_errors": {str(layer): error for layer, error in small.errors.items()},
        "tokens_fitted": fitted,
        "tokens": scores["without"].tokens,
        "gain_nats": without - before,
        "gain_left_nats": without - after,
        "gain_left_share": (without - after) / (without - before) if without > before else None,
        **{
            name: {k: v for k, v in brief(score).items() if k in ("nll", "perplexity")}
            for name, score in scores.items()
        },
    }


def score_rest(backbone: Backbone, memory: Memory | None, ids: Tensor, first: int) -> Score:
    """The loss of the tokens from `first` on, each with its context; nothing is learnt."""
    settings = ReadSettings(start_in_every_window=backbone.start_in_every_window)
    found = []
    with bar("measuring") as on_progress:
        for record in read(
            backbone.model, memory, ids, settings, start_id=backbone.start_id, first_token=first, learn=False
        ):
            found.append(record.nll)
            on_progress(record.stop - first, ids.numel() - first)
    return Score.of(torch.cat(found), 0)
