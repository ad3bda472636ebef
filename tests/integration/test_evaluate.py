"""`locas eval dialogue` and `locas eval forgetting`: whole runs on made-up data, stopped and gone on with, offline."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import locas.cli
from processes import Forks, Locas, sentences

pytestmark = pytest.mark.integration

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
SIZES = ("--window", "128", "--chunk", "64", "--device", "cpu")


def talk(name: str, seed: int) -> dict[str, Any]:
    lines = sentences(24, seed=seed).replace("\n", " ").split(". ")[:23]
    half = [{"speaker": "Ann", "dia_id": f"D1:{i}", "text": line + "."} for i, line in enumerate(lines)]
    questions = [
        {"question": f"Who {line.split()[1]} {' '.join(line.split()[2:])}?", "answer": line.split()[0], "category": 4}
        for line in lines[:3]
    ]
    return {
        "sample_id": name,
        "conversation": {
            "speaker_a": "Ann",
            "speaker_b": "Bob",
            "session_1_date_time": "8 May, 2023",
            "session_1": half[:12],
            "session_2_date_time": "9 May, 2023",
            "session_2": half[12:],
        },
        "qa": [
            *questions,
            {"question": "Who sank?", "adversarial_answer": "the ship", "category": 5},
            {"question": "When did Ann speak?", "answer": 2023, "category": 2},
        ],
    }


def run(*args: object) -> int:
    return locas.cli.main([str(a) for a in args])


@pytest.fixture(scope="module")
def locomo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("locomo") / "talks.json"
    path.write_text(json.dumps([talk("one", 1), talk("two", 2)]))
    return path


# -------------------------------------------------------------------- dialogue


METHODS = "none,bm25,locas:rank=4,locas:rank=4+bm25"


def test_dialogues_are_read_once_asked_and_compared(locomo: Path, tmp_path: Path, capsys: Any) -> None:
    asked = ("eval", "dialogue", locomo, "-o", tmp_path / "out", "--max-new-tokens", 4, "--max-questions", 3, *SIZES)
    assert run(*asked, "--methods", METHODS, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["methods"]) == set(METHODS.split(","))
    assert found["conversations"] == ["one", "two"]
    for name, method in found["methods"].items():
        assert set(method["categories"]) == {"single-hop", "adversarial"}
        assert method["answerable"]["n"] == 4
        assert method["answerable"]["gold_ll_per_answer"] < 0
        assert -1 <= method["categories"]["adversarial"]["trap_f1"] <= 0
        reading = method["reading"]
        assert (reading is None) == ("locas" not in name)
        assert reading is None or reading["parameters"] == 3 * 4 * 192 * 6
    ll = {name: m["answerable"]["gold_ll_per_token"] for name, m in found["methods"].items()}
    assert ll["locas:rank=4"] > ll["none"]  # the names were learnt
    assert ll["bm25"] > ll["none"]
    pairs = {(r["from"], r["to"]) for r in found["comparisons"]}
    assert ("none", "locas:rank=4") in pairs
    assert ("bm25", "locas:rank=4+bm25") in pairs
    assert json.loads((tmp_path / "out" / "dialogue.json").read_text())["methods"].keys() == found["methods"].keys()


def test_a_dialogue_evaluation_that_was_stopped_goes_on(locomo: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    asked = ("eval", "dialogue", locomo, "-o", out, "--max-new-tokens", 3, "--max-questions", 2, *SIZES, "--json")
    assert run(*asked, "--methods", "none", "--max-conversations", 1) == 0
    capsys.readouterr()
    assert run(*asked, "--methods", "none,bm25") == 0
    done = capsys.readouterr()
    assert "one: bm25\n" in done.err
    assert "two: none, bm25\n" in done.err
    before = (out / "cells.json").read_bytes()
    assert run(*asked, "--methods", "none,bm25") == 0
    again = capsys.readouterr()
    assert again.err.replace(" ", "").strip() == ""
    assert json.loads(again.out) == json.loads(done.out)
    assert (out / "cells.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--methods", "bm26"), "there is no method 'bm26'"),
        (("--methods", ","), "names no method"),
        (("--methods", "locas:ranks=3"), "has no option 'ranks'"),
        (("--max-conversations", "0"), "--max-conversations must be 1 or more; got 0"),
        (("--context-tokens", "9000"), "9000 tokens of context are more than the 2048"),
        (("--turns", "0"), "turns must be 1 or more; got 0"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(
    locomo: Path, tmp_path: Path, capsys: Any, more: tuple[str, ...], says: str
) -> None:
    try:
        status = run("eval", "dialogue", locomo, "-o", tmp_path / "out", *more, "--json")
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    assert says in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.skipif(not (SHARED / "locomo").exists(), reason="LoCoMo is not part of the package; put it beside it")
def test_real_questions_are_answered(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    asked = ("--max-conversations", 1, "--max-questions", 2, "--max-new-tokens", 3, "--json")
    path = SHARED / "locomo" / "dev.json"
    assert run("eval", "dialogue", path, "-o", out, "--methods", "none,context,bm25", *asked) == 0
    found = json.loads(capsys.readouterr().out)["methods"]
    assert found["context"]["left_out"] == 2  # no conversation fits into 2,048 tokens
    assert found["none"]["left_out"] == 0


# -------------------------------------------------------------------- forgetting


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    (folder / "whale.txt").write_text(sentences(130, seed=1))
    (folder / "numbers.txt").write_text(" ".join(f"The number {i} follows {i - 1}." for i in range(1, 130)))
    (folder / "letters.txt").write_text(" ".join(f"Dear {chr(65 + i % 26)}, I am well." for i in range(130)))
    return folder


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mmlu")
    for split, n in (("test", 3), ("dev", 5)):
        (folder / split).mkdir()
        for subject in ("anatomy", "philosophy"):
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["question", *(f"choice{i}" for i in range(4)), "answer"])
                rows.writerows(
                    [f"What is\n{subject} {i}?", "a thing", "a word", "a bone", "a rule", i % 4] for i in range(n)
                )
    return folder


FORGETTING = ("--later-tokens", 100, "--unrelated-tokens", 70, "--max-tokens", 320, *SIZES)


def test_the_frontier_is_measured_drawn_and_gone_on_with(books: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    asked = ("eval", "forgetting", books / "whale.txt", "--unrelated", books, "-o", out, *FORGETTING, "--json")
    assert run(*asked, "--methods", "locas,templora-tuned", "--ranks", "8", "--scales", "0.5,1") == 0
    done = capsys.readouterr()
    found = json.loads(done.out)
    assert found["bit_exact"] is True
    assert {(p["label"], p["scale"]) for p in found["points"]} == {
        (f"{name} r8", scale) for name in ("locas", "templora-tuned") for scale in (0.5, 1.0)
    }
    by = {(p["label"], p["scale"]): p for p in found["points"]}
    assert by["locas r8", 1.0]["gain"] > 0
    assert 0 < by["locas r8", 0.5]["kl"] < by["locas r8", 1.0]["kl"]
    assert by["locas r8", 1.0]["parameters"] == 3 * 8 * 192 * 6
    assert set(found["rows"][0]["unrelated"]) == {"numbers.txt", "letters.txt"}
    assert found["commit"] is None or len(found["commit"]) == 40
    page, picture = out / "forgetting.html", out / "forgetting.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = page.read_text()
    assert 'src="http' not in text
    assert "templora-tuned" in text
    assert run(*asked, "--methods", "locas", "--ranks", "8", "--scales", "0.5,1") == 0
    again = capsys.readouterr()
    assert "whale.txt: locas" not in again.err
    assert json.loads(again.out)["points"] == [p for p in found["points"] if p["label"] == "locas r8"]


def test_mmlu_is_asked_before_and_after_without_a_network(
    books: Path, mmlu: Path, tmp_path: Path, locas: Locas
) -> None:
    found = json.loads(
        locas(
            *("eval", "forgetting", books / "whale.txt", "--unrelated", books / "numbers.txt", "-o", tmp_path / "out"),
            *(*FORGETTING, "--methods", "locas", "--ranks", 2, "--lr-factors", "1,0.5"),
            *("--mmlu", mmlu, "--mmlu-limit", 2, "--mmlu-shots", 1, "--json"),
        ).stdout
    )["mmlu"]
    assert (found["n"], found["shots"], found["cut"]) == (4, 1, 0)
    assert len(found["questions_sha256"]) == 64
    assert 0 <= found["accuracy"] <= 1
    assert list(found["after"]) == ["locas r2"]  # at the method's own step size only


def test_a_run_that_is_killed_keeps_what_it_had(books: Path, tmp_path: Path, capsys: Any, forks: Forks) -> None:
    out = tmp_path / "out"
    args = ("eval", "forgetting", books / "whale.txt", "--unrelated", books / "numbers.txt", "-o", out, *FORGETTING)
    more = ("--methods", "locas", "--ranks", ",".join(map(str, range(1, 20))), "--json")
    started = forks.start(*args, *more)
    started.alive_until((out / "cells.json").exists)
    started.kill()
    kept = json.loads((out / "cells.json").read_text())["cells"]
    assert 0 < len(kept) < 19
    assert run(*args, "--methods", "locas", "--ranks", "1,2", "--json") == 0
    done = capsys.readouterr()
    assert "locas r1" not in done.err
    assert len(json.loads(done.out)["points"]) == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--unrelated", "BOOK"), "there is no text unrelated to whale.txt"),
        (("--ranks", "x"), "--ranks 'x' is not understood"),
        (("--scales", "-1"), "scales must be numbers of 0 or more"),
        (("--methods", "none"), "'none' learns nothing"),
        (("--mmlu", "EMPTY"), "has no MMLU files"),
        (("--later-tokens", "100000"), "too few to learn some"),
    ],
)
def test_wrong_input_of_forgetting_is_refused_with_the_reason(
    books: Path, tmp_path: Path, capsys: Any, more: tuple[str, ...], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"BOOK": str(books / "whale.txt"), "EMPTY": str(tmp_path / "empty")}
    given = [f"{flag}={places.get(value, value)}" for flag, value in zip(more[::2], more[1::2], strict=True)]
    given += [] if "--unrelated" in more else [f"--unrelated={books / 'numbers.txt'}"]
    given += [] if "--later-tokens" in more else ["--later-tokens=100"]
    args = ("eval", "forgetting", books / "whale.txt", "-o", tmp_path / "out", *given, "--json")
    assert run(*args) == 2
    assert says in json.loads(capsys.readouterr().out)["error"]


# -------------------------------------------------------------------- without the extras


def test_the_command_line_needs_no_optional_package_until_it_is_used(locomo: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('bm25s', 'nltk', 'lm_eval', 'altair', 'vl_convert', 'peft', 'datasets'):\n"
        "    sys.modules[name] = None\n"
        "import locas.cli\n"
        f"sys.exit(locas.cli.main(['eval', 'dialogue', {str(locomo)!r}, '-o', {str(tmp_path)!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, timeout=300, check=False
    )
    assert done.returncode == 2
    assert 'pip install "locas[eval]"' in done.stderr
