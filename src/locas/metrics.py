"""Perplexity and bits per byte, and the figures that commands print of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Score:
    """How well a text was predicted.

    Attributes:
        tokens: how many tokens were scored.
        n_bytes: UTF-8 bytes of the text that was read.
        nll: sum of the tokens' negative log-likelihoods, in nats.
    """

    tokens: int
    n_bytes: int
    nll: float

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens): a backbone's own tokens, so comparable only where the tokenizer is the same."""
        return math.exp(min(self.nll / self.tokens, 700.0)) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """nll / ln 2 / bytes: comparable between tokenizers."""
        return self.nll / math.log(2) / self.n_bytes if self.n_bytes else math.nan

    def __add__(self, other: Score) -> Score:
        return Score(self.tokens + other.tokens, self.n_bytes + other.n_bytes, self.nll + other.nll)

    @staticmethod
    def of(nll: Tensor, n_bytes: int) -> Score:
        """The score of per-token losses [n], NaN where a token was not scored; summed in float64."""
        scored = nll[~nll.isnan()].double()
        return Score(scored.numel(), n_bytes, float(scored.sum()))


def sum_scores(scores: Iterable[Score]) -> Score:
    """The score of several texts taken as one."""
    return sum(scores, start=Score(0, 0, 0.0))


def figures(score: Score, memory_parameters: int, backbone_parameters: int, seconds: float) -> dict[str, Any]:
    """The figures that every command prints with --json; `nll` is the sum over all tokens, in nats."""
    return brief(score) | {
        "memory_parameters": memory_parameters,
        "backbone_parameters": backbone_parameters,
        "seconds": round(seconds, 3),
    }


def brief(score: Score) -> dict[str, Any]:
    """The figures of a score alone; `nll` is the sum over all tokens, in nats."""
    return {
        "tokens": score.tokens,
        "bytes": score.n_bytes,
        "nll": score.nll,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
