"""LoCoMo question answering (arXiv:2402.17753): its data, its dialogue as text, its metric.

    conversations = load("locomo.json")
    print(conversations[0].text())
    f1("Paris, Rome", conversations[0].questions[0])

Metric as in the benchmark's public code; its evaluation data is CC BY-NC 4.0 and no part of this package.
"""

from __future__ import annotations

import functools
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Many projects swap these names; the numbers are the benchmark's.
CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
MULTI_HOP, TEMPORAL, OPEN_DOMAIN, SINGLE_HOP, ADVERSARIAL = CATEGORIES
UNANSWERABLE = "Not mentioned in the conversation"
_REFUSALS = ("no information available", "not mentioned")

_SESSION = re.compile(r"session_(\d+)")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SMALL_WORDS = re.compile(r"\b(a|an|the|and)\b")


@dataclass(frozen=True)
class Turn:
    """One utterance. id: the data's "dia_id", e.g. "D3:7"; caption: of the shared picture, None without one."""

    id: str
    speaker: str
    text: str
    caption: str | None = None

    def line(self) -> str:
        """As the dialogue shows it, on one line."""
        shared = f" and shared {self.caption}." if self.caption else ""
        return f'{self.speaker} said, "{self.text}"{shared}'


@dataclass(frozen=True)
class Session:
    """Turns of one day, in order. date: as the data has it, e.g. "1:56 pm on 8 May, 2023"; may be empty."""

    number: int
    date: str
    turns: tuple[Turn, ...]

    def header(self) -> str:
        return f"DATE: {self.date}"


@dataclass(frozen=True)
class Question:
    """One item.

    Attributes:
        text: the question.
        category: a key of `CATEGORIES`.
        gold: the answer; `UNANSWERABLE` for adversarial items, whatever their "answer" says.
        trap: what an adversarial item wants to hear wrongly; None elsewhere.
        evidence: ids of turns, those that were well-formed.
    """

    text: str
    category: int
    gold: str
    trap: str | None = None
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """A dialogue over many sessions, in chronological order, and the questions about it."""

    name: str
    speakers: tuple[str, str]
    sessions: tuple[Session, ...]
    questions: tuple[Question, ...]

    def text(self) -> str:
        """The whole dialogue: sessions under a DATE line each, a turn a line."""
        blocks = ["\n".join([s.header(), *(turn.line() for turn in s.turns)]) for s in self.sessions]
        return "\n\n".join(blocks) + "\n"

    def turns(self) -> list[tuple[Session, Turn]]:
        """All turns with their sessions, in order."""
        return [(session, turn) for session in self.sessions for turn in session.turns]


# -------------------------------------------------------------------- data


def load(path: str | Path) -> list[Conversation]:
    """Reads a LoCoMo file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, or not LoCoMo's; the message names the conversation.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a LoCoMo JSON file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a LoCoMo JSON file") from error
    if not isinstance(data, list) or not data:
        raise ValueError(f"{path} is not a LoCoMo file: it should hold a list of conversations, and at least one")
    conversations = []
    for i, sample in enumerate(data):
        try:
            conversations.append(_conversation(sample, i))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"conversation {i} of {path} is not LoCoMo's: {what}") from error
    names = [c.name for c in conversations]
    if len(set(names)) != len(names):
        raise ValueError(f"{path} names two conversations alike: {', '.join(sorted(names))}")
    return conversations


def _conversation(sample: Any, i: int) -> Conversation:
    talk = sample["conversation"]
    numbers = sorted(int(m[1]) for m in map(_SESSION.fullmatch, talk) if m)  # some dates have no session
    sessions = tuple(_session(talk, number) for number in numbers if talk[f"session_{number}"])
    if not sessions:
        raise ValueError("it has no session")
    return Conversation(
        name=str(sample.get("sample_id", i)),
        speakers=(str(talk["speaker_a"]), str(talk["speaker_b"])),
        sessions=sessions,
        questions=tuple(_question(item) for item in sample["qa"]),
    )


def _session(talk: Any, number: int) -> Session:
    turns = [
        Turn(str(t["dia_id"]), str(t["speaker"]), _one_line(t["text"]), _one_line(t.get("blip_caption") or "") or None)
        for t in talk[f"session_{number}"]
    ]
    return Session(number, str(talk.get(f"session_{number}_date_time") or "unknown"), tuple(turns))


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _question(item: Any) -> Question:
    category = item["category"]
    if category not in CATEGORIES or isinstance(category, bool):
        raise ValueError(f"category {category!r} is not one of {', '.join(map(str, CATEGORIES))}")
    trap = str(item["adversarial_answer"]) if category == ADVERSARIAL else None
    gold = UNANSWERABLE if category == ADVERSARIAL else str(item["answer"])  # some answers are integers
    if not gold.strip() or (trap is not None and not trap.strip()):
        raise ValueError(f"the question {item['question']!r} has an empty answer")
    evidence = tuple(
        part for entry in item.get("evidence") or () for part in re.findall(r"(?<!\w)D\d+:\d+(?![\w:])", str(entry))
    )
    return Question(_one_line(item["question"]), category, _one_line(gold), trap and _one_line(trap), evidence)


# -------------------------------------------------------------------- metric


def normalise(text: str) -> str:
    """Commas out; lower case; punctuation out, leaving no space; a, an, the, and become a space; spaces collapsed."""
    text = text.replace(",", "").lower().translate(_PUNCTUATION)
    return " ".join(_SMALL_WORDS.sub(" ", text).split())


def stems(text: str) -> list[str]:
    """Porter stems of the normalised text's words."""
    stem = _stemmer()
    return [stem(word) for word in normalise(text).split()]


@functools.cache
def _stemmer() -> Callable[[str], str]:
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError as error:
        raise ValueError(
            "LoCoMo's metric needs NLTK's stemmer; install it with: pip install \"locas[eval]\""
        ) from error
    return functools.cache(PorterStemmer().stem)


def token_f1(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the multiset of stems that the two share."""
    predicted, wanted = stems(prediction), stems(gold)
    common = sum((Counter(predicted) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def f1(prediction: str, question: Question) -> float:
    """The benchmark's score of an answer, 0..1.

    Multi-hop: the mean over the gold answer's parts (split at commas) of the best F1 of the prediction's parts.
    Open-domain: the gold answer up to its first semicolon. Adversarial: 1 if the prediction declines to answer.
    """
    if question.category == ADVERSARIAL:
        return float(any(phrase in prediction.lower() for phrase in _REFUSALS))
    gold = question.gold
    if question.category == MULTI_HOP:
        parts = [p.strip() for p in prediction.split(",")]
        return _mean([max(token_f1(p, g.strip()) for p in parts) for g in gold.split(",")])
    if question.category == OPEN_DOMAIN:
        gold = gold.split(";")[0].strip()
    return token_f1(prediction, gold)


def trap_f1(prediction: str, question: Question) -> float:
    """How much of an adversarial item's trap was said, negative: what arXiv:2602.05085 reports for category 5."""
    if question.trap is None:
        raise ValueError(f"only adversarial questions have a trap; this one is {CATEGORIES[question.category]}")
    return -token_f1(prediction, question.trap)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
