"""LoCoMo: its metric on cases worked out by hand, the traps of its data, retrieval of turns."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from locas.evaluate.locomo import (
    ADVERSARIAL,
    MULTI_HOP,
    OPEN_DOMAIN,
    SINGLE_HOP,
    TEMPORAL,
    UNANSWERABLE,
    Question,
    f1,
    load,
    normalise,
    stems,
    token_f1,
    trap_f1,
)
from locas.evaluate.retrieval import TurnIndex, render

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "locomo"


def sample(**changes: Any) -> dict[str, Any]:
    """A conversation with every trap that the data is known to have."""
    turn = {"speaker": "Ann", "dia_id": "D1:1", "text": "I bought a\nred  kayak!"}
    return {
        "sample_id": "made-up",
        "conversation": {
            "speaker_a": "Ann",
            "speaker_b": "Bob",
            "session_2_date_time": "2:00 pm on 9 May, 2023",
            "session_10_date_time": "1:00 pm on 3 July, 2023",
            "session_10": [{"speaker": "Bob", "dia_id": "D10:1", "text": "Lisbon was warm."}],
            "session_1_date_time": "1:56 pm on 8 May, 2023",
            "session_1": [turn, {**turn, "dia_id": "D1:2", "speaker": "Bob", "blip_caption": "a photo of a lake"}],
            "session_2": [{"speaker": "Ann", "dia_id": "D2:1", "text": "My sister Zoe paints."}],
            "session_11_date_time": "a date without a session",
        },
        "qa": [
            {"question": "When did Ann paint?", "answer": 2022, "evidence": ["D1:1"], "category": TEMPORAL},
            {"question": "What did Bob not do?", "adversarial_answer": "swim", "evidence": [], "category": ADVERSARIAL},
            {
                "question": "Is it Bob's?",
                "answer": "No",
                "adversarial_answer": "Yes",
                "evidence": ["D1:1; D2:1"],
                "category": ADVERSARIAL,
            },
            {"question": "Why?", "answer": "fun", "evidence": ["D:11:26", "D10:1", "D2"], "category": OPEN_DOMAIN},
            {"question": "Who?", "answer": "Zoe", "category": SINGLE_HOP},
        ],
        **changes,
    }


def write(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "locomo.json"
    path.write_text(json.dumps(data))
    return path


# -------------------------------------------------------------------- data


def test_sessions_come_in_the_order_of_their_numbers_and_dates_without_a_session_are_no_sessions(
    tmp_path: Path,
) -> None:
    (conversation,) = load(write(tmp_path, [sample()]))
    assert [s.number for s in conversation.sessions] == [1, 2, 10]
    assert conversation.text() == (
        "DATE: 1:56 pm on 8 May, 2023\n"
        'Ann said, "I bought a red kayak!"\n'
        'Bob said, "I bought a red kayak!" and shared a photo of a lake.\n'
        "\n"
        "DATE: 2:00 pm on 9 May, 2023\n"
        'Ann said, "My sister Zoe paints."\n'
        "\n"
        "DATE: 1:00 pm on 3 July, 2023\n"
        'Bob said, "Lisbon was warm."\n'
    )


def test_what_is_odd_about_questions_is_taken_as_it_is_meant(tmp_path: Path) -> None:
    (conversation,) = load(write(tmp_path, [sample()]))
    when, trap, oddity, why, who = conversation.questions
    assert when.gold == "2022"  # an integer in the data
    assert (trap.gold, trap.trap) == (UNANSWERABLE, "swim")  # no answer at all in the data
    assert (oddity.gold, oddity.trap) == (UNANSWERABLE, "Yes")  # an answer that the benchmark ignores
    assert oddity.evidence == ("D1:1", "D2:1")
    assert why.evidence == ("D10:1",)
    assert (who.evidence, who.trap) == ((), None)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "a list of conversations"),
        ([], "at least one"),
        ([{"qa": []}], "'conversation' is missing"),
        ([sample(conversation={"speaker_a": "A", "speaker_b": "B"})], "it has no session"),
        ([sample(qa=[{"question": "?", "category": 6, "answer": "x"}])], "category 6 is not one of 1, 2, 3, 4, 5"),
        ([sample(qa=[{"question": "?", "category": 4}])], "'answer' is missing"),
        ([sample(qa=[{"question": "?", "category": 4, "answer": " "}])], "has an empty answer"),
        ([sample(), sample()], "names two conversations alike"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path: Path, data: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load(write(tmp_path, data))


def test_a_missing_file_and_one_that_is_not_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.json"):
        load(tmp_path / "nowhere.json")
    (tmp_path / "text.json").write_text("Call me Ishmael.")
    with pytest.raises(ValueError, match=r"text\.json is not JSON"):
        load(tmp_path / "text.json")


@pytest.mark.skipif(not SHARED.exists(), reason="LoCoMo is not part of the package; put it beside the repository")
def test_the_whole_benchmark_is_read() -> None:
    conversations = [c for name in ("dev", "test") for c in load(SHARED / f"{name}.json")]
    questions = [q for c in conversations for q in c.questions]
    traps = [q for q in questions if q.category == ADVERSARIAL]
    assert all((q.trap is not None) == (q.category == ADVERSARIAL) for q in questions)
    assert all(q.gold == UNANSWERABLE for q in traps)
    assert all(c.text().count("DATE: ") == len(c.sessions) for c in conversations)


# -------------------------------------------------------------------- metric


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The cat, and a dog.", "cat dog"),
        ("1,000 miles", "1000 miles"),  # commas go before anything else
        ("well-known", "wellknown"),  # punctuation leaves no space
        ("an apple a day", "apple day"),
        ("Ann and  Bob", "ann bob"),
        ("theatre band", "theatre band"),  # whole words only
        ("the, and", ""),
        ("A.M.", "am"),
    ],
)
def test_normalising(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_words_are_stemmed_as_nltks_porter_stemmer_does() -> None:
    assert stems("Running dogs happily visited museums") == ["run", "dog", "happili", "visit", "museum"]


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("the red kayak", "A kayak", 2 / 3),  # 1 of 2, and 1 of 1: 2 * 1/2 * 1 / (3/2)
        ("kayaks", "kayak", 1.0),
        ("kayak kayak", "kayak", 2 / 3),  # a multiset: the second one finds nothing
        ("kayak kayak", "kayak kayak boat", 0.8),  # 1 and 2/3
        ("boat", "kayak", 0.0),
        ("", "kayak", 0.0),
        ("the", "and", 0.0),  # both are empty once normalised
    ],
)
def test_f1_of_words(prediction: str, gold: str, score: float) -> None:
    assert token_f1(prediction, gold) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("category", "prediction", "gold", "score"),
    [
        # Split at commas before normalising: "paint" finds 1, "pottery class" finds 2/3 in "pottery".
        (MULTI_HOP, "pottery, painting", "painting, pottery class", (1 + 2 / 3) / 2),
        (MULTI_HOP, "painting pottery", "painting, pottery", 2 / 3),  # one part: F1 of 2/3 for either
        (MULTI_HOP, "painting, painting", "painting, swimming", 0.5),
        (SINGLE_HOP, "pottery, painting", "painting, pottery", 1.0),  # not split
        (TEMPORAL, "May 2023", "7 May 2023", 0.8),
        (OPEN_DOMAIN, "likely no", "Likely no; she likes reading", 1.0),
        (SINGLE_HOP, "likely no", "Likely no; she likes reading", 2 * 2 / 5 / (1 + 2 / 5)),
        (ADVERSARIAL, "That is not mentioned here.", UNANSWERABLE, 1.0),
        (ADVERSARIAL, "No information AVAILABLE", UNANSWERABLE, 1.0),
        (ADVERSARIAL, "mentioned in the conversation", UNANSWERABLE, 0.0),
    ],
)
def test_each_category_has_its_score(category: int, prediction: str, gold: str, score: float) -> None:
    trap = "swim" if category == ADVERSARIAL else None
    assert f1(prediction, Question("?", category, gold, trap)) == pytest.approx(score, abs=1e-12)


def test_a_trap_that_was_said_counts_against() -> None:
    question = Question("?", ADVERSARIAL, UNANSWERABLE, "the red kayak")
    assert trap_f1("kayak", question) == pytest.approx(-2 / 3)
    assert trap_f1("nothing", question) == 0
    with pytest.raises(ValueError, match="only adversarial questions have a trap; this one is single-hop"):
        trap_f1("kayak", Question("?", SINGLE_HOP, "kayak"))


# -------------------------------------------------------------------- retrieval


def test_bm25_finds_turns_by_rare_words_speakers_dates_and_captions(tmp_path: Path) -> None:
    (conversation,) = load(write(tmp_path, [sample()]))
    index = TurnIndex(conversation)
    assert index.best("What does ZOE paint?", 1) == [2]
    assert index.best("a lake", 1) == [1]
    assert index.best("What happened in July?", 3) == [3]
    assert index.best("Which kayak did Bob buy?", 2)[0] == 1  # both turns have the kayak, one is Bob's
    assert index.best("xylophone", 3) == []
    assert len(index.best("Ann said", 2)) == 2


def test_bm25_scores_are_lucenes(tmp_path: Path) -> None:
    """Against the formula, on every turn: idf * tf / (tf + k1 * (1 - b + b * length / mean length))."""
    (conversation,) = load(write(tmp_path, [sample()]))
    index = TurnIndex(conversation)
    documents = [re.findall(r"\w+", f"{turn.line()} {session.date}".lower()) for session, turn in conversation.turns()]
    mean = sum(map(len, documents)) / len(documents)
    for position, document in enumerate(documents):
        expected = 0.0
        for word in ("bob", "kayak", "2023"):
            n = sum(word in d for d in documents)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            tf = document.count(word)
            expected += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        assert index.scores("Bob, kayak, kayak, 2023, xylophone")[position] == pytest.approx(expected, rel=1e-5)


def test_turns_are_shown_under_their_dates_in_order(tmp_path: Path) -> None:
    (conversation,) = load(write(tmp_path, [sample()]))
    turns = conversation.turns()
    assert render([turns[0], turns[3]]) == (
        "DATE: 1:56 pm on 8 May, 2023\n"
        'Ann said, "I bought a red kayak!"\n'
        "\n"
        "DATE: 1:00 pm on 3 July, 2023\n"
        'Bob said, "Lisbon was warm."\n'
    )
    assert render(turns) == conversation.text()
    assert render([]) == ""
