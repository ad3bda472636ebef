"""What the integration tests share: the command line in fresh processes, and texts to read."""

import os
import random
import subprocess
import sys
from collections.abc import Callable

NAMES = ["Ahab", "Ishmael", "Queequeg", "Starbuck", "Stubb", "Flask", "Pip", "Fedallah", "Elijah", "Peleg", "Tashtego"]
VERBS = ["watched", "followed", "feared", "praised", "forgot", "remembered", "called", "left", "found"]
THINGS = ["the white whale", "the old ship", "a long harpoon", "the grey sea", "his own shadow", "the doubloon"]

Locas = Callable[..., "subprocess.CompletedProcess[str]"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "locas", *map(str, args)]


def sentences(n: int, seed: int = 0) -> str:
    """A text of `n` sentences; with the built-in tokenizer about 9 tokens each."""
    choose = random.Random(seed)
    lines = [f"{choose.choice(NAMES)} {choose.choice(VERBS)} {choose.choice(THINGS)}." for _ in range(n)]
    return "\n".join(" ".join(lines[i : i + 5]) for i in range(0, n, 5)) + "\n"
