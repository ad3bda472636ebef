"""What the README shows runs as it stands there."""

from __future__ import annotations

import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

import locas
from locas.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the README speaks of."""
    text = (ROOT / "LICENSE").read_text()
    (tmp_path / "book.txt").write_text(text[:4_000])
    (tmp_path / "chapter.txt").write_text(text[4_000:6_000])
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(text[:2_000])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(language: str) -> list[str]:
    """The code blocks of one language; "" for those without."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def test_python_blocks(folder: Path) -> None:
    whole = blocks("python")
    assert len(whole) == 2
    families = list(locas.FAMILIES)
    try:
        for block in whole:
            exec(compile(block, "README.md", "exec"), {})
    finally:
        locas.FAMILIES[:] = families
    assert (folder / "book.safetensors").exists()


def test_command_lines(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith("locas ")]
    assert len(lines) >= 5
    for line in lines:
        monkeypatch.setattr("sys.stdin", io.StringIO("My name is Ishmael.\n"))
        args = shlex.split(line, comments=True)[1:]
        if args[0] in ("generate", "chat"):
            args += ["--max-new-tokens", "8"]
        assert main(args) == 0, (line, capsys.readouterr().err)
        for name in ("a.safetensors", "b.safetensors"):
            shutil.copy(folder / "book.safetensors", folder / name)
    assert (folder / "me.safetensors").exists()
    assert (folder / "original/model.safetensors").exists()


def test_every_public_name_is_shown() -> None:
    for name in locas.__all__:
        assert name == "__version__" or f"`{name}" in README or f"{name}(" in README, name


def test_every_module_has_its_line() -> None:
    for path in (ROOT / "src/locas").glob("*.py"):
        if not path.name.startswith("_"):
            assert f"`{path.name}`" in README, path.name


def test_the_two_commands_exist() -> None:
    script = (ROOT / "dev.sh").read_text()
    for task in re.findall(r"^\./dev\.sh (\w+)", README, re.M):
        assert f"    {task}) " in script
    assert "./dev.sh test" in (ROOT / ".ci/run").read_text()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"locas {locas.__version__}\n"
