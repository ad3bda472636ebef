"""Where a run was made, and its loss curve."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import locas
from locas.evaluate.charts import altair, png
from locas.store import write_atomically
from pretrain.books import FORMS


def environment(device: torch.device) -> dict[str, Any]:
    """Commit, versions, device: what a result needs besides its settings."""
    found: dict[str, Any] = {
        "commit": commit(),
        "command": sys.argv,
        "locas": locas.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return found


def commit() -> str | None:
    """The commit of this working tree, "+" behind it if files differ; $LOCAS_COMMIT where git does not know."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    found = git("rev-parse", "HEAD")
    if not found:
        return os.environ.get("LOCAS_COMMIT")
    return found + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def draw_curve(history: list[dict[str, Any]], path: Path, name: str, say: Callable[[str], None] = print) -> bool:
    """Writes the loss curve as PNG; without the package's extra `plots` it says so, and there is none."""
    try:
        alt = altair()
    except ModuleNotFoundError as error:
        say(f"no loss curve: {error}")
        return False
    points = [
        {"million tokens": row["tokens"] / 1e6, "nats a token": loss, "text": text}
        for row in history
        for text, loss in _losses(row)
    ]
    curve = (
        alt.Chart(alt.Data(values=points), title=name, width=640, height=360)
        .mark_line(strokeWidth=1.2)
        .encode(
            x=alt.X("million tokens:Q"),
            y=alt.Y("nats a token:Q", scale=alt.Scale(zero=False)),
            color=alt.Color("text:N", title=None, sort=["training", *_VALIDATION.values()]),
        )
    )
    write_atomically(path, png(curve, scale=1.5))
    return True


_VALIDATION = {form: f"validation, {form}" for form in FORMS}


def _losses(row: dict[str, Any]) -> list[tuple[str, float]]:
    """What a row of the history says about which text."""
    training = [("training", row["loss"])] if "loss" in row else []
    return training + [(text, row[form]["loss"]) for form, text in _VALIDATION.items() if form in row]
