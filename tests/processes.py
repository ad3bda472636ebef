"""What the integration tests share: the command line in processes of its own, and texts to read."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

NAMES = ["Ahab", "Ishmael", "Queequeg", "Starbuck", "Stubb", "Flask", "Pip", "Fedallah", "Elijah", "Peleg", "Tashtego"]
VERBS = ["watched", "followed", "feared", "praised", "forgot", "remembered", "called", "left", "found"]
THINGS = ["the white whale", "the old ship", "a long harpoon", "the grey sea", "his own shadow", "the doubloon"]
TIMEOUT_S = 300.0
POLL_S = 0.005

SMALL = ("--window", "32", "--chunk", "16", "--rank", "2", "--max-tokens", "40", "--device", "cpu")

Locas = Callable[..., "subprocess.CompletedProcess[str]"]
Main = Callable[..., tuple[int, str, str]]  # (status, standard output, standard error)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "locas", *map(str, args)]


def in_new_python(*args: object, stdin: str | None = None, status: int = 0) -> "subprocess.CompletedProcess[str]":
    """`locas ARGS` in a Python that starts from nothing."""
    done = subprocess.run(
        command(*args),
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done


class Forks:
    """`locas` in processes of its own that are forked from one which has done the imports: see `forks.py`.

    Args:
        folder: for what the processes print.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.parent = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forks.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def ask(self, request: dict[str, object]) -> int | None:
        assert self.parent.stdin
        assert self.parent.stdout
        self.parent.stdin.write(json.dumps(request) + "\n")
        self.parent.stdin.flush()
        line = self.parent.stdout.readline()
        assert line, "the process that forks has ended; what it said is on standard error"
        answer: int | None = json.loads(line)
        return answer

    def start(self, *args: object, stdin: str = "") -> "Forked":
        self.count += 1
        paths = {name: self.folder / f"{self.count}.{name}" for name in ("in", "out", "err")}
        for path in paths.values():
            path.write_text(stdin if path.suffix == ".in" else "")
        pid = self.ask({"args": [str(a) for a in args]} | {name: str(path) for name, path in paths.items()})
        assert pid is not None
        return Forked(self, pid, paths["out"], paths["err"])

    def run(self, *args: object, stdin: str = "", status: int = 0) -> "subprocess.CompletedProcess[str]":
        process = self.start(*args, stdin=stdin)
        out, err = process.finish()
        assert process.returncode == status, err
        return subprocess.CompletedProcess(list(args), status, out, err)

    def close(self) -> None:
        self.parent.communicate(timeout=TIMEOUT_S)


class Forked:
    """A `locas` process. pid; returncode: None while it runs, negative where a signal ended it."""

    def __init__(self, forks: Forks, pid: int, out: Path, err: Path) -> None:
        self.forks, self.pid, self.out, self.err = forks, pid, out, err
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.forks.ask({"wait": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def finish(self) -> tuple[str, str]:
        """Waits for its end: (standard output, standard error)."""
        self.until(lambda: self.poll() is not None)
        return self.out.read_text(), self.err.read_text()

    def kill(self) -> None:
        """By SIGKILL, at once; it must not have ended by itself."""
        self.send_signal(signal.SIGKILL)
        self.finish()
        assert self.returncode == -signal.SIGKILL, self.err.read_text()

    def until(self, happened: Callable[[], bool]) -> None:
        """Waits until something has happened."""
        end = time.monotonic() + TIMEOUT_S
        while not happened():
            assert time.monotonic() < end, "it takes too long"
            time.sleep(POLL_S)

    def alive_until(self, happened: Callable[[], bool]) -> None:
        """The same; fails if the process ends before."""

        def seen() -> bool:
            found = happened()
            assert found or self.poll() is None, self.err.read_text()
            return found

        self.until(seen)


def sentences(n: int, seed: int = 0) -> str:
    """A text of `n` sentences; with the built-in tokenizer about 9 tokens each."""
    choose = random.Random(seed)
    lines = [f"{choose.choice(NAMES)} {choose.choice(VERBS)} {choose.choice(THINGS)}." for _ in range(n)]
    return "\n".join(" ".join(lines[i : i + 5]) for i in range(0, n, 5)) + "\n"
