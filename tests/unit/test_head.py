"""The output head and the loss in one, against torch's own cross-entropy and the backbone's own logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import FAMILY_NAMES
from locas import head as head_module
from locas.forward import IGNORED, chunk_nll, find_head, read_prefix, token_nll
from locas.head import head_nll

ModelOf = Callable[..., PreTrainedModel]
NOT_PLAIN = {"gemma2"}  # caps its logits; all others end in a plain matrix


def states(seed: int, dtype: torch.dtype, bias: bool) -> tuple[Tensor, nn.Linear, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 13, 7, generator=g, dtype=dtype)
    head = nn.Linear(7, 31, bias=bias, dtype=dtype).requires_grad_(False)
    head.weight.copy_(torch.randn(31, 7, generator=g, dtype=dtype))
    targets = torch.randint(0, 31, (2, 13), generator=g)
    targets[0, 3] = targets[1, :5] = IGNORED
    return hidden, head, targets


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(3, 1), (11, 7), (1000, 7), (3, 1000), (1000, 1000)])
def test_loss_and_gradient_are_those_of_cross_entropy(
    tokens: int, vocabulary: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "_PIECE_TOKENS", tokens)
    monkeypatch.setattr(head_module, "_PIECE_VOCABULARY", vocabulary)
    monkeypatch.setattr(head_module, "_PIECE_ENTRIES", 1)
    hidden, head, targets = states(5, torch.float64, bias)
    weights = torch.rand(2, 13, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    found = []
    for nll_of in (lambda h: head_nll(h, head, targets), lambda h: token_nll(head(h), targets)):
        leaf = hidden.clone().requires_grad_()
        nll = nll_of(leaf)
        (nll * weights).sum().backward()
        assert leaf.grad is not None
        found.append((nll.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
    assert found[0][0][targets == IGNORED].eq(0).all()
    assert found[0][1][targets == IGNORED].eq(0).all()


def test_the_gradient_agrees_with_finite_differences() -> None:
    hidden, head, targets = states(7, torch.float64, True)
    assert torch.autograd.gradcheck(lambda h: head_nll(h, head, targets), hidden.requires_grad_())


def test_words_that_a_bias_rules_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some backbones pad their vocabulary; a whole piece of it may have logits of -inf, also the first."""
    monkeypatch.setattr(head_module, "_PIECE_VOCABULARY", 4)
    monkeypatch.setattr(head_module, "_PIECE_ENTRIES", 1)
    hidden, head, targets = states(8, torch.float64, True)
    head.bias[:9] = head.bias[20:] = -torch.inf
    targets = targets.where(targets == IGNORED, targets % 11 + 9)
    found = [
        (nll_of(hidden.requires_grad_()))
        for nll_of in (lambda h: head_nll(h, head, targets), lambda h: token_nll(head(h), targets))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(nll.sum(), hidden)[0] for nll in found]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)


def test_logits_far_beyond_the_exponentials_range() -> None:
    """In float32 exp(89) overflows and exp(-104) vanishes; the loss is right beyond both."""
    head = nn.Linear(1, 2, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    hidden = torch.tensor([[[3000.0], [3000.0], [0.0]]], requires_grad=True)
    nll = head_nll(hidden, head, torch.tensor([[0, 1, 0]]))
    torch.testing.assert_close(nll, torch.tensor([[0.0, 6000.0, math.log(2.0)]]))
    nll.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[[0.0], [2.0], [-1.0]]]))


def test_half_precision_states_have_float32_losses() -> None:
    hidden, head, targets = states(9, torch.bfloat16, False)
    nll = head_nll(hidden, head, targets)
    assert nll.dtype == torch.float32
    expected = F.cross_entropy(head(hidden).float().flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(nll.flatten(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_familys_loss_is_that_of_its_own_logits(model_of: ModelOf, name: str) -> None:
    model = model_of(name)
    head = find_head(model)
    assert (head is None) == (name in NOT_PLAIN)
    ids = torch.randint(0, 50, (2, 19), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = token_nll(model(ids, use_cache=False).logits[:, 7:-1], ids[:, 8:])
        found = chunk_nll(model, ids[:, 7:-1], ids[:, 8:], read_prefix(model, ids[:, :7]), head)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_a_head_that_does_more_is_not_passed_over(model_of: ModelOf) -> None:
    model = model_of("qwen2")
    assert find_head(model) is model.lm_head
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    try:
        assert find_head(model) is None
    finally:
        handle.remove()
    plain = model.lm_head
    try:
        model.lm_head = nn.Sequential(plain)
        assert find_head(model) is None
    finally:
        model.lm_head = plain
