"""BM25 over the turns of a dialogue: the baseline that a user would pick in place of a memory.

index = TurnIndex(conversation)
for position in index.best("When did Ann move?", 5): ...
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from locas.evaluate.locomo import Conversation, Session, Turn

_WORD = re.compile(r"\w+")


class TurnIndex:
    """Finds the turns of a conversation that share words with a question.

    Lucene's BM25 with k1 1.5 and b 0.75 over lower-cased words; speaker, text and caption of a turn, and its session's
    date, are searched. Nothing is stemmed, and no word is left out: rare words weigh more by themselves.

    Raises:
        ValueError: the package bm25s is not installed.
    """

    def __init__(self, conversation: Conversation) -> None:
        self.turns: list[tuple[Session, Turn]] = conversation.turns()
        self._index = _bm25s().BM25(method="lucene", k1=1.5, b=0.75)
        self._index.index([words(_searched(s, t)) for s, t in self.turns], show_progress=False)

    def scores(self, question: str) -> np.ndarray[Any, Any]:
        """[turns] each turn's BM25 score; a word counts once, words that no turn has count nothing."""
        known = [w for w in dict.fromkeys(words(question)) if w in self._index.vocab_dict]
        if not known:
            return np.zeros(len(self.turns))
        return np.asarray(self._index.get_scores(known), dtype=np.float64)

    def best(self, question: str, n: int) -> list[int]:
        """Positions of at most `n` turns, best first, earlier ones first among equals; none that shares no word."""
        scores = self.scores(question)
        order = np.argsort(-scores, kind="stable")[: max(0, n)]
        return [int(i) for i in order if scores[i] > 0]


def words(text: str) -> list[str]:
    """Lower-case words of a text."""
    return _WORD.findall(text.lower())


def render(turns: Iterable[tuple[Session, Turn]]) -> str:
    """Turns in their order, each session's under its date."""
    lines: list[str] = []
    last = None
    for session, turn in turns:
        if session.number != last:
            lines += ([] if last is None else [""]) + [session.header()]
            last = session.number
        lines.append(turn.line())
    return "\n".join(lines) + "\n" if lines else ""


def _searched(session: Session, turn: Turn) -> str:
    return f"{turn.line()} {session.date}"


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ValueError('BM25 needs the package bm25s; install it with: pip install "locas[eval]"') from error
    return bm25s
