"""The one command that runs every evaluation: its parts fit the recipes that they call."""

import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))
import everything  # noqa: E402


def test_every_part_calls_a_recipe_with_options_that_it_has() -> None:
    for part in everything.parts(Path("data")):
        source = (RECIPES / part.command[0]).read_text()
        shared = [helper.read_text() for helper in RECIPES.glob("_*.py") if f"from {helper.stem} import" in source]
        source = "".join([source, *shared])
        for option in (*part.command, *part.brief):
            if option.startswith("-"):
                assert f'"{option}"' in source, (part.name, option)


def test_only_keeps_the_order_and_names_what_there_is() -> None:
    every = everything.parts(Path("data"))
    assert [part.name for part in everything.choose(every, "tables,books")] == ["books", "tables"]
    with pytest.raises(SystemExit, match="there is no part boks; there are tune-baselines, books"):
        everything.choose(every, "boks")


def test_missing_data_is_named_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        everything.main([str(tmp_path), "--only", "dialogue,books"])
    assert "lacks books/test, locomo/test.json" in capsys.readouterr().err


def test_a_failing_part_ends_the_run_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "books" / "test").mkdir(parents=True)  # no book in it
    assert everything.main([str(tmp_path), "--only", "books"]) != 0
