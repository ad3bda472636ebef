"""Less memory for the backward pass: the same losses and gradients to the last bit, and less that is kept."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from families import FAMILY_NAMES, tiny_model
from helpers import memory_for, same_bytes, text
from locas import forward, lean, sites
from locas.attach import attached
from locas.evaluate.memory_use import peak_bytes
from locas.forward import chunk_nll, frozen
from locas.stream import Reader
from readings import CHUNK, READ, learn

ModelOf = Callable[..., PreTrainedModel]


@pytest.fixture
def wasteful(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns all savings off."""

    def off() -> None:
        monkeypatch.setattr(forward, "ChunkAttention", lambda *_: nullcontext())
        monkeypatch.setattr(forward, "recomputed", lambda _: nullcontext())

    return off


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float64) for name in FAMILY_NAMES] + [(name, torch.bfloat16) for name in ("qwen3", "gemma", "gpt2")],
)
def test_every_familys_losses_and_gradients_are_the_same(
    name: str, dtype: torch.dtype, wasteful: Callable[[], None]
) -> None:
    model = tiny_model(name).to(dtype)
    bank = memory_for(model)
    lean = [learn(model, bank, recompute_ffn=recompute_ffn) for recompute_ffn in (False, True)]
    wasteful()
    nll, grad = learn(model, bank)
    for lean_nll, lean_grad in lean:
        assert same_bytes(lean_nll, nll)
        assert same_bytes(lean_grad, grad)
    assert grad.abs().max() > 0


@pytest.mark.parametrize("name", ["qwen3", "gemma"])
def test_less_is_kept(name: str, wasteful: Callable[[], None]) -> None:
    model, cpu = tiny_model(name), torch.device("cpu")
    bank = memory_for(model)
    _, less = peak_bytes(lambda: learn(model, bank), cpu)
    wasteful()
    _, more = peak_bytes(lambda: learn(model, bank), cpu)
    # The lowest layer's FFN has no gradient; act(gate) of the others [2, 11, 37], and one of three masks [2, 1, 11, 42]
    # suffices, in float64. Not all of it counts at the peak.
    assert more - less >= 8 * 2 * (2 * 11 * 37) * 0.8


@pytest.mark.parametrize(("name", "made"), [("qwen3", 2), ("granite", 2), ("gemma", 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gate_and_up_are_made_again_where_that_is_asked_for(
    name: str, made: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name).to(dtype)
    bank, kept, products = memory_for(model), {}, []
    pack, multiply = lean._Lean.pack, lean._Lean._multiply

    def noted(self: lean._Lean, tensor: Tensor) -> Any:
        packed = pack(self, tensor)
        if isinstance(packed, Tensor):
            kept[packed.data_ptr()] = packed
        return packed

    def counted(*args: Any, **more: Any) -> Tensor:
        products.append(multiply(*args, **more))
        return products[-1]

    monkeypatch.setattr(lean._Lean, "pack", noted)
    monkeypatch.setattr(lean._Lean, "_multiply", counted)
    learn(model, bank)
    assert not products
    sizes = [t.shape for t in kept.values()]
    kept.clear()
    learn(model, bank, recompute_ffn=True)
    layers = model.config.num_hidden_layers - 1  # the lowest layer's FFN has no gradient
    fewer = sizes.count(torch.Size([2, 11, 37])) - [t.shape for t in kept.values()].count(torch.Size([2, 11, 37]))
    assert fewer == layers * made
    assert len(products) == layers * made // 2 * 3  # the gate twice


def test_a_reader_learns_the_same(model_of: ModelOf) -> None:
    model, ids = model_of("qwen3"), text(40)
    banks = [memory_for(model) for _ in range(2)]
    for bank, recompute_ffn in zip(banks, (False, True), strict=True):
        list(Reader(model, bank, [ids], replace(READ, recompute_ffn=recompute_ffn)))
    assert same_bytes(banks[0].rows, banks[1].rows)
    assert not same_bytes(banks[0].rows, memory_for(model).rows)


def test_a_gate_is_multiplied_once_for_both_of_its_uses() -> None:
    norm, gate = Qwen3RMSNorm(37).requires_grad_(False), torch.nn.Linear(37, 53, bias=False).requires_grad_(False)
    hidden = torch.linspace(-5, 5, 370).view(1, 10, 37).requires_grad_() * 1
    keeper = lean._Lean(products=True)
    made = gate(norm(hidden))
    act = F.silu(made)
    of_act, of_gate = keeper.pack(act), keeper.pack(made)
    again = [keeper.unpack(packed) for packed in (of_act, of_gate)]
    assert same_bytes(again[0], act)
    assert same_bytes(again[1], made)
    (kept,) = (t for t in keeper._made.values() if t.shape == hidden.shape)  # the gate is let go
    assert same_bytes(kept, norm(hidden).detach())
    assert isinstance(lean._Lean().pack(made), Tensor)
    trained = torch.nn.Linear(37, 53, bias=False)(norm(hidden))
    biased = torch.nn.Linear(37, 53).requires_grad_(False)(norm(hidden))
    assert all(isinstance(keeper.pack(t), Tensor) for t in (trained, biased, gate(hidden)))


@pytest.mark.parametrize("act", [F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh")])
def test_an_activation_is_kept_as_its_input_and_made_again(act: Callable[[Tensor], Tensor]) -> None:
    gate = torch.linspace(-5, 5, 1013, dtype=torch.float64).requires_grad_()
    made, keeper = act(gate), lean._Lean()
    packed = keeper.pack(made)
    assert isinstance(packed, partial)
    assert packed.args[1].data_ptr() == gate.data_ptr()
    assert same_bytes(keeper.unpack(packed), made)
    for other in (gate, gate.tanh()):
        packed = keeper.pack(other)
        assert isinstance(packed, Tensor)
        assert packed.data_ptr() == other.data_ptr()
        assert keeper.unpack(packed) is packed


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_wider_copy_is_kept_as_what_it_was_made_of(half: torch.dtype) -> None:
    hidden = torch.linspace(-5, 5, 1013).to(half).requires_grad_() * 1
    wider, keeper = hidden.float(), lean._Lean()
    packed = keeper.pack(wider)
    assert isinstance(packed, partial)
    assert packed.func.__self__.dtype == half
    assert same_bytes(keeper.unpack(packed), wider)
    assert isinstance(keeper.pack(wider.mean().rsqrt()), Tensor)
    assert keeper.pack(wider) is packed  # a norm keeps it for its square and, after that, for its product
    narrower = (torch.linspace(0, 1, 1013).requires_grad_() * 1).to(half).float()
    assert same_bytes(keeper.unpack(keeper.pack(narrower)), narrower)
    down = (torch.linspace(0, 1, 1013).requires_grad_() * 1).to(half)
    assert isinstance(keeper.pack(down), Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
def test_a_norms_output_is_made_again(dtype: torch.dtype, flat: bool) -> None:
    norm = Qwen3RMSNorm(37).to(dtype).requires_grad_(False)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    made = norm(torch.linspace(-5, 5, 370).view(1, 10, 37).to(dtype).requires_grad_() * 1)
    made = made.view(10, 37) if flat else made
    keeper = lean._Lean()
    packed = keeper.pack(made)
    assert isinstance(packed, partial)
    assert same_bytes(keeper.unpack(packed), made)
    trained = norm.requires_grad_()(torch.linspace(-5, 5, 370).view(1, 10, 37).to(dtype).requires_grad_() * 1)
    assert isinstance(keeper.pack(trained), Tensor)


@pytest.mark.parametrize("recompute_ffn", [False, True])
def test_a_graph_without_a_backward_pass_is_given_back(model_of: ModelOf, recompute_ffn: bool) -> None:
    """Softmax, norms and attention keep their own outputs: held as they are, they would hold themselves for ever."""
    model = model_of("qwen3")
    ids = text(CHUNK + 1)[None]

    def score() -> None:
        with attached(model, bank):
            nll = chunk_nll(model, ids[:, :-1], ids[:, 1:], {}, None, recompute_ffn=recompute_ffn)
        assert nll.requires_grad

    bank = memory_for(model).requires_grad_()
    with frozen(model):
        score()
        gc.collect()
        before = sum(type(each) is Tensor for each in gc.get_objects())
        score()
        gc.collect()
    assert sum(type(each) is Tensor for each in gc.get_objects()) == before


def test_a_model_of_no_known_family_is_read_as_it_is(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("qwen3"), text(CHUNK + 1)[None]
    expected = chunk_nll(model, ids[:, :-1], ids[:, 1:], {}, None)
    monkeypatch.setattr(sites, "FAMILIES", [])
    assert same_bytes(chunk_nll(model, ids[:, :-1], ids[:, 1:], {}, None), expected)


def test_gradients_agree_with_finite_differences() -> None:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        with lean.recomputed():
            return F.silu(gate) * up + F.gelu(gate, approximate="tanh") * up

    g = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(3, 5, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(product, (gate, up))
