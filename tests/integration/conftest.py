"""Fixtures of the integration tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from locas import cli
from processes import Forks, Locas, Main, sentences


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts `locas` processes; one for all tests, so that the imports are done once."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def locas(forks: Forks) -> Locas:
    """Runs the command line in a process of its own, to its end."""
    return forks.run


@pytest.fixture(scope="session")
def tale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of about 1,500 tokens."""
    path = tmp_path_factory.mktemp("tale") / "tale.txt"
    path.write_text(sentences(165))
    return path


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Main:
    """Runs the command line in this process: (status, standard output, standard error)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("locas.cli.common.err.width", 200)
        try:
            status = cli.main([str(a) for a in args])
        except SystemExit as error:  # what the parser of arguments refuses
            status = int(error.code or 0)
        return status, *capsys.readouterr()

    return run
