"""A merged checkpoint in another engine than transformers: exported to ONNX, run by ONNX Runtime."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from families import tiny_model
from helpers import START, text
from locas.initialise import InitSettings
from locas.memory import create, read
from locas.merge import merge
from locas.stream import ReadSettings

pytestmark = pytest.mark.integration
onnxruntime = pytest.importorskip("onnxruntime", reason='needs ONNX Runtime: pip install "locas[dev]"')
pytest.importorskip("onnxscript", reason='needs onnxscript: pip install "locas[dev]"')


class Logits(nn.Module):
    """Token ids in, logits out: what is exported."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def export(model: Any, path: Path, example: Tensor) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter on its own internals
        torch.onnx.export(Logits(model).eval(), (example,), path, dynamo=True, input_names=["input_ids"], verbose=False)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_onnx_runtime_agrees_with_transformers_and_with_the_attached_memory(name: str, tmp_path: Path) -> None:
    """A gated FFN and a two-layer one, with a memory that has read something."""
    model = tiny_model(name, torch.float32)
    model.save_pretrained(tmp_path / "backbone")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone", dtype=torch.float32).eval()
    model.config._name_or_path = str(tmp_path / "backbone")
    settings = InitSettings(rank=7, tau_scale=8.0)
    memory = create(model, text(11), settings, start_id=START, name=str(tmp_path / "backbone"))
    list(read(model, memory, text(83), ReadSettings(window=29, chunk=11), start_id=START))
    memory.save(tmp_path / "m.safetensors")
    merge([tmp_path / "m.safetensors"], tmp_path / "merged", align=8)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    export(merged, tmp_path / "merged.onnx", text(23)[None])
    session = onnxruntime.InferenceSession(tmp_path / "merged.onnx", providers=["CPUExecutionProvider"])
    for seed in (1, 2):
        ids = text(23, seed=seed)[None]
        (found,) = session.run(None, {"input_ids": ids.numpy()})
        with torch.no_grad():
            plain, expected = model(ids).logits, merged(ids).logits
            with memory.attached(model):
                with_memory = model(ids).logits
        found = torch.from_numpy(found)
        assert (with_memory - plain).abs().max() > 0.01  # the memory is felt
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, with_memory, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
