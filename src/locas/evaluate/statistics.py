"""Figures from per-token losses, and paired comparisons with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 10_000
LEVEL = 0.95
_ROWS = 1_000  # resamples drawn at once, to bound memory


class Interval(NamedTuple):
    """A mean with its bootstrap interval; the bounds are NaN where there are fewer than two values."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """One method minus another, book by book.

    Attributes:
        differences: {book: difference}, negative where the first method needs fewer bits.
        interval: of their mean, over books.
        better: books on which the first method needs fewer bits.
    """

    differences: dict[str, float]
    interval: Interval
    better: int


def paired_bootstrap(
    differences: Sequence[float], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """The mean of paired differences, with its percentile bootstrap interval (Efron 1979): drawn with replacement.

    Raises:
        ValueError: no differences, or some that are not finite.
    """
    x = np.asarray(differences, dtype=np.float64)
    if x.size == 0:
        raise ValueError("there are no differences to take a mean of")
    if not np.isfinite(x).all():
        raise ValueError(f"differences must be finite; got {x.tolist()}")
    if x.size == 1:
        return Interval(float(x[0]), math.nan, math.nan)
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            x[generator.integers(0, x.size, (min(_ROWS, resamples - done), x.size))].mean(axis=1)
            for done in range(0, resamples, _ROWS)
        ]
    )
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(x.mean()), float(low), float(high))


def paired(one: Mapping[str, float], other: Mapping[str, float], *, seed: int = 0) -> Paired:
    """`one` minus `other` on the books that both have.

    Raises:
        ValueError: they have no book in common.
    """
    both = [book for book in one if book in other]
    if not both:
        raise ValueError(f"no book is in both: {sorted(one)} and {sorted(other)}")
    differences = {book: one[book] - other[book] for book in both}
    interval = paired_bootstrap(list(differences.values()), seed=seed)
    return Paired(differences, interval, sum(d < 0 for d in differences.values()))


def perplexities(nll: Tensor, stops: Sequence[int]) -> tuple[float, float]:
    """Perplexity by both definitions.

    Args:
        nll: [n] losses in nats, NaN where a token was not scored.
        stops: where each chunk ends, ascending; the last is n.

    Returns:
        exp(mean loss); and TempLoRA's (arXiv:2401.11504): the mean of the chunks' perplexities, weighted by their
        tokens, which is never smaller. NaN where nothing was scored.

    Raises:
        ValueError: the chunks do not cover the losses.
    """
    if not stops or stops[-1] != nll.numel() or sorted(set(stops)) != list(stops):
        raise ValueError(f"chunks that end at {list(stops)} do not cover {nll.numel()} losses")
    total = tokens = weighted = 0.0
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        scored = nll[start:stop].double()
        scored = scored[~scored.isnan()]
        if scored.numel():
            total += float(scored.sum())
            tokens += scored.numel()
            weighted += scored.numel() * _exp(float(scored.mean()))
    return (_exp(total / tokens), weighted / tokens) if tokens else (math.nan, math.nan)


def cut(stops: Sequence[int], tokens: int) -> list[int]:
    """The chunks' ends up to `tokens`, where the last one may be cut short."""
    return [stop for stop in stops if stop < tokens] + [tokens]


def binned(nll: Tensor, n_bins: int) -> tuple[list[int], list[float]]:
    """Where each of `n_bins` equal stretches ends (tokens), and its mean loss in nats; fewer where tokens are few."""
    n = nll.numel()
    ends = sorted({round(n * (i + 1) / n_bins) for i in range(n_bins)} - {0})
    means = [float(torch.nanmean(nll[a:b].double())) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return ends, means


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))
