"""`locas compose`: several memory files into one, and one of them out again."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
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
from locas.cli.compress import score_rest
from locas.compose import compose, subtract
from locas.composed_fit import FitSettings
from locas.memory import Memory, load
from locas.run_memories import check_output

_DEFAULT = FitSettings()
_HELD_OUT = 8  # one token in so many, at each text's end, is not fitted to: what is kept is measured there
_MOST_HELD_OUT = 2048


@dataclass(frozen=True)
class Compose:
    """Put several memories of one backbone side by side in one file; their effects add up.

    The sum of memories that were read one by one is more than either needs. --weights makes it smaller; --fit, with a
    text for each memory, fits it so that on each text it predicts as that text's own memory does.

        locas compose a.safetensors b.safetensors -o both.safetensors
        locas compose a.safetensors b.safetensors -o both.safetensors --weights 0.6,0.6
        locas compose a.safetensors b.safetensors -o both.safetensors --fit a.txt --fit b.txt
        locas compose both.safetensors --subtract b.safetensors -o a.safetensors
    """

    memories: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MEMORY", help_behavior_hint="")]
    """Memory files of one backbone."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """The memory file to write (.safetensors)."""
    weights: Annotated[Maybe[tuple[str, ...]], tyro.conf.arg(metavar="W,W,...")] = None
    """How much of each memory: one number for all, or one for each, in their order (default: 1)."""
    fit: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """A text for each memory, in their order: what it has read, or the like: --fit A.txt --fit B.txt."""
    fit_tokens: int = _DEFAULT.tokens
    """With --fit: how many of each text's last tokens are fitted to."""
    fit_epochs: int = _DEFAULT.epochs
    """With --fit: passes over the texts."""
    fit_text_share: float = _DEFAULT.text_share
    """With --fit: share of the loss that is the texts' own tokens' (as in reading); the rest is the predictions'."""
    subtract: Annotated[Maybe[str], tyro.conf.arg(metavar="FILE")] = None
    """Take this memory out of a composed one again: what is left is what was there before, bit for bit."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    gutenberg: bool = False
    """Strip the header and licence of Project Gutenberg e-books."""
    reflow: bool = False
    """Join hard-wrapped lines into paragraphs, one a line."""
    encoding: Maybe[str] = None
    """Encoding of the texts; found out where not given."""
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        began = time.perf_counter()
        check_output(Path(self.output))
        fits = (self.fit_tokens, self.fit_epochs, self.fit_text_share)
        if not self.fit and fits != (_DEFAULT.tokens, _DEFAULT.epochs, _DEFAULT.text_share):
            raise UserError("--fit-tokens, --fit-epochs and --fit-text-share go with --fit TEXT, one for each memory")
        if not self.fit and (idle := self._of_the_fit()):
            raise UserError(
                f"{', '.join(idle)}: composing needs no backbone and no text; add --fit TEXT for each memory, or leave "
                f"{'it' if len(idle) == 1 else 'them'} out"
            )
        told: list[dict[str, Any]] = []
        if self.subtract is not None:
            memory = self._without(self.subtract)
        elif self.fit:
            memory, told = self._fitted()
        else:
            memory = compose([load(path) for path in self.memories], weights=self._weights())
        memory.save(self.output)
        manifest, size = memory.manifest(), Path(self.output).stat().st_size
        if self.show.json:
            seconds = {"seconds": round(time.perf_counter() - began, 3)}
            print_json(manifest | {"parameters": memory.n_parameters, "file_bytes": size, "kept": told} | seconds)
            return 0
        ranks = sorted(set(memory.bank.ranks.values()))
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        out.print(
            f"[bold]{escape(self.output)}[/bold]: rank {rank} on {len(memory.bank.layers)} layers, "
            f"{memory.n_parameters:,} parameters, {size / 2**20:.1f} MiB",
            soft_wrap=True,
        )
        for each in told:
            share = f", {100 * each['kept_share']:.0f}% kept" if each["kept_share"] is not None else ""
            out.print(
                f"{escape(each['text'])}: gain over no memory on {each['tokens']:,} tokens that were not fitted to: "
                f"{each['gain_nats']:,.1f} nats with its own, {each['gain_composed_nats']:,.1f} composed{share}",
                soft_wrap=True,
            )
        return 0

    def _of_the_fit(self) -> list[str]:
        """The flags given that only fitting uses, besides its own."""
        fresh = BackboneOptions()
        given = [f"--{f.name}" for f in fields(fresh) if getattr(self.backbone, f.name) != getattr(fresh, f.name)]
        return given + [f"--{name}" for name in ("gutenberg", "reflow", "encoding") if getattr(self, name)]

    def _weights(self) -> list[float]:
        if self.weights is None:
            return [1.0] * len(self.memories)
        words = [word for given in self.weights for word in given.split(",") if word]
        try:
            weights = [float(word) for word in words]
        except ValueError as error:
            raise UserError(f"--weights takes numbers such as 0.75,0.75; got {','.join(words)}") from error
        if len(weights) not in (1, len(self.memories)):
            raise UserError(f"{len(self.memories)} memories need as many weights; got {len(weights)}")
        return weights * len(self.memories) if len(weights) == 1 else weights

    def _without(self, path: str) -> Memory:
        if len(self.memories) != 1 or self.fit or self.weights is not None:
            raise UserError("--subtract takes a part out of one composed memory; leave --weights, --fit and others out")
        return subtract(load(self.memories[0]), load(path))

    def _fitted(self) -> tuple[Memory, list[dict[str, Any]]]:
        paths = [path for given in self.fit for path in given]
        if len(paths) != len(self.memories):
            raise UserError(
                f"--fit takes one text for each memory, in their order; got {len(paths)} for {len(self.memories)} "
                "memories (--fit A.txt --fit B.txt)"
            )
        weights = self._weights()
        settings = FitSettings(self.fit_tokens, self.fit_epochs, text_share=self.fit_text_share)
        options = [TextOptions((path,), self.gutenberg, self.reflow, self.encoding) for path in paths]
        check_memory(*self.memories)
        documents = [each.collect() for each in options]
        backbone = self.backbone.load()
        memories = [backbone_memory(path, backbone) for path in self.memories]
        texts = [
            torch.cat([text.ids for text in each.tokenize(found, backbone)])
            for each, found in zip(options, documents, strict=True)
        ]
        fitted = [ids[: ids.numel() - min(ids.numel() // _HELD_OUT, _MOST_HELD_OUT)] for ids in texts]
        with bar("fitting") as on_progress:
            composed = compose(
                memories,
                weights=weights,
                fit=fitted,
                model=backbone.model,
                start_id=backbone.start_id,
                settings=settings,
                on_progress=on_progress,
            )
        rows = zip(paths, memories, texts, fitted, strict=True)
        return composed, [
            {"text": path} | kept(backbone, memory, composed, ids, used.numel()) for path, memory, ids, used in rows
        ]


def kept(backbone: Backbone, own: Memory, composed: Memory, ids: Tensor, first: int) -> dict[str, Any]:
    """Gains over no memory, in nats, on the tokens from `first` on: with a text's own memory, and with the composed."""
    if first >= ids.numel():
        return {"tokens": 0, "gain_nats": 0.0, "gain_composed_nats": 0.0, "kept_share": None}
    without, alone, both = (score_rest(backbone, memory, ids, first) for memory in (None, own, composed))
    gain, left = without.nll - alone.nll, without.nll - both.nll
    return {
        "tokens": without.tokens,
        "gain_nats": gain,
        "gain_composed_nats": left,
        "kept_share": left / gain if gain > 0 else None,
    }
