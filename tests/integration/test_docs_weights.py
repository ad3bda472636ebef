"""What docs/weights.md shows runs as it stands there, from top to bottom, in one session."""

from __future__ import annotations

import logging
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import locas
from locas.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/weights.md").read_text()

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),  # PEFT 0.18's
]


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("peft", "onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason=f'the page uses {module}: pip install "locas[dev]"')
    text = (ROOT / "LICENSE").read_text()
    (tmp_path / "a.txt").write_text(text[:1_500])
    (tmp_path / "b.txt").write_text(text[4_000:5_200])
    monkeypatch.chdir(tmp_path)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```(python|)\n(.*?)^```", PAGE, re.S | re.M)
    assert len(blocks) == 19
    for language, block in blocks:
        if language == "python":
            with warnings.catch_warnings():
                if "torch.onnx" in block:
                    warnings.simplefilter("ignore")  # torch's exporter on its own internals
                if "open(" in block:
                    warnings.simplefilter("ignore", ResourceWarning)
                exec(compile(block, "weights.md", "exec"), names)
            continue
        for line in block.splitlines():
            assert main(shlex.split(line, comments=True)[1:]) == 0, (line, capsys.readouterr().err)
    # What the page says of its results.
    assert (tmp_path / "a_again.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert not torch.equal(names["from_a"], names["plain"])
    assert (tmp_path / "b_again.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with torch.no_grad():
        expected = names["whole"](names["prompt"][:1]).logits
        memory = locas.load("ab.safetensors", backbone := locas.load_backbone().model)
        with memory.attached(backbone):
            attached = backbone(names["prompt"][:1]).logits
    np.testing.assert_allclose(names["logits"], expected.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(names["logits"], attached.numpy(), rtol=1e-3, atol=1e-3)


def test_every_method_is_on_the_page() -> None:
    from locas.compress import METHODS

    for method in METHODS:
        assert f"`{method}`" in PAGE, method
