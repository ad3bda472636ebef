"""Reading with memories attached: where the index is kept, compiled code, static caches, CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CompileConfig

from families import tiny_model
from helpers import memory_for, same_bytes, text
from locas.attach import attach, attached
from locas.bank import Bank

ROWS, PROMPT, NEW = 3, 5, 7
INDICES: list[list[int] | None] = [None, [2, -1, 0], [1, 1, 1]]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def prompts() -> Tensor:
    return torch.stack([text(PROMPT, seed) for seed in range(ROWS)])


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False).logits
    return logits


def generated(model: Any, ids: Tensor, **more: Any) -> Tensor:
    ids = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **more)
    return ids[:, PROMPT:]


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# -------------------------------------------------------------------- the index


def test_an_index_that_names_no_memory_is_refused_and_changes_nothing() -> None:
    model = tiny_model("llama", layers=1)
    attachment = attach(model, memory_for(model, 3), [2, -1, 0])
    before = logits_of(model, prompts())
    for wrong, message in (
        ([3, 0, 0], "names memory 3, but the bank holds 0..2"),
        ([[0], [1], [2]], "a non-empty vector"),
    ):
        with pytest.raises(ValueError, match=message):
            attachment.index = wrong  # type: ignore[assignment]
    assert attachment.index is not None
    assert attachment.index.tolist() == [2, -1, 0]
    assert same_bytes(logits_of(model, prompts()), before)
    attachment.detach()


def test_an_index_that_is_changed_in_place_is_noticed() -> None:
    model = tiny_model("llama", layers=1)
    bank, ids = memory_for(model, 3), prompts()
    with attached(model, bank, [0, 1, -1]):
        expected = logits_of(model, ids)
    with attached(model, bank, [2, 2, 2]) as attachment:
        assert attachment.index is not None
        assert not same_bytes(logits_of(model, ids), expected)
        attachment.index.copy_(torch.tensor([0, 1, -1]))
        assert same_bytes(logits_of(model, ids), expected)


def test_an_index_made_in_inference_mode() -> None:
    """Such tensors have no version counter, so nothing is kept for them."""
    model = tiny_model("llama", layers=1)
    bank, ids = memory_for(model, 3), prompts()
    with attached(model, bank, [0, 1, -1]):
        expected = logits_of(model, ids)
    with torch.inference_mode(), attached(model, bank, [0, 1, -1]) as attachment:
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-12, atol=1e-12)
        assert attachment.index is not None
        attachment.index.fill_(-1)
        assert not torch.allclose(logits_of(model, ids), expected)


# -------------------------------------------------------------------- torch.compile and static caches


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(("name", "index"), [("qwen3", None), ("qwen3", [1, 1, 1]), ("opt", [2, -1, 0])])
def test_compiled_in_one_graph(name: str, index: list[int] | None) -> None:
    """`fullgraph` raises where a hook breaks the graph; aot_eager traces what inductor would be given."""
    model, ids = tiny_model(name, layers=2), prompts()
    plain = logits_of(model, ids)
    with attached(model, memory_for(model, ROWS), index):
        expected = logits_of(model, ids)
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(logits_of(compiled, ids), expected, rtol=1e-10, atol=1e-10)
        assert (expected - plain).abs().max() > 1e-3


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(("name", "index"), [("qwen3", [2, -1, 0]), ("gpt2", None)])
def test_generate_with_a_static_cache_compiled_in_one_graph(name: str, index: list[int] | None) -> None:
    model, ids = tiny_model(name, layers=2), prompts()
    without = generated(model, ids)
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # else transformers compiles on accelerators only
    with attached(model, memory_for(model, ROWS), index):
        expected = generated(model, ids)
        assert torch.equal(generated(model, ids, cache_implementation="static", disable_compile=True), expected)
        torch._dynamo.utils.counters.clear()
        assert torch.equal(generated(model, ids, cache_implementation="static", compile_config=config), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        assert not torch._dynamo.utils.counters["graph_break"]
    assert not torch.equal(expected, without)


# -------------------------------------------------------------------- CUDA


def on_cuda(bank: Bank, model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, Bank]:
    return model.to("cuda", dtype), bank.to("cuda", torch.float32)


@needs_cuda
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "opt"])
def test_cuda_logits_are_those_of_the_cpu(name: str, index: list[int] | None) -> None:
    model, ids = tiny_model(name), prompts()
    bank = memory_for(model, ROWS)
    with attached(model, bank, index):
        expected = logits_of(model, ids)
    model.to("cuda")
    for own in (bank, bank.to("cuda")):  # rows are brought to the model where they lie elsewhere
        with attached(model, own, index) as attachment:
            assert attachment.index is None or attachment.index.device.type == "cuda"
            # Rotary angles are float32 numbers of another kernel, also in a float64 model.
            torch.testing.assert_close(logits_of(model, ids.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)


@needs_cuda
@pytest.mark.parametrize("index", INDICES)
def test_a_bfloat16_backbone_with_a_float32_memory_on_cuda(index: list[int] | None) -> None:
    model, ids = tiny_model("qwen3", dtype=torch.float32), prompts()
    bank = memory_for(model, ROWS).to(dtype=torch.float32)
    with attached(model, bank, index):
        expected = logits_of(model, ids)
    model, bank = on_cuda(bank, model, torch.bfloat16)
    with attached(model, bank, index):
        found = logits_of(model, ids.cuda())
    assert found.dtype == torch.bfloat16
    # bfloat16 has 8 bits of mantissa; a few layers of it leave some percent of the logits' size.
    assert (found.cpu().float() - expected).norm() < 0.05 * expected.norm()
    assert bank.rows.dtype == torch.float32


@needs_cuda
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("index", [None, [2, -1, 0]])
def test_cuda_graphs_through_generates_static_cache(index: list[int] | None) -> None:
    model, bank = on_cuda(memory_for(tiny_model("qwen3"), ROWS), tiny_model("qwen3"), torch.float32)
    ids = prompts().cuda()
    with attached(model, bank, index):
        expected = generated(model, ids)
        config = CompileConfig(mode="reduce-overhead", fullgraph=True)
        assert torch.equal(generated(model, ids, cache_implementation="static", compile_config=config), expected)


@needs_cuda
@pytest.mark.parametrize("index", INDICES)
def test_a_generated_token_waits_for_nothing_on_cuda(index: list[int] | None) -> None:
    """No copy to or from the host, and no wait for the device, once the first token has been made."""
    model, bank = on_cuda(memory_for(tiny_model("qwen3"), ROWS), tiny_model("qwen3"), torch.float32)
    a = torch.randn(ROWS, 1, bank.d_model, device="cuda")
    with torch.no_grad(), attached(model, bank, index) as attachment:
        bank.read(0, a, attachment.index, a)
        torch.cuda.set_sync_debug_mode("error")
        try:
            bank.read(0, a, attachment.index, a)
        finally:
            torch.cuda.set_sync_debug_mode("default")
