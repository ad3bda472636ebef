"""Fixtures of the integration tests."""

import subprocess
from pathlib import Path

import pytest

from processes import Locas, command, environment, sentences


@pytest.fixture(scope="session")
def locas() -> Locas:
    """Runs the command line in a fresh process."""

    def run(*args: object, stdin: str | None = None, status: int = 0) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            command(*args), input=stdin, capture_output=True, text=True, env=environment(), timeout=300, check=False
        )
        assert done.returncode == status, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def tale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of about 1,500 tokens."""
    path = tmp_path_factory.mktemp("tale") / "tale.txt"
    path.write_text(sentences(165))
    return path
