"""Writes whose gradient passes attention through its values only, or not at all: against the slow obvious way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from families import FAMILY_NAMES
from helpers import fresh, memory_for, same_bytes, text
from locas import attention
from locas.attention import AttentionGradient, chunk_attention
from locas.forward import attention_is_torchs
from locas.stream import Reader, ReadSettings
from locas.write import WriteSettings
from readings import READ, learn

ModelOf = Callable[..., PreTrainedModel]
OWN_ATTENTION = ("bloom", "gptj", "gemma2")  # gemma2: caps its scores
TORCHS = [name for name in FAMILY_NAMES if name not in OWN_ATTENTION]


class Slow(TorchFunctionMode):
    """Attention written out, its weights or its outputs detached."""

    def __init__(self, gradient: AttentionGradient) -> None:
        super().__init__()
        self.gradient = gradient

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attend(*args, **(kwargs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert dropout_p == 0
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = scores.softmax(-1)
        return weights.detach() @ value if self.gradient == "values" else (weights @ value).detach()


@pytest.mark.parametrize("gradient", ["values", "stop"])
@pytest.mark.parametrize("least", [1, 1 << 40], ids=["own attention", "torch's"])
@pytest.mark.parametrize("name", TORCHS)
def test_gradients_are_those_of_detached_attention(
    model_of: ModelOf, name: str, least: int, gradient: AttentionGradient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_LEAST", least)
    model = model_of(name)
    bank = memory_for(model)
    nll, grad = learn(model, bank, gradient)
    monkeypatch.setattr(attention, "_LEAST", 1 << 40)
    with Slow(gradient):
        expected_nll, expected = learn(model, bank)
    torch.testing.assert_close(nll, expected_nll, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-10)
    full_nll, full = learn(model, bank)
    torch.testing.assert_close(nll, full_nll, rtol=1e-10, atol=1e-10)
    assert (grad - full).norm() > 1e-3 * full.norm()


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_whose_attention_is_torchs(model_of: ModelOf, name: str) -> None:
    assert attention_is_torchs(model_of(name)) == (name not in OWN_ATTENTION)


def test_attention_that_the_model_computes_itself_is_not_torchs(model_of: ModelOf) -> None:
    model = model_of("qwen3")
    model.set_attn_implementation("eager")
    try:
        assert not attention_is_torchs(model)
    finally:
        model.set_attn_implementation("sdpa")


def read_all(model: Any, gradient: AttentionGradient, name: str) -> Tensor:
    bank = fresh(model, name)
    write = WriteSettings(lr=0.1, damping=0.1)
    settings = ReadSettings(window=17, chunk=7, attention_gradient=gradient, write=write)
    for _ in Reader(model, bank, [text(40)], settings, start_id=1):
        pass
    return bank.rows


def test_backbones_with_attention_of_their_own_learn_with_the_full_gradient_and_say_so(model_of: ModelOf) -> None:
    model = model_of("gptj")
    with pytest.warns(UserWarning, match=r"GPTJForCausalLM does not compute attention with torch's .*full gradient"):
        rows = read_all(model, "values", "gptj")
    assert same_bytes(rows, read_all(model, "full", "gptj"))


def test_scoring_alone_says_nothing_of_it(model_of: ModelOf) -> None:
    model = model_of("gptj")
    settings = ReadSettings(window=17, chunk=7, attention_gradient="values")
    assert len(list(Reader(model, None, [text(20)], settings))) == 3


def test_a_reading_depends_on_it(model_of: ModelOf) -> None:
    model = model_of("qwen3")
    full, values, stop = (read_all(model, gradient, "qwen3") for gradient in ("full", "values", "stop"))  # type: ignore[arg-type]
    assert not torch.equal(full, values)
    assert not torch.equal(values, stop)


@pytest.mark.parametrize("gradient", ["values", "stop"])
def test_side_by_side_is_as_alone(model_of: ModelOf, gradient: AttentionGradient) -> None:
    model = model_of("qwen3")
    texts = [text(40, 1), text(31, 2), text(25, 3)]
    settings = ReadSettings(window=17, chunk=7, attention_gradient=gradient, write=READ.write)
    together = fresh(model, "qwen3", size=3)
    for _ in Reader(model, together, texts, settings, start_id=1):
        pass
    for i, ids in enumerate(texts):
        alone = fresh(model, "qwen3")
        for _ in Reader(model, alone, [ids], settings, start_id=1):
            pass
        torch.testing.assert_close(together.rows[i], alone.rows[0], rtol=1e-9, atol=1e-12)


def operands(dtype: torch.dtype, chunk: int = 130, context: int = 300) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 3, chunk, 8), (2, 3, context + chunk, 8), (2, 3, context + chunk, 8))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-11), (torch.bfloat16, 0.02)],  # bfloat16 has eight binary digits
)
def test_averages_and_their_gradients(dtype: torch.dtype, tolerance: float, copies: int) -> None:
    query, key, value = operands(dtype)
    key = key[:, ::copies].repeat_interleave(copies, dim=1)  # as grouped queries see them
    value.requires_grad_()
    out = chunk_attention(query, key, value, 300)
    assert out.dtype == dtype
    exact = [t.detach().double() for t in (query, key, value)]
    exact[2].requires_grad_()
    mask = torch.ones(130, 430, dtype=torch.bool).tril(300)
    expected = F.scaled_dot_product_attention(*exact, mask)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    (grad,) = torch.autograd.grad(out, value, towards)
    (wanted,) = torch.autograd.grad(expected, exact[2], towards.double())
    torch.testing.assert_close(grad[:, :, 300:].double(), wanted[:, :, 300:], rtol=tolerance, atol=tolerance)
    assert not grad[:, :, :300].any()


def test_a_wrong_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="attention_gradient 'half' is not one of full, values, stop"):
        ReadSettings(attention_gradient="half")  # type: ignore[arg-type]
