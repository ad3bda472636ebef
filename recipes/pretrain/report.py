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
    """Writes the loss curve as PNG; without matplotlib it says so, and there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no loss curve: matplotlib is not installed (python -m pip install matplotlib)")
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in history if "loss" in row]
    axes.plot([r["tokens"] / 1e6 for r in rows], [r["loss"] for r in rows], lw=0.8, label="training")
    for form in ("wrapped", "reflowed"):
        rows = [row for row in history if form in row]
        axes.plot(
            [r["tokens"] / 1e6 for r in rows], [r[form]["loss"] for r in rows], "o-", ms=3, label=f"validation, {form}"
        )
    axes.set(xlabel="million tokens", ylabel="nats a token", title=name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
