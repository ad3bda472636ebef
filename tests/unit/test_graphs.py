"""CUDA graphs: when chunks are captured; test_replay.py has what is replayed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from families import tiny_model
from helpers import memory_for, same_bytes
from locas import graphs
from locas.attach import attached
from locas.attention import chunk_attention
from locas.bank import Bank
from locas.graphs import Graphs, graphs_for

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


STAGES = [[lambda inputs, _: inputs[0] + 1], [lambda inputs, made: made * inputs[0]]]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that were captured; "replaying" computes, as there need be no GPU here."""
    made: list[torch.Size] = []

    class Computed:
        def __init__(self, key: object, inputs: Any, stages: Any, alive: object) -> None:
            assert alive == "alive"
            made.append(inputs[0].shape)
            self.key, self._stages = key, stages

        def replay(self, inputs: Any) -> None:
            self.made = self._stages[0][0](inputs, None)

    monkeypatch.setattr(graphs, "Graph", Computed)
    monkeypatch.setattr(graphs, "_state", lambda _: None)
    return made


def test_the_second_of_one_shape_is_captured_and_others_between_do_not_end_it(captured: list[torch.Size]) -> None:
    own = Graphs(nn.Linear(1, 1))

    def run(n: int, key: object = 0) -> bool:
        x = torch.arange(n)
        graph = own.run(key, [x], STAGES, lambda: "alive")
        assert graph is None or torch.equal(graph.made, x + 1)
        return graph is not None

    assert [run(n) for n in (3, 4, 5, 4, 4, 3, 4, 5)] == [False, False, False, True, True, False, True, False]
    assert captured == [(4,)]
    assert [run(5), run(5), run(4)] == [True, True, False]
    assert [run(4, key=1) for _ in range(3)] == [False, True, True]
    assert captured == [(4,), (5,), (4,)]
    assert own.replayed == 7


def test_what_cannot_be_captured_is_run_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "Graph", fail)
    monkeypatch.setattr(graphs, "_state", lambda _: None)
    put_back: list[object] = []
    monkeypatch.setattr(graphs, "_put_back", put_back.append)
    own = Graphs(nn.Linear(1, 1))
    with pytest.warns(UserWarning, match="without CUDA graphs, kernel by kernel: operation not permitted when stream"):
        assert [own.run(0, [torch.zeros(3)], STAGES, lambda: None) for _ in range(3)] == [None] * 3
    assert put_back == [None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert own.run(0, [torch.zeros(3)], STAGES, lambda: None) is None


def test_others_hooks_are_seen() -> None:
    model = tiny_model("qwen3")
    own = Graphs(model)
    assert not own.seen_by_others()
    with attached(model, memory_for(model)):
        assert own.seen_by_others()
    assert not own.seen_by_others()
    handle = model.register_forward_pre_hook(lambda *_: None)
    assert own.seen_by_others()
    handle.remove()
    assert not own.seen_by_others()


def test_nothing_is_captured_without_cuda() -> None:
    assert graphs_for(tiny_model("qwen3"), torch.device("cpu")) is None


# -------------------------------------------------------------------- CUDA


@needs_cuda
def test_what_cannot_be_captured_leaves_cuda_as_it_was() -> None:
    own, x = Graphs(nn.Linear(1, 1)), torch.ones(3, device="cuda")
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        found = [own.run(0, [x], [[lambda inputs, _: inputs[0].sum().item()]], lambda: None) for _ in range(4)]
    assert found == [None] * 4
    assert torch.randn(3, device="cuda").isfinite().all()
    assert x.sum().item() == 3
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"])
@pytest.mark.parametrize(("variant", "rank", "d_model", "index"), [
    ("glu", 64, 96, None), ("mlp", 3, 1030, None), ("glu", 5, 70, [2, -1, 0, 0]), ("glu", 1, 64, [-1, -1, -1, -1]),
    ("mlp", 1031, 64, None),
])  # fmt: skip
def test_a_tokens_memory_in_two_kernels(
    dtype: torch.dtype, activation: str, variant: Any, rank: int, d_model: int, index: list[int] | None
) -> None:
    g = torch.Generator().manual_seed(0)
    bank = Bank(variant, activation, d_model, {0: rank}, size=1 if index is None else 3)
    bank.rows.copy_(torch.randn(bank.rows.shape, generator=g) / d_model**0.5)
    bank.tau.fill_(0.7)
    bank = bank.to("cuda")
    a, onto = (torch.randn(4, 1, d_model, generator=g).to("cuda", dtype) for _ in range(2))
    at = None if index is None else torch.tensor(index, device="cuda")
    with torch.no_grad():
        found = bank.read(0, a, at, onto)
        expected = bank.to(dtype=torch.float64).read(0, a.double(), at, onto.double())
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    if dtype == torch.bfloat16 and activation == "relu2" and rank > 1000:  # rounded, squared, and a thousand summed
        tolerance = 6e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert index is None or same_bytes(found[1].cpu(), onto[1].cpu())


@needs_cuda
@pytest.mark.parametrize(("context", "full"), [(0, False), (300, False), (300, True)])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("width", [32, 40, 128])
def test_a_chunks_attention_on_cuda(context: int, copies: int, full: bool, width: int) -> None:
    g = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, n, width, generator=g, dtype=torch.float64)
        for heads, n in ((4, 200), (4 // copies, context + 200), (4 // copies, context + 200))
    )
    key, value = (t.repeat_interleave(copies, 1) for t in (key, value))
    towards = torch.randn(query.shape, generator=g, dtype=torch.float64)
    mask = torch.ones(200, context + 200, dtype=torch.bool).tril(context)
    inputs = [query.requires_grad_(full), key.requires_grad_(full), value.requires_grad_()]
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    wanted = torch.autograd.grad(expected, [t for t in inputs if t.requires_grad], towards)
    half = [t.detach().to("cuda", torch.bfloat16).requires_grad_(t.requires_grad) for t in inputs]
    out = chunk_attention(*half, context)
    grads = torch.autograd.grad(out, [t for t in half if t.requires_grad], towards.to(out))
    for x, y in zip((out, *grads), (expected, *wanted), strict=True):
        x, y = x.detach().cpu().double(), y.detach()
        if x.shape[2] > 200 and not full:
            x, y = x[:, :, context:], y[:, :, context:]
        assert (x - y).norm() < 0.01 * y.norm()
