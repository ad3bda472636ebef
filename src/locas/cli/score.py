"""`locas score`: how well a text is predicted, with and without a memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
import tyro
from rich.markup import escape
from rich.progress import track

from locas.backbone import Backbone
from locas.cli.common import (
    BackboneOptions,
    Maybe,
    OutputOptions,
    Strength,
    TextOptions,
    backbone_memory,
    check_memory,
    check_strength,
    comparison,
    err,
    out,
    print_json,
)
from locas.memory import Memory, read
from locas.metrics import Score, brief, figures, sum_scores
from locas.run_settings import Text
from locas.stream import ReadSettings


@dataclass(frozen=True)
class ScoreText:
    """Perplexity and bits per byte of texts; with --memory, with it and without it. Nothing is learnt.

    Each token is scored once, with at least window - chunk tokens before it.

        locas score chapter.txt
        locas score chapter.txt --memory book.safetensors --json
    """

    text: TextOptions
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    memory: Annotated[Maybe[str], tyro.conf.arg(metavar="FILE")] = None
    """A memory file made with this backbone."""
    strength: Strength = 1.0
    window: Maybe[int] = None
    """Tokens that the model sees at once (default: 2,048 or the backbone's trained context)."""
    chunk: Maybe[int] = None
    """Tokens that are scored at once, each with at least window - chunk tokens before them (default: half)."""
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        settings = ReadSettings(window=self.window, chunk=self.chunk)
        check_strength(self.strength, self.memory)
        check_memory(self.memory)
        documents = self.text.collect()
        backbone = self.backbone.load()
        memory = backbone_memory(self.memory, backbone).scaled(self.strength) if self.memory else None
        texts = self.text.tokenize(documents, backbone)
        settings = replace(settings, start_in_every_window=backbone.start_in_every_window)
        results = score_texts(backbone, memory, texts, settings)
        if memory is not None:
            results["baseline"] = score_texts(backbone, None, texts, settings)
        if self.show.json:
            print_json(results)
        else:
            out.print(comparison(results, "with memory" if memory else "without memory"))
        return 0


def score_texts(backbone: Backbone, memory: Memory | None, texts: list[Text], settings: ReadSettings) -> dict[str, Any]:
    """Figures of texts read with a memory that does not change, or without one."""
    began = time.perf_counter()
    scores = []
    what = "scoring with memory" if memory else "scoring"
    for text in texts:
        records = read(backbone.model, memory, text.ids, settings, start_id=backbone.start_id, learn=False)
        _, chunk = settings.sizes(backbone.model)
        chunks = -(-text.ids.numel() // chunk)
        shown = track(records, f"{what} {escape(text.name)}", total=chunks, console=err, disable=not err.is_terminal)
        scores.append(Score.of(torch.cat([r.nll for r in shown]), text.n_bytes))
    seconds = time.perf_counter() - began
    parameters = memory.n_parameters if memory else 0
    result = figures(sum_scores(scores), parameters, backbone.n_parameters, seconds)
    result["documents"] = [{"name": t.name, **brief(s)} for t, s in zip(texts, scores, strict=True)]
    return result
