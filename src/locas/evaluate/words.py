"""Which tokens and words of a text a memory helps with."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = re.compile(rb"\S+")
_EDGES = "\"'“”‘’.,;:!?()[]{}_*—–-"
FULL_NATS = 3.0  # a token's help of so much has the full colour


@dataclass(frozen=True)
class Word:
    """A word over a whole text: how often it stands there, and its mean loss in nats without and with the memory."""

    word: str
    count: int
    before: float
    after: float

    @property
    def gain(self) -> float:
        """Nats saved over the whole text."""
        return self.count * (self.before - self.after)


def top_words(text: bytes, ends: Tensor, plain: Tensor, learnt: Tensor, n: int) -> list[Word]:
    """The `n` words with the greatest total gain; a word's loss is the sum over its tokens.

    Args:
        text: UTF-8.
        ends: [tokens] where each token ends in it.
        plain: [tokens] losses in nats without the memory; NaN where not scored.
        learnt: [tokens] with it.
        n: how many.
    """
    spans = [(m.start(), m.end()) for m in _WORD.finditer(text)]
    if not spans:
        return []
    last = (ends - 1).clamp(min=0)
    begins = torch.tensor([a for a, _ in spans])
    which = torch.searchsorted(begins, last, right=True) - 1
    inside = (which >= 0) & (last < torch.tensor([b for _, b in spans])[which.clamp(min=0)])
    inside &= ~(plain.isnan() | learnt.isnan())
    totals = torch.zeros(2, len(spans), dtype=torch.float64)
    for i, losses in enumerate((plain, learnt)):
        totals[i].index_add_(0, which[inside], losses[inside].double())
    seen = torch.zeros(len(spans), dtype=torch.bool)
    seen[which[inside]] = True
    sums: dict[str, list[float]] = {}
    for j in seen.nonzero()[:, 0].tolist():
        a, b = spans[j]
        word = text[a:b].decode("utf-8", "replace").strip(_EDGES)
        if word:
            total = sums.setdefault(word, [0, 0.0, 0.0])
            total[0] += 1
            total[1] += float(totals[0, j])
            total[2] += float(totals[1, j])
    found = [Word(w, int(c), b / c, a / c) for w, (c, b, a) in sums.items()]
    return sorted(found, key=lambda w: (-w.gain, w.word))[:n]


def best_stretch(gain: Tensor, length: int) -> tuple[int, int]:
    """(start, stop) of the stretch of `length` tokens with the greatest sum of gains [n] (NaN counts as 0), in the
    last two thirds, where there has been something to learn."""
    n = gain.numel()
    length = min(length, n)
    first = min(n // 3, n - length)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), gain.double().nan_to_num(0.0).cumsum(0)])
    start = first + int((sums[first + length :] - sums[first : n - length + 1]).argmax())
    return start, start + length


def coloured(text: bytes, ends: Tensor, plain: Tensor, learnt: Tensor, start: int, stop: int) -> str:
    """Tokens `start` to `stop` as HTML: green where the memory helps, orange where it harms, with both losses to see.

    The text is escaped; nothing in it can become markup.
    """
    begin = int(ends[start - 1]) if start else 0
    pieces = []
    for i in range(start, stop):
        end = int(ends[i])
        piece = html.escape(text[begin:end].decode("utf-8", "replace"))
        begin = end
        help_nats = float(plain[i] - learnt[i])
        if help_nats != help_nats or not piece:  # NaN: not scored
            pieces.append(piece)
            continue
        strength = min(1.0, abs(help_nats) / FULL_NATS)
        colour = "42,157,111" if help_nats > 0 else "224,142,27"
        pieces.append(
            f'<span style="background:rgba({colour},{strength:.2f})" '
            f'title="{float(plain[i]):.2f} nats without, {float(learnt[i]):.2f} with">{piece}</span>'
        )
    return "".join(pieces)
