"""The frontier of gain against change, worked out by hand; and results that may be joined, and those that may not."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from locas.evaluate.forgetting_figures import equal_gain, joined, least_kl, summarise
from locas.evaluate.mmlu import Mmlu

RESULTS = Path(__file__).parents[2] / "results"


def point(gain: float, kl: float, label: str = "x", scale: float = 1.0) -> dict[str, Any]:
    return {"gain": gain, "kl": kl, "label": label, "scale": scale}


def test_the_least_kl_is_what_is_worked_out_by_hand() -> None:
    dialled = [point(0.1, 0.01, "x", 0.5), point(0.2, 0.09, "x", 1.0)]
    assert least_kl(dialled, 0.05) == pytest.approx(0.0025)  # from scale 0, where the root of KL is 0
    assert least_kl(dialled, 0.15) == pytest.approx(0.04)  # halfway between the roots 0.1 and 0.3
    assert least_kl(dialled, 0.2) == pytest.approx(0.09)
    assert least_kl(dialled, 0.21) == math.inf  # nothing is extrapolated
    too_far = [*dialled, point(0.1, 0.36, "x", 2.0)]  # past the best scale: less gain for more KL
    assert least_kl(too_far, 0.15) == pytest.approx(0.04)
    assert least_kl([*dialled, point(0.16, 0.03, "y")], 0.15) == pytest.approx(0.03)  # another configuration, as it is
    assert least_kl([point(0.3, 0.04, "y"), point(0.1, 0.01, "z")], 0.05) == pytest.approx(0.01)
    assert least_kl([], 0.1) == math.inf


def test_kl_at_equal_gain_is_what_is_worked_out_by_hand() -> None:
    ours = [point(0.1, 0.01, "x", 0.5), point(0.2, 0.04, "x", 1.0)]  # root of KL = gain
    theirs = [point(0.1, 0.04, "y", 0.5), point(0.3, 0.36, "y", 1.0)]  # root of KL = 2 * gain
    found = equal_gain(ours, theirs)
    assert [round(x["gain"], 12) for x in found] == [0.04, 0.08, 0.12, 0.16, 0.2]
    assert [x["kl"] for x in found] == pytest.approx([x["gain"] ** 2 for x in found])
    assert [x["kl_against"] for x in found] == pytest.approx([4 * x["gain"] ** 2 for x in found])
    assert [x["ratio"] for x in found] == pytest.approx([0.25] * 5)
    assert equal_gain(ours, [point(-0.1, 0.1, "y")]) == []
    assert equal_gain(ours, []) == []


def test_points_are_means_over_books_and_those_without_all_books_are_not_compared() -> None:
    def row(book: str, label: str, method: str, gain: float, kl: float) -> dict[str, Any]:
        base = {"rank": 2, "lr_factor": 1.0, "scale": 1.0, "parameters": 7, "seconds": 1.0, "bit_exact": True}
        return base | {
            "book": book,
            "label": label,
            "method": method,
            "gain": gain,
            "kl": kl,
            "bits_per_byte_change": 0.5,
            "mmlu": None,
        }

    rows = [
        row("a", "x", "locas", 0.1, 0.01),
        row("b", "x", "locas", 0.3, 0.03),
        row("a", "y", "templora", 0.2, 0.08),
        row("b", "y", "templora", 0.2, 0.08),
        row("a", "z", "templora", 9.0, 0.0),
    ]
    found = summarise({"rows": rows, "failed": [{"book": "b", "label": "z"}], "mmlu": None})
    x, _, z = found["points"]
    assert (x["gain"], x["kl"], x["books"], z["books"]) == (pytest.approx(0.2), pytest.approx(0.02), 2, 1)
    assert 0.1 <= x["gain_low"] <= 0.2 <= x["gain_high"] <= 0.3
    (pair,) = found["at_equal_gain"]
    assert pair["left_out"] == []
    assert [p["share"] for p in pair["at"]] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [p["books"]["a"]["ratio"] for p in pair["at"]] == pytest.approx([1 / 8] * 5)
    assert [p["books"]["b"]["ratio"] for p in pair["at"]] == pytest.approx([3 / 8] * 5)
    assert [p["ratio"] for p in pair["at"]] == pytest.approx([3**0.5 / 8] * 5)
    nothing = [row | {"gain": -0.1} if (row["book"], row["label"]) == ("b", "x") else row for row in rows[:4]]
    (pair,) = summarise({"rows": nothing, "failed": [], "mmlu": None})["at_equal_gain"]
    assert pair["left_out"] == ["b"]
    assert [p["ratio"] for p in pair["at"]] == pytest.approx([1 / 8] * 5)


# -------------------------------------------------------------------- joining


def test_a_method_is_added_to_earlier_results() -> None:
    found = json.loads((RESULTS / "forgetting_test.json").read_text())

    def only(method: str) -> dict[str, Any]:
        part = json.loads(json.dumps(found))
        part["rows"] = [row for row in part["rows"] if row["method"] == method]
        kept = {row["label"] for row in part["rows"]}
        part["settings"]["configurations"] = {k: v for k, v in found["settings"]["configurations"].items() if k in kept}
        return part

    ours, theirs = only("locas-recomputed"), only("templora-tuned")
    both = joined(theirs, ours)
    assert sorted(both["rows"], key=lambda row: row["book"]) == found["rows"]
    for key in ("points", "at_equal_gain", "mmlu", "failed", "bit_exact"):
        assert both[key] == found[key], key
    assert both["settings"] == found["settings"]
    assert joined(both, ours)["points"] == both["points"]
    assert joined(ours, theirs)["at_equal_gain"][0]["method"] == "templora-tuned"
    ours["settings"]["forgetting"]["scales"] = [2.0, 0.25]
    assert joined(theirs, ours)["settings"]["forgetting"]["scales"] == [0.25, 0.5, 0.75, 1.0, 2.0]
    ours["settings"]["forgetting"]["later_tokens"] += 1
    with pytest.raises(ValueError, match="how much is learnt and looked at differ"):
        joined(theirs, ours)
    for row in theirs["rows"]:
        row["unrelated"]["another.txt"] = {"tokens": 4096, "bits_per_byte": 1.5}
    with pytest.raises(ValueError, match="unrelated texts differ"):
        joined(theirs, only("locas-recomputed"))


def test_a_book_is_added_to_earlier_results() -> None:
    found = json.loads((RESULTS / "forgetting_test.json").read_text())
    first, *others = sorted({row["book"] for row in found["rows"]})
    one, rest = (
        found | {"rows": [row for row in found["rows"] if row["book"] in books]} for books in ([first], others)
    )
    both = joined(rest, one)
    for key in ("at_equal_gain", "mmlu", "failed", "bit_exact", "settings"):
        assert both[key] == found[key], key
    assert sorted(both["rows"], key=str) == sorted(found["rows"], key=str)
    half = joined(rest, one | {"rows": [row for row in one["rows"] if row["method"] == "locas-recomputed"]})
    assert {p["books"] for p in half["points"] if p["method"] == "locas-recomputed"} == {1 + len(others)}
    assert {p["books"] for p in half["points"] if p["method"] != "locas-recomputed"} == {len(others)}
    assert half["at_equal_gain"] == []


def halves() -> tuple[dict[str, Any], dict[str, Any]]:
    """The results with MMLU, taken apart: TempLoRA on every book, and Locas on every book."""
    text = (RESULTS / "forgetting_test_50k.json").read_text(encoding="utf-8")
    found = [json.loads(text) for _ in range(2)]
    for half, method in zip(found, ("templora-tuned", "locas"), strict=True):
        half["rows"] = [row for row in half["rows"] if row["method"] == method]
    return found[0], found[1]


def of_unrelated(result: dict[str, Any]) -> dict[str, Any]:
    return next(iter(result["rows"][-1]["unrelated"].values()))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda x: x["backbone"].update(weights_sha256="abc"),
            r"backbone differ \(weights_sha256: 93d1b0d5\w+ and abc",
        ),
        (lambda x: x["settings"].update(max_tokens=9000), r"looked at differ \(max_tokens: 50000 and 9000\)"),
        (lambda x: x["settings"]["forgetting"].update(seed=1), r"looked at differ \(seed: 0 and 1\)"),
        (
            lambda x: x["settings"]["read"].update(window=512, chunk=64),
            r"windows and chunks differ \(window: None and 512, chunk: None and 64\)",
        ),
        (
            lambda x: x["rows"][0]["unrelated"].update(more={"tokens": 1, "bits_per_byte": 1.0}),
            "unrelated texts differ",
        ),
        (lambda x: of_unrelated(x).update(tokens=7), r"differ \(unrelated \S+\.tokens: 4096 and 7\)"),
        (lambda x: of_unrelated(x).update(bits_per_byte=1.1), r"\.bits_per_byte: [\d.]+ and 1\.1\)"),
        (lambda x: x["rows"][-1].update(tokens=49_999), r"reads them differ \(book \S+\.tokens: 50000 and 49999\)"),
        (lambda x: x["rows"][-1].update(later_nll=4.0), r"\.later_nll: [\d.]+ and 4\.0\)"),
        (lambda x: x["mmlu"].update(n=57), r"MMLU's questions differ \(n: 1140 and 57\)"),
        (lambda x: x["mmlu"].update(shots=0), r"MMLU's questions differ \(shots: 5 and 0\)"),
        (lambda x: x["mmlu"].update(accuracy=0.3, questions_sha256="abc"), r"\(accuracy: 0\.24\d+ and 0\.3\)"),
    ],
)
def test_what_was_not_measured_alike_is_not_joined(spoil: Callable[[dict[str, Any]], None], says: str) -> None:
    earlier, later = halves()
    assert len(joined(earlier, later)["rows"]) == len(earlier["rows"]) + len(later["rows"])
    spoil(later)
    with pytest.raises(ValueError, match=f"^these results cannot be joined: .*{says}"):
        joined(earlier, later)


def test_a_configuration_of_other_settings_does_not_get_rows_of_another_book() -> None:
    _, every = halves()
    book, *_ = sorted({row["book"] for row in every["rows"]})
    one = json.loads(json.dumps(every))
    one["rows"] = [row for row in one["rows"] if row["book"] == book]
    one["settings"]["configurations"]["locas r16"]["read"]["chunk"] = 17
    with pytest.raises(ValueError, match=r"joined: locas r16 differ \(read\.chunk: 256 and 17\)"):
        joined(every, one)
    every["rows"] = [row for row in every["rows"] if row["book"] == book]
    assert joined(every, one)["rows"] == one["rows"]  # nothing of the other settings is left


def test_questions_are_told_apart_by_their_hash_where_both_have_it() -> None:
    earlier, later = halves()
    later["mmlu"]["questions_sha256"] = "abc"
    both = joined(earlier, later)  # the earlier file is of before it was noted: the same n, shots and accuracy
    assert both["mmlu"]["questions_sha256"] == joined(later, earlier)["mmlu"]["questions_sha256"] == "abc"
    earlier["mmlu"] |= {"questions_sha256": "abc", "accuracy": 0.25}  # rounding on another machine
    assert joined(earlier, later)["mmlu"]["accuracy"] == later["mmlu"]["accuracy"]
    earlier["mmlu"]["questions_sha256"] = "abd"
    with pytest.raises(ValueError, match=r"MMLU's questions differ \(questions_sha256: abd and abc\)"):
        joined(earlier, later)
    assert joined(earlier, later | {"mmlu": None})["mmlu"]["n"] == 1140


def test_the_hash_is_of_the_questions_that_are_asked(tmp_path: Path) -> None:
    head = "question,choice0,choice1,choice2,choice3,answer\n"
    (tmp_path / "test").mkdir()
    path = tmp_path / "test" / "law_test.csv"
    path.write_text(head + "q,a,b,c,d,1\nr,a,b,c,d,2\n", encoding="utf-8")

    def asked(limit: int | None) -> str:
        return Mmlu(tmp_path, limit=limit).questions_sha256

    first, every = asked(1), asked(None)
    assert first != every == asked(2) == asked(3)
    path.write_text(head + "q,a,b,c,d,1\ns,a,b,c,d,2\n", encoding="utf-8")
    assert (asked(1), asked(2) == every) == (first, False)
