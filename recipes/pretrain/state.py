"""A training run: made, saved, taken up again where it stopped."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from locas.store import write_atomically
from pretrain.optimiser import Optimiser
from pretrain.prepare import load_manifest
from pretrain.settings import Preset
from pretrain.twins import build

CHECKPOINT = "checkpoint.pt"
RESULT = "result.json"
_FORMAT = "locas pretraining checkpoint 1"
_MAY_CHANGE = {"tokens", "log_every", "valid_every", "valid_windows"}


@dataclass
class Run:
    """A training run: what a checkpoint holds, and what it is made with.

    Attributes:
        name: the twin's.
        preset: its settings.
        folder: where checkpoint and result go.
        model: float32 weights.
        optimiser: of these weights.
        step: steps made.
        seconds: of training, over all calls, compiling included.
        history: the log's rows, for the curve and the result.
    """

    name: str
    preset: Preset
    folder: Path
    model: nn.Module
    optimiser: Optimiser
    data_sha256: str
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self) -> None:
        """Writes the checkpoint atomically: everything that going on depends on."""
        buffer = io.BytesIO()
        torch.save(
            {
                "format": _FORMAT, "name": self.name, "settings": self.preset.as_dict(), "data": self.data_sha256,
                "model": self.model.state_dict(), "optimiser": self.optimiser.state(), "step": self.step,
                "seconds": self.seconds, "history": self.history,
            },
            buffer,
        )  # fmt: skip
        write_atomically(self.folder / CHECKPOINT, buffer.getvalue())

    def load(self, device: torch.device) -> None:
        """Takes over the checkpoint in the folder.

        Raises:
            ValueError: it was made with other settings, or from other data.
        """
        saved = load_checkpoint(self.folder, device)
        _check_same(saved, self)
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state(saved["optimiser"])
        self.step, self.seconds, self.history = saved["step"], saved["seconds"], saved["history"]


def load_checkpoint(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `Run.save` wrote.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is something else.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run `main.py train` first")
    saved = torch.load(path, map_location=device, weights_only=True)
    if saved.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this recipe: its format is {saved.get('format')!r}")
    return saved


def _check_same(saved: dict[str, Any], run: Run) -> None:
    now = run.preset.as_dict()
    other = {k: v for k, v in saved["settings"].items() if now[k] != v and k not in _MAY_CHANGE}
    if saved["name"] != run.name or other or saved["data"] != run.data_sha256:
        what = f"of {saved['name']} with {other or 'the same settings'}"
        data = "" if saved["data"] == run.data_sha256 else ", on other data"
        raise ValueError(
            f"{run.folder} holds a run {what}{data}; go on with those, or start another one with another --run"
        )
    before = run.preset.changed(tokens=saved["settings"]["tokens"])
    if before.tokens != run.preset.tokens:
        stable = [p.n_stable for p in (before, run.preset)]
        if saved["step"] > min(stable):
            raise ValueError(
                f"--tokens cannot change at step {saved['step']}: with {before.tokens} or with {run.preset.tokens} "
                f"tokens the learning rate falls from step {min(stable)} on; go on with --tokens {before.tokens}"
            )


def start(name: str, preset: Preset, data: Path, folder: Path, device: torch.device, warm: Path | None = None) -> Run:
    """A run on its device: from its checkpoint where there is one, else from exported weights, else fresh."""
    manifest = load_manifest(data)
    model = build(name, preset, manifest["vocab"]).to(device)
    folder.mkdir(parents=True, exist_ok=True)
    shards = "".join(shard["sha256"] for shard in manifest["shards"])
    run = Run(name, preset, folder, model, Optimiser(model, preset), shards)
    if (folder / CHECKPOINT).exists():
        run.load(device)
    elif warm is not None:
        _warm_start(run, warm)
    return run


def _warm_start(run: Run, exported: Path) -> None:
    """Goes on from exported bfloat16 weights, with the optimiser's averages lost: close to, not equal to, a resume."""
    result = json.loads((exported / "training.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    run.model.load_state_dict(stock.state_dict())
    run.step, run.seconds, run.history = result["step"], result["seconds"], result["history"]
    run.history.append({"step": run.step, "warm_start": "from bfloat16 weights, without the optimiser's averages"})
