"""Recorded losses: if the maths did not change, they are identical.

`python tests/golden/test_golden.py` writes them anew; do that only for a change that is meant to change them, and say
so in the commit. The text is this repository's LICENSE, the backbone the built-in one in float64, so that machines
agree to far more digits than a change of the maths would leave standing.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import locas
from locas.cli.memorize import PRESETS

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("losses.json")
READ = {"window": 256, "chunk": 128}
TOKENS = 1_500
PLAIN = locas.ReadSettings(**READ)
# Name: (backbone, initialisation, reading, layers).
CASES: dict[str, tuple[str, locas.InitSettings, locas.ReadSettings, list[int] | None]] = {
    "default": ("tiny-glu", locas.InitSettings(), PLAIN, None),
    "paper": ("tiny-glu", PRESETS["paper"].init, replace(PLAIN, write=PRESETS["paper"].read.write), None),
    "rank 2, upper half": ("tiny-glu", locas.InitSettings(rank=2), PLAIN, [3, 4, 5]),
    "two steps, gaussian": ("tiny-glu", locas.InitSettings(rank=16, init="gaussian"), replace(PLAIN, steps=2), None),
    "mlp, step-wise": ("tiny-mlp", locas.InitSettings(init="step-wise"), PLAIN, None),
    "mlp, top-k": ("tiny-mlp", locas.InitSettings(init="top-k", rank=16), PLAIN, None),
    "mlp beside a gated FFN": ("tiny-glu", locas.InitSettings(variant="mlp", init="step-wise"), PLAIN, None),
}


def losses(case: str) -> list[float]:
    """Mean loss of each chunk, in nats."""
    name, init, settings, layers = CASES[case]
    backbone = locas.load_backbone(name, dtype="float64", device="cpu")
    ids, _ = backbone.encode((ROOT / "LICENSE").read_text(), TOKENS)
    memory = locas.create(backbone.model, ids[: READ["chunk"]], init, layers=layers, start_id=backbone.start_id)
    records = locas.read(backbone.model, memory, ids, settings, start_id=backbone.start_id)
    return [float(record.nll.double().mean()) for record in records]


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_recorded_ones(case: str) -> None:
    recorded = json.loads(RECORD.read_text())[case]
    # Records keep float32; 1e-6 is about eight of its roundings.
    torch.testing.assert_close(torch.tensor(losses(case)), torch.tensor(recorded), rtol=1e-6, atol=0)


if __name__ == "__main__":
    RECORD.write_text(json.dumps({case: losses(case) for case in CASES}, indent=1) + "\n")
    sys.stdout.write(RECORD.read_text())
