"""Asking questions: likelihoods against the slow obvious way, prompts that fit, figures worked out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from families import tiny_model
from helpers import START, memory_for, text
from locas.attach import attached
from locas.backbone import Backbone, load_backbone
from locas.evaluate.answers import answer_nll, generate_answers, padding_is_harmless
from locas.evaluate.dialogue import DialogueSettings, Prompter, _candidates, _spread, ask, parse_method
from locas.evaluate.dialogue_figures import figures, summarise
from locas.evaluate.locomo import ADVERSARIAL, SINGLE_HOP, UNANSWERABLE, Conversation, Question, Session, Turn
from locas.evaluate.retrieval import render
from tokens import tiny_backbone

FAMILIES = ["qwen3", "gpt2", "mistral", "gemma2", "bloom", "opt", "falcon"]
ANSWERS = [text(n, seed=n) for n in (1, 5, 3)]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone()


def slow_nll(model: Any, prompt: Tensor, answer: Tensor) -> float:
    """One token after the other, each from the whole text before it."""
    total = 0.0
    for i in range(answer.numel()):
        before = torch.cat([prompt, answer[:i]])[None]
        with torch.no_grad():
            total -= float(model(input_ids=before, use_cache=False).logits[0, -1].log_softmax(-1)[answer[i]])
    return total


# -------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("prompt_tokens", [1, 2, 41])  # longer than the sliding windows of mistral and gemma2, too
@pytest.mark.parametrize("family", FAMILIES)
def test_the_likelihood_of_answers_is_that_of_their_tokens_one_by_one(family: str, prompt_tokens: int) -> None:
    of = tiny_backbone(tiny_model(family))
    prompt = text(prompt_tokens, seed=7)
    with attached(of.model, memory_for(of.model)):
        found = answer_nll(of, prompt, ANSWERS)
        expected = [slow_nll(of.model, prompt, answer) for answer in ANSWERS]
    assert found == pytest.approx(expected, rel=1e-6)  # losses are float32 or better; here they come from float64
    assert answer_nll(of, prompt, ANSWERS[1:2]) != pytest.approx(found[1:2], rel=1e-6)  # the memory was felt


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "bloom"])
def test_prompts_of_different_length_are_answered_as_if_alone(family: str) -> None:
    of = tiny_backbone(tiny_model(family))
    prompts = [torch.cat([torch.tensor([START]), text(n, seed=n)]) for n in (3, 17, 5, 11)]
    with attached(of.model, memory_for(of.model)):
        together = generate_answers(of, prompts, max_new_tokens=7, batch=3)
        alone = [generate_answers(of, [p], max_new_tokens=7, batch=1)[0] for p in prompts]
        slow = []
        for prompt in prompts:
            ids = prompt
            for _ in range(7):
                with torch.no_grad():
                    ids = torch.cat([ids, of.model(input_ids=ids[None], use_cache=False).logits[0, -1].argmax()[None]])
                if int(ids[-1]) == of.model.config.eos_token_id:
                    break
            slow.append(of.tokenizer.decode(ids[prompt.numel() :], skip_special_tokens=True).strip())
    assert together == alone == slow
    assert len(set(together)) > 1


@pytest.mark.parametrize(("family", "harmless"), [("qwen3", True), ("gpt2", True), ("opt", True), ("bloom", False)])
def test_the_model_itself_is_asked_whether_padding_is_harmless(family: str, harmless: bool) -> None:
    """When transformers mends BLOOM, the last case fails and may go."""
    assert padding_is_harmless(tiny_backbone(tiny_model(family))) == harmless


def test_an_answer_ends_with_its_line(backbone: Backbone) -> None:
    prompts = [backbone.encode(t)[0] for t in ("It was a dark\nnight, and the\nmoon stood", "He said:\n\n")]
    answers = generate_answers(backbone, prompts, max_new_tokens=40, batch=2)
    assert all(answers)
    assert not any("\n" in answer for answer in answers)


# -------------------------------------------------------------------- prompts


def conversation(n_turns: int = 60) -> Conversation:
    turns = [Turn(f"D1:{i}", "Ann", f"On day {i} I saw {i} boats near the harbour.") for i in range(n_turns)]
    questions = [Question(f"What of day {i}?", SINGLE_HOP, f"{i} boats") for i in range(11)]
    questions[3] = Question("What did Ann fly?", ADVERSARIAL, UNANSWERABLE, "a kite")
    questions[5] = Question("Once more?", SINGLE_HOP, "4 boats.")  # as another one, once normalised
    return Conversation("boats", ("Ann", "Bob"), (Session(1, "8 May, 2023", tuple(turns)),), tuple(questions))


def decoded(of: Backbone, prompt: Tensor) -> str:
    return str(of.tokenizer.decode(prompt))


@pytest.mark.parametrize("context", ["none", "context", "bm25"])
def test_prompts_fit_and_end_with_the_question(backbone: Backbone, context: Any) -> None:
    talk, settings = conversation(), DialogueSettings(context_tokens=160, max_new_tokens=23, turns=9)
    candidates = [[q.gold] for q in talk.questions]
    prompts, left_out = Prompter(backbone, talk, context, settings).prompts(talk.questions, candidates)
    for question, prompt, missing in zip(talk.questions, prompts, left_out, strict=True):
        assert prompt[0] == backbone.start_id
        assert decoded(backbone, prompt).endswith(f"Question: {question.text}\nAnswer:")
        assert prompt.numel() <= 160 - 23
        if context == "none":
            assert missing == 0
            assert prompt.numel() == 1 + backbone.encode(f"Question: {question.text}\nAnswer:")[0].numel()
    if context == "context":
        whole = backbone.encode(talk.text() + "\n")[0].numel()
        asked = [backbone.encode(f"Question: {q.text}\nAnswer:")[0].numel() for q in talk.questions]
        assert all(p.numel() == 160 - 23 for p in prompts)
        assert left_out == [whole - (160 - 23 - 1 - n) for n in asked]
        assert "On day 59 I" in decoded(backbone, prompts[0])  # the latest turn stays


def test_of_retrieved_turns_the_best_stay(backbone: Backbone) -> None:
    talk, question = conversation(), Question("What did Ann see on day 7?", SINGLE_HOP, "7 boats")
    settings = DialogueSettings(context_tokens=128, turns=20)
    prompter = Prompter(backbone, talk, "bm25", settings)
    (prompt,), (missing,) = prompter.prompts([question], [[question.gold]])
    shown = decoded(backbone, prompt)
    assert "On day 7 I saw 7 boats" in shown
    assert missing > 0
    assert "DATE: 8 May, 2023\n" in shown  # whole turns under their date, not a cut
    assert prompter._index is not None
    best = prompter._index.best(question.text, 20)
    kept = shown.count("Ann said")
    assert 0 < kept < 20
    assert render(prompter._index.turns[i] for i in sorted(best[:kept])) in shown


def test_a_question_that_has_no_room_is_refused(backbone: Backbone) -> None:
    talk = conversation()
    with pytest.raises(ValueError, match="40 tokens of context have no room for an answer of 39 and a question"):
        ask(backbone, talk, "none", DialogueSettings(context_tokens=40, max_new_tokens=39))
    with pytest.raises(ValueError, match="2500 tokens of context are more than the 2048"):
        ask(backbone, talk, "none", DialogueSettings(context_tokens=2500))


def test_other_answers_are_of_the_category_differ_and_depend_on_the_question_alone() -> None:
    talk, settings = conversation(), DialogueSettings(others=5)
    first = _candidates(talk, 4, settings)
    assert first[0] == "4 boats"
    assert len(set(first)) == 6
    assert "4 boats." not in first
    assert UNANSWERABLE not in first
    assert first == _candidates(talk, 4, settings)
    assert first[1:] != _candidates(talk, 4, DialogueSettings(others=5, seed=1))[1:]
    assert _candidates(talk, 3, settings) == [UNANSWERABLE, "a kite"]


def test_a_part_of_the_questions_is_spread_evenly() -> None:
    assert _spread(11, 4) == [0, 2, 5, 8]
    assert _spread(5, None) == _spread(5, 9) == [0, 1, 2, 3, 4]


# -------------------------------------------------------------------- methods and figures


@pytest.mark.parametrize(
    ("given", "learner", "context", "options"),
    [
        ("none", None, "none", ()),
        ("bm25", None, "bm25", ()),
        ("context", None, "context", ()),
        ("locas", "locas", "none", ()),
        (" locas:rank=16:lr=0.05+bm25", "locas", "bm25", (("lr", 0.05), ("rank", 16))),
        ("templora-tuned+context", "templora-tuned", "context", ()),
    ],
)
def test_methods_are_understood(given: str, learner: str | None, context: str, options: Any) -> None:
    method = parse_method(given)
    assert (method.name, method.learner, method.context, method.options) == (given.strip(), learner, context, options)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("bm26", "there is no method 'bm26'"),
        ("locas+bm26", "'locas[+]bm26' is not understood"),
        ("none+bm25", "'none[+]bm25' is not understood"),
        ("bm25:k1=2", "'bm25:k1=2' is not understood"),
        ("locas:rank", "'rank' in 'locas:rank' is not understood"),
    ],
)
def test_other_methods_are_refused(given: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_method(given)


def item(category: int, gold: tuple[float, int], others: list[tuple[float, int]], **more: Any) -> dict[str, Any]:
    pairs = [{"nll": nll, "tokens": tokens} for nll, tokens in [gold, *others]]
    base = {"category": category, "f1": 0.5, "gold": pairs[0], "others": pairs[1:], "trap": None, "left_out": 0}
    return {**base, **more}


def test_figures_are_those_worked_out_by_hand() -> None:
    # Per token: -2 against -1.5 and -3; the other one -1 against -1 (a tie).
    now = [item(4, (4.0, 2), [(3.0, 2), (3.0, 1)]), item(4, (1.0, 1), [(2.0, 2)], f1=1.0)]
    # Gold gained 1 a token and 2 a token; others 0.5 and 2, and 3.
    before = [item(4, (6.0, 2), [(4.0, 2), (5.0, 1)]), item(4, (3.0, 1), [(8.0, 2)])]
    found = figures(list(zip(now, before, strict=True)))
    assert found["n"] == 2
    assert found["f1"] == 0.75
    assert found["gold_ll_per_token"] == pytest.approx(-5 / 3)
    assert found["gold_ll_per_answer"] == pytest.approx(-2.5)
    assert found["gold_over_others"] == pytest.approx((0.5 + 0.5) / 2)
    assert found["gained_over_others"] == pytest.approx((0.5 + 0.0) / 2)
    assert "trap_f1" not in found


def test_traps_are_compared_per_token_and_per_answer() -> None:
    trapped = [
        item(5, (8.0, 4), [], trap={"nll": 3.0, "tokens": 1}, trap_f1=-0.25),
        item(5, (8.0, 4), [], trap={"nll": 9.0, "tokens": 9}, trap_f1=-0.75),
    ]
    found = figures([(i, None) for i in trapped])
    assert found["trap_f1"] == -0.5
    assert found["trap_ll_per_token"] == pytest.approx(-1.2)
    assert found["gold_over_trap"] == 0.5  # -2 against -3 and against -1
    assert found["gold_over_trap_per_answer"] == 0.5  # -8 against -3 and against -9
    assert found["gold_over_others"] is None
    assert found["gained_over_others"] is None


def test_methods_are_compared_over_conversations_without_their_traps() -> None:
    trap = item(5, (99.0, 1), [], trap={"nll": 1.0, "tokens": 1}, trap_f1=0.0)
    reading = {"tokens": 7, "seconds": 1.5, "parameters": 11, "bits_per_byte": 2.0}

    def cells(nll: list[float], reading: Any) -> dict[str, Any]:
        return {
            f"talk {i}": {"items": [item(4, (x, 2), [(4.0, 1)]), trap], "reading": reading} for i, x in enumerate(nll)
        }

    results = {"none": cells([6.0, 8.0, 4.0], None), "locas": cells([4.0, 7.0, 5.0], reading)}
    found = summarise(results, [parse_method("none"), parse_method("locas")])
    assert found["methods"]["locas"]["reading"] == {
        "tokens": 21,
        "seconds": 4.5,
        "parameters": 11,
        "bits_per_byte": 2.0,
    }
    assert found["methods"]["none"]["answerable"]["n"] == 3
    assert set(found["methods"]["none"]["categories"]) == {"single-hop", "adversarial"}
    (row,) = [r for r in found["comparisons"] if r["figure"] == "gold_ll_per_token"]
    assert (row["from"], row["to"], row["conversations"]) == ("none", "locas", 3)
    assert row["mean"] == pytest.approx((1.0 + 0.5 - 0.5) / 3)
    assert -0.5 <= row["low"] < row["mean"] < row["high"] <= 1.0
