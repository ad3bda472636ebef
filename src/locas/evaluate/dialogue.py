"""LoCoMo with memories: read each conversation once, then answer all of its questions (arXiv:2602.05085 sec. 5).

    methods = [parse_method(m) for m in ("none", "bm25", "locas", "locas+bm25")]
    result = run(backbone, conversations, methods, ReadSettings(), DialogueSettings(), Cells("cells.json"))

What a small backbone can show moves long before F1 does: the log-likelihood of the gold answer, and whether it is
likelier than a trap or than the answers to other questions of its category.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from locas.backbone import Backbone
from locas.evaluate.answers import answer_nll, generate_answers
from locas.evaluate.books import Method as Spec
from locas.evaluate.cells import Cells, identity, key_of
from locas.evaluate.learners import LEARNERS, Learner, Option, make, resolve
from locas.evaluate.locomo import TEMPORAL, Conversation, Question, f1, normalise, trap_f1
from locas.evaluate.retrieval import TurnIndex, render
from locas.forward import trained_context
from locas.metrics import Score
from locas.stream import ReadSettings

Context = Literal["none", "context", "bm25"]
Prompt = Literal["plain", "locomo"]
PROMPTS: dict[str, str] = {
    "plain": "Question: {}\nAnswer:",
    "locomo": (
        "Based on the above context, write an answer in the form of a short phrase for the following question. Answer "
        "with exact words from the context whenever possible.\n\nQuestion: {} Short answer:"
    ),
}
_TEMPORAL_HINT = " Use DATE of CONVERSATION to answer with an approximate date."
_DEFAULT_CONTEXT = 2048  # tokens, where the backbone does not say


@dataclass(frozen=True)
class DialogueSettings:
    """How questions are asked.

    Attributes:
        prompt: "plain" ("Question: ... Answer:") or "locomo", the benchmark's own instruction.
        turns: how many turns BM25 hands over at most.
        max_new_tokens: length of a generated answer at most.
        others: to how many other questions' answers the gold one is compared.
        context_tokens: prompt and answer together; None: what the backbone was trained for.
        max_questions: of each conversation, evenly spread; None: all.
        seed: of the learners, and of the choice of other answers.
        batch: prompts generated from at once; changes nothing but speed and rounding.
    """

    prompt: Prompt = "plain"
    turns: int = 10
    max_new_tokens: int = 32
    others: int = 4
    context_tokens: int | None = None
    max_questions: int | None = None
    seed: int = 0
    batch: int = 16

    def __post_init__(self) -> None:
        if self.prompt not in get_args(Prompt):
            raise ValueError(f"prompt {self.prompt!r} is not one of {', '.join(get_args(Prompt))}")
        least = {"turns": 1, "max_new_tokens": 1, "others": 1, "context_tokens": 32, "max_questions": 1, "batch": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be {minimum} or more; got {value}")


@dataclass(frozen=True)
class Method:
    """What answers. learner: a name of `LEARNERS` that reads the dialogue, or None; context: what the prompt holds."""

    name: str
    learner: str | None
    options: tuple[tuple[str, Option], ...]
    context: Context


def parse_method(text: str) -> Method:
    """A method from "none", "context", "bm25", a learner's name, or one with a context: "locas+bm25".

    A learner's hyperparameters may follow it: "locas:rank=16:lr=0.05+bm25".

    Raises:
        ValueError: none of these.
    """
    first, plus, second = text.strip().partition("+")
    name, *given = first.strip().split(":")
    context = second if plus else (name if name in get_args(Context) else "none")
    learner = None if name in get_args(Context) else name
    if context not in get_args(Context) or (learner is None and (plus or given)):
        raise ValueError(
            f"the method {text!r} is not understood; give none, context, bm25, one of {', '.join(LEARNERS)}, or one of "
            "these with +bm25 or +context"
        )
    if learner is not None and learner not in LEARNERS:
        raise ValueError(f"there is no method {name!r}; there are none, context, bm25, {', '.join(LEARNERS)}")
    options = tuple(sorted(Spec.parse(first).options.items()))
    return Method(text.strip(), learner, options, context)  # type: ignore[arg-type]


# -------------------------------------------------------------------- running


def run(
    backbone: Backbone,
    conversations: Sequence[Conversation],
    methods: Sequence[Method],
    read: ReadSettings,
    settings: DialogueSettings,
    cells: Cells,
    say: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """Answers every question with every method; what `cells` already has is not done again.

    Args:
        backbone: model and tokenizer; unchanged afterwards.
        conversations: to read.
        methods: of different names.
        read: window, chunk and write rule of the learners.
        settings: how questions are asked.
        cells: where results are kept.
        say: told what happens.
        on_progress: called with how many readings (of a conversation, by a learner or none) are done, and of how many.

    Returns:
        {method: {conversation: {"items": [...], "reading": {...}}}}; see `ask` for an item.

    Raises:
        ValueError: a method twice, or settings that do not fit the backbone.
    """
    if len({m.name for m in methods}) != len(methods):
        raise ValueError(f"a method is given twice: {', '.join(m.name for m in methods)}")
    who = identity(backbone)
    resolved = setups(backbone, methods, read)
    results: dict[str, dict[str, Any]] = {m.name: {} for m in methods}
    groups, done = _groups(methods), 0
    for conversation in conversations:
        keys = {m.name: _key(who, conversation, m, resolved[m.name], settings) for m in methods}
        for learner, group in groups:
            missing = [m for m in group if keys[m.name] not in cells]
            if missing:
                say(f"{conversation.name}: {', '.join(m.name for m in missing)}")
                for method, cell in _measure(backbone, conversation, learner, missing, read, settings):
                    cells.put(keys[method.name], cell)
            done += 1
            on_progress(done, len(conversations) * len(groups))
        for method in methods:
            results[method.name][conversation.name] = cells[keys[method.name]]
    return results


def setups(backbone: Backbone, methods: Sequence[Method], read: ReadSettings) -> dict[str, dict[str, Any] | None]:
    """Every setting of each method's learner, resolved. Raises ValueError for options that it does not have."""
    return {
        m.name: resolve(m.learner, backbone, read, dict(m.options)).record() if m.learner else None for m in methods
    }


def _key(
    who: dict[str, Any],
    conversation: Conversation,
    method: Method,
    setup: dict[str, Any] | None,
    settings: DialogueSettings,
) -> str:
    asked = asdict(settings) | {"batch": None}
    if method.context != "bm25":
        asked["turns"] = None
    return key_of(
        what="dialogue",
        backbone=who,
        conversation=asdict(conversation),
        context=method.context,
        setup=setup,
        settings=asked,
    )


def _groups(methods: Sequence[Method]) -> list[tuple[Method, list[Method]]]:
    """Methods that share a learner, so that a conversation is read once for all of them."""
    groups: dict[tuple[Any, ...], list[Method]] = {}
    for method in methods:
        groups.setdefault((method.learner, method.options), []).append(method)
    return [(group[0], group) for group in groups.values()]


def _measure(
    backbone: Backbone,
    conversation: Conversation,
    learner: Method,
    methods: list[Method],
    read: ReadSettings,
    settings: DialogueSettings,
) -> Iterator[tuple[Method, dict[str, Any]]]:
    if learner.learner is None:
        for method in methods:
            yield method, {"items": ask(backbone, conversation, method.context, settings), "reading": None}
        return
    made = make(learner.learner, backbone, read, seed=settings.seed, options=dict(learner.options))
    try:
        reading = _read(backbone, made, conversation)
        for method in methods:
            with made.active():
                items = ask(backbone, conversation, method.context, settings)
            yield method, {"items": items, "reading": reading}
    finally:
        made.close()


def _read(backbone: Backbone, learner: Learner, conversation: Conversation) -> dict[str, Any]:
    """Reads the whole dialogue: what it cost, and how well it was predicted on the way."""
    ids, n_bytes = backbone.encode(conversation.text())
    began = time.perf_counter()
    nll = torch.cat([record.nll for record in learner.read(ids)])
    score = Score.of(nll, n_bytes)
    return {
        "tokens": ids.numel(),
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "seconds": round(time.perf_counter() - began, 2),
        "parameters": learner.n_parameters,
    }


# -------------------------------------------------------------------- asking


def ask(
    backbone: Backbone, conversation: Conversation, context: Context, settings: DialogueSettings
) -> list[dict[str, Any]]:
    """Asks a conversation's questions.

    Returns:
        An item for each question: question, category, prediction, f1 (the benchmark's), trap_f1 (adversarial only,
        else None), gold, trap, others: {"nll": in nats, "tokens"} each (others: a list); left_out: tokens of the
        context that found no place in the prompt.
    """
    chosen = _spread(len(conversation.questions), settings.max_questions)
    questions = [conversation.questions[i] for i in chosen]
    candidates = [_candidates(conversation, i, settings) for i in chosen]
    prompts, left_out = Prompter(backbone, conversation, context, settings).prompts(questions, candidates)
    predictions = generate_answers(backbone, prompts, max_new_tokens=settings.max_new_tokens, batch=settings.batch)
    items = []
    for question, texts, prompt, prediction, missing in zip(
        questions, candidates, prompts, predictions, left_out, strict=True
    ):
        answers = [_encode_answer(backbone, text) for text in texts]
        nll = answer_nll(backbone, prompt, answers)
        gold, *rest = [{"nll": x, "tokens": a.numel()} for x, a in zip(nll, answers, strict=True)]
        trap = rest.pop(0) if question.trap is not None else None
        items.append(
            {
                "question": question.text,
                "category": question.category,
                "prediction": prediction,
                "f1": f1(prediction, question),
                "trap_f1": trap_f1(prediction, question) if question.trap is not None else None,
                "gold": gold,
                "trap": trap,
                "others": rest,
                "left_out": missing,
            }
        )
    return items


def _spread(n: int, most: int | None) -> list[int]:
    """Positions of at most `most` of n items, evenly spread."""
    most = n if most is None else min(n, most)
    return [i * n // most for i in range(most)]


def _candidates(conversation: Conversation, i: int, settings: DialogueSettings) -> list[str]:
    """The gold answer, then the trap if there is one, else other answers of the category that differ from it."""
    question = conversation.questions[i]
    if question.trap is not None:
        return [question.gold, question.trap]
    others: dict[str, str] = {}
    for other in conversation.questions:
        if other.category == question.category and normalise(other.gold) != normalise(question.gold):
            others.setdefault(normalise(other.gold), other.gold)
    choose = random.Random(f"{settings.seed}/{conversation.name}/{i}")
    pool = list(others.values())
    return [question.gold, *choose.sample(pool, min(len(pool), settings.others))]


def _encode_answer(backbone: Backbone, text: str) -> Tensor:
    return backbone.encode(" " + text)[0]


class Prompter:
    """Prompts that fit into the backbone's context, with room for the answer.

    The dialogue is cut on the left, so that its latest turns stay; of retrieved turns the worst-ranked go first. The
    question stays whole unless it alone is too long.
    """

    def __init__(
        self, backbone: Backbone, conversation: Conversation, context: Context, settings: DialogueSettings
    ) -> None:
        self.backbone, self.context, self.settings = backbone, context, settings
        trained = trained_context(backbone.model)
        self.limit = settings.context_tokens or trained or _DEFAULT_CONTEXT
        if trained is not None and self.limit > trained:
            raise ValueError(
                f"{self.limit} tokens of context are more than the {trained} that this backbone was trained for"
            )
        self._whole = backbone.encode(conversation.text() + "\n")[0] if context == "context" else None
        self._index = TurnIndex(conversation) if context == "bm25" else None

    def prompts(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> tuple[list[Tensor], list[int]]:
        """[n] token ids for each question, and how many tokens of its context were left out."""
        lead = [] if self.backbone.start_id is None else [self.backbone.start_id]
        made, left_out = [], []
        for question, texts in zip(questions, candidates, strict=True):
            answer = max(_encode_answer(self.backbone, text).numel() for text in texts)
            longest = max(answer, self.settings.max_new_tokens)
            room = self.limit - len(lead) - longest
            if room < 1:
                raise ValueError(
                    f"{self.limit} tokens of context have no room for an answer of {longest} and a question; give more "
                    "context, or fewer new tokens"
                )
            asked = self._question(question)[-room:]
            ids, missing = self._context(question, room - asked.numel())
            made.append(torch.cat([torch.tensor(lead, dtype=torch.int64), ids, asked]))
            left_out.append(missing)
        return made, left_out

    def _question(self, question: Question) -> Tensor:
        text = question.text + (_TEMPORAL_HINT if question.category == TEMPORAL else "")
        return self.backbone.encode(PROMPTS[self.settings.prompt].format(text))[0]

    def _context(self, question: Question, room: int) -> tuple[Tensor, int]:
        """What goes before the question in at most `room` tokens, and how many tokens did not fit."""
        nothing = torch.empty(0, dtype=torch.int64)
        if self._whole is not None:
            return self._whole[max(0, self._whole.numel() - room) :], max(0, self._whole.numel() - room)
        if self._index is None:
            return nothing, 0
        best = self._index.best(question.text, self.settings.turns)
        if not best:
            return nothing, 0
        every = self._rendered(tuple(best))
        ids = every
        while ids.numel() > room and len(best) > 1:
            best = best[:-1]
            ids = self._rendered(tuple(best))
        ids = ids[max(0, ids.numel() - room) :]
        return ids, every.numel() - ids.numel()

    def _rendered(self, positions: tuple[int, ...]) -> Tensor:
        assert self._index is not None
        return self.backbone.encode(render(self._index.turns[i] for i in sorted(positions)) + "\n")[0]
