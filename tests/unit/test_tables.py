"""The results page and the README's tables are what the result files say."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import tables  # noqa: E402


def test_the_page_is_made_from_the_files_as_they_are() -> None:
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == tables.page(), "run python recipes/tables.py"


def test_the_readme_has_the_figures_of_the_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(tables.MARKED.findall(readme)) >= 2
    assert tables.with_tables(readme) == readme, "run python recipes/tables.py"


def test_another_figure_in_a_file_changes_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in tables.RESULTS.glob("*.json"):
        report = json.loads(path.read_text(encoding="utf-8"))
        if path.stem.startswith("books_"):
            report["methods"]["locas"]["perplexity"] = 12345.6
        if path.stem.startswith("dialogue_"):
            for pair in report["comparisons"]:
                pair["mean"] = -6.78 if pair["to"].startswith("templora") else 6.78
        if path.stem.startswith("forgetting_"):
            for pair in report["at_equal_gain"]:
                pair["at"][0]["ratio"] = 0.123
        if path.stem.startswith("bench_"):
            report["relative_time"]["locas_exact"] = 98.76
        (tmp_path / path.name).write_text(json.dumps(report), encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    changed = tables.with_tables(readme)
    marked = [name for _, name, _ in tables.MARKED.findall(readme)]
    assert changed.count("12345.6") == sum(name.startswith("books_") for name in marked)
    assert changed.count("+6.78") == 3  # beside no memory, TempLoRA and BM25
    assert changed.count("98.76") == sum(name.startswith("bench_") for name in marked) > 0
    assert changed.count(" 0.12 and ") > 1  # with each of the settings


def test_a_difference_is_turned_round_with_its_interval_and_count() -> None:
    cost = {"perplexity": 2.0, "bits_per_byte": 1.0, "parameters": 1, "relative_time": 1.0, "relative_memory": 1.0}
    pair = {"method": "other", "minus": "locas", "mean": 0.02, "low": 0.01, "high": 0.04, "better_on": 1, "books": 5}
    report = {"methods": {"other": cost}, "paired": [pair], "books": [{"tokens": 7}, {"tokens": 7}, {"tokens": 3}]}
    table = tables.brief(report)
    assert "-0.020 [-0.040, -0.010], 4 of 5" in table
    assert "3 books, the first 7 tokens of each" in table


def test_a_table_that_fails_leaves_both_files_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"PAGE": "the page – before", "README": "<!-- results/x.json -->\nold – figures\n<!-- end -->\n"}
    for name, text in texts.items():
        monkeypatch.setattr(tables, name, tmp_path / name)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "page", lambda: "the page – after")

    def now() -> dict[str, str]:
        return {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir() if path.suffix != ".json"}

    with pytest.raises(FileNotFoundError, match=r"x\.json"):  # the README's table, once the page is made
        tables.main()
    assert now() == texts
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(tables, "brief", lambda report: "new – figures\n")
    assert tables.main() == 0
    assert now() == {"PAGE": "the page – after", "README": texts["README"].replace("old", "new")}
    monkeypatch.setattr(tables, "page", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tables.main()
    assert now()["PAGE"] == "the page – after"
