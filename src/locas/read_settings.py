"""How a document is read: the window that the model sees, the chunks that are scored and written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import get_args

from torch import nn

from locas.attention import AttentionGradient
from locas.forward import positions_are_relative, trained_context
from locas.write import WriteSettings

_DEFAULT_WINDOW = 2048  # tokens; the paper's


@dataclass(frozen=True)
class ReadSettings:
    """How a document is read.

    Attributes:
        window: tokens that the model sees at once, start token included; None: 2,048 or the backbone's trained
            context, whichever is shorter.
        chunk: tokens that are scored, and then written, at once; None: half the window, or where the context is kept,
            which makes short chunks cheap, an eighth: to learn more often is to learn more.
        steps: gradient steps for each chunk.
        attention_gradient: how a write's gradient passes attention. full: as it is; values: through what is averaged,
            the weights counting as constants, which makes a write much cheaper and changes little; stop: not at all.
            Scores are the same. Backbones that do not use torch's attention get the full gradient.
        recompute_ffn: make the FFNs' gate and up again in a write's backward pass instead of keeping them: the same
            memory, less of the machine's, some more time. For FFNs that follow an RMSNorm and have two matrices
            without biases for them (Llama, Mistral, Qwen, Granite); elsewhere nothing changes.
        fill_eps: length, over all layers together, of the values that step-wise slots are filled with.
        start_in_every_window: put the start token before every window, not only before the document's first token;
            None: as the tokenizer does where one is at hand, else yes.
        reuse: keep the context's keys and values from chunk to chunk; if not (--no-reuse), they are recomputed with
            every window: slower, and exact (docs/results.md has the figures). Backbones with absolute positions
            recompute.
        refresh: with reuse, recompute the window after so many chunks.
        sinks: with reuse, so many of the document's first tokens stay in every window.
        write: the write rule and its settings.
    """

    window: int | None = None
    chunk: int | None = None
    steps: int = 1
    attention_gradient: AttentionGradient = "full"
    recompute_ffn: bool = False
    fill_eps: float = 0.01
    start_in_every_window: bool | None = None
    reuse: bool = False
    refresh: int = 64
    sinks: int = 4
    write: WriteSettings = field(default_factory=WriteSettings)

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 2:
            raise ValueError(f"a window needs at least 2 tokens; got {self.window}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"a chunk needs at least 1 token; got {self.chunk}")
        if self.window is not None and self.chunk is not None:
            _check_fit(self.chunk, self.window)
        if self.attention_gradient not in get_args(AttentionGradient):
            raise ValueError(
                f"attention_gradient {self.attention_gradient!r} is not one of {', '.join(get_args(AttentionGradient))}"
            )
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more (to score without learning pass learn=False); got {self.steps}")
        if self.refresh < 1:
            raise ValueError(f"refresh must be 1 (recompute every window) or more chunks; got {self.refresh}")
        if self.sinks < 0:
            raise ValueError(f"sinks must be 0 or more tokens; got {self.sinks}")
        if not (self.fill_eps > 0 and math.isfinite(self.fill_eps)):
            raise ValueError(f"fill_eps must be a positive number; got {self.fill_eps}")

    def sizes(self, model: nn.Module) -> tuple[int, int]:
        """(window, chunk) in tokens for this model.

        Raises:
            ValueError: the window exceeds the context that the model was trained for, or the chunk the window.
        """
        trained = trained_context(model)
        window = self.window or min(_DEFAULT_WINDOW, trained or _DEFAULT_WINDOW)
        if trained is not None and window > trained:
            raise ValueError(
                f"a window of {window} tokens is longer than the {trained} that this backbone was trained for; "
                f"use {trained} or less (--window {trained})"
            )
        chunk = self.chunk or max(1, window // 2)
        if self.chunk is None and self.reuse and self.keeps_context(model, window, short := max(1, window // 8)):
            chunk = short
        _check_fit(chunk, window)
        return window, chunk

    def truncated(self) -> ReadSettings:
        """Truncated reading in the same windows, every one recomputed: what memories are compared with."""
        return replace(self, reuse=False, chunk=None) if self.reuse else self

    def keeps_context(self, model: nn.Module, window: int, chunk: int) -> bool:
        """Whether the context can be kept from chunk to chunk: there is room, and the backbone's positions allow it."""
        return window - chunk > 1 and positions_are_relative(model, self.refresh * chunk + window)


def _check_fit(chunk: int, window: int) -> None:
    if chunk >= window:
        raise ValueError(
            f"a chunk of {chunk} tokens does not fit into a window of {window}: at least one token of context "
            f"goes before it; use --chunk {max(1, window // 2)} or a longer --window"
        )
