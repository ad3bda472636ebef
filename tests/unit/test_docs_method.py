"""What docs/method.md says of names and settings is so."""

import importlib
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from locas.run_settings import PRESETS

PAGE = (Path(__file__).parents[2] / "docs" / "method.md").read_text()


def _rows(header: str) -> list[list[str]]:
    _, _, rest = PAGE.partition(f"| {header} |\n")
    lines = rest.split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_settings_are_those_of_the_presets() -> None:
    rows = _rows("setting | paper | default")
    assert len(rows) > 5
    for column, preset in ((1, PRESETS["paper"]), (2, PRESETS["default"])):
        values = asdict(preset.init) | asdict(preset.read) | asdict(preset.read.write)
        for row in rows:
            name = row[0].strip("`")
            assert row[column] == str(values[name]), (name, column)
    ours, paper = (asdict(PRESETS[name]) for name in ("default", "paper"))
    different = {k for part in ("init", "read") for k in ours[part] if ours[part][k] != paper[part][k]} - {"write"}
    different |= {k for k, v in ours["read"]["write"].items() if paper["read"]["write"][k] != v}
    assert different <= {row[0].strip("`") for row in rows}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(locas\.[a-z_.A-Z]+)`", PAGE))))
def test_every_name_is_there(name: str) -> None:
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[split:]:
            known = {**getattr(found, "__annotations__", {}), **vars(found)}
            source = Path(str(importlib.import_module(".".join(parts[:split])).__file__)).read_text()
            assert attribute in known or f"self.{attribute}" in source, name
            found = getattr(found, attribute, found)
        return
    raise AssertionError(f"no module of {name} is there")
