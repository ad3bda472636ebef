"""A chunk's attention behind its context: torch's own numbers and gradients, without what nobody asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import FAMILY_NAMES, tiny_model
from helpers import memory_for, same_bytes, text
from locas import attention
from locas.attention import ChunkAttention, chunk_attention
from locas.forward import read_prefix
from readings import CHUNK, PREFIX, learn

OWN_ATTENTION = ("bloom", "falcon", "gptj")  # none of torch's, or with numbers of their own in the mask
ModelOf = Callable[..., PreTrainedModel]


def causal(chunk: int, context: int) -> Tensor:
    return torch.ones(1, 1, chunk, context + chunk, dtype=torch.bool).tril(context)


def operands(
    batch: int, heads: int, chunk: int, context: int, d_head: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(batch, chunk, heads, d_head, generator=g, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(batch, heads, context + chunk, d_head, generator=g, dtype=dtype) for _ in range(2))
    return [query.requires_grad_(), key.requires_grad_(), value.requires_grad_()]


@pytest.mark.parametrize(
    ("batch", "heads", "chunk", "context"), [(1, 1, 1, 1), (2, 3, 5, 9), (1, 2, 130, 300), (3, 7, 300, 17)]
)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("workspace", [1, 1 << 20], ids=["some heads at a time", "all heads"])
def test_outputs_and_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    heads: int,
    chunk: int,
    context: int,
    scale: float | None,
    workspace: int,
) -> None:
    monkeypatch.setattr(attention, "_WORKSPACE", workspace)
    query, key, value = operands(batch, heads, chunk, context, 4)
    expected = F.scaled_dot_product_attention(query, key, value, causal(chunk, context), scale=scale)
    out = chunk_attention(query, key, value, context, scale)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    wanted = torch.autograd.grad(expected, (query, key, value), towards)
    grads = torch.autograd.grad(out, (query, key, value), towards)
    torch.testing.assert_close(grads[0], wanted[0], rtol=1e-11, atol=1e-12)
    for grad, want in zip(grads[1:], wanted[1:], strict=True):
        torch.testing.assert_close(grad[:, :, context:], want[:, :, context:], rtol=1e-11, atol=1e-12)
        assert not grad[:, :, :context].any()


def test_gradients_agree_with_finite_differences() -> None:
    query, key, value = operands(1, 2, 3, 4, 2)
    before = key[:, :, :4].detach(), value[:, :, :4].detach()

    def of(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return chunk_attention(query, torch.cat([before[0], key], 2), torch.cat([before[1], value], 2), 4)

    parts = tuple(t.detach()[:, :, 4:].requires_grad_() for t in (key, value))
    assert torch.autograd.gradcheck(of, (query, *parts))


def test_weights_that_round_to_nothing_and_scores_that_overflow() -> None:
    """A hidden key's score may be any number above those that are seen."""
    query, key, value = operands(1, 1, 4, 3, 2, torch.float32)
    with torch.no_grad():
        query[:, :, :, 0] = 1000
        key[:, :, -1, 0] = 1000  # seen by the last query only
    expected = F.scaled_dot_product_attention(query, key, value, causal(4, 3))
    out = chunk_attention(query, key, value, 3)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The contexts that `chunk_attention` was called with; small ones are taken too."""
    made: list[int] = []

    def count(query: Tensor, key: Tensor, value: Tensor, context: int, *more: Any) -> Tensor:
        made.append(context)
        return chunk_attention(query, key, value, context, *more)

    monkeypatch.setattr(attention, "chunk_attention", count)
    monkeypatch.setattr(attention, "_LEAST", 1)
    return made


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_learns_the_same(
    model_of: ModelOf, name: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name)
    bank = memory_for(model)
    nll, grad = learn(model, bank)
    assert set(calls) <= {PREFIX}
    takes = name not in OWN_ATTENTION and not getattr(model.config, "sliding_window", None)
    assert len(calls) == model.config.num_hidden_layers or not takes
    monkeypatch.setattr(attention, "_LEAST", 1 << 40)
    expected_nll, expected_grad = learn(model, bank)
    torch.testing.assert_close(nll, expected_nll, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-10)


def test_small_ones_are_left_to_torch(model_of: ModelOf, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_LEAST", PREFIX * CHUNK + 1)
    model = model_of("qwen3")
    learn(model, memory_for(model))
    assert not calls


@pytest.mark.parametrize("what", ["padding", "bidirectional", "half precision"])
def test_other_masks_are_torchs_own_and_become_numbers_once(
    what: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, context = 6, 4
    mask = causal(chunk, context)
    if what == "padding":
        mask[..., 0] = False
    if what == "bidirectional":
        mask[..., 0, -1] = True
    dtype = torch.bfloat16 if what == "half precision" else torch.float32
    query, key, value = (t.detach().to(dtype).requires_grad_() for t in operands(1, 2, chunk, context, 4))
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    made: list[Any] = []
    logical_not = Tensor.logical_not
    monkeypatch.setattr(Tensor, "logical_not", lambda self: made.append(self) or logical_not(self))  # type: ignore[func-returns-value]
    with ChunkAttention():
        for _ in range(3):
            assert same_bytes(F.scaled_dot_product_attention(query, key, value, attn_mask=mask.view_as(mask)), expected)
    assert not calls
    assert len(made) == 1


@pytest.mark.parametrize("heads_of_keys", [6, 2, 1])
def test_a_first_chunks_values_get_torchs_gradient_and_its_keys_are_kept_once(
    heads_of_keys: int, calls: list[int]
) -> None:
    query, key, value = (t.detach() for t in operands(2, 6, 150, 0, 4))
    key, value = (t[:, :heads_of_keys].contiguous().requires_grad_() for t in (key, value))
    query.requires_grad_()
    towards = torch.randn(query.shape, generator=torch.Generator().manual_seed(1), dtype=query.dtype)

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads_of_keys < 6)

    (wanted,) = torch.autograd.grad(attend(), value, towards)
    kept: list[Tensor] = []
    with ChunkAttention("values"), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = attend()
    assert calls == [0]
    assert (2, heads_of_keys, 150, 4) in [tuple(t.shape) for t in kept]
    grads = torch.autograd.grad(out, (query, key, value), towards, allow_unused=True)
    torch.testing.assert_close(grads[2], wanted, rtol=1e-11, atol=1e-12)
    assert grads[:2] == (None, None)
    value = value.detach()
    with ChunkAttention("values"):
        attend()
    assert calls == [0]


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_keys_that_several_queries_share_are_kept_once(copies: int) -> None:
    query, key, value = (t.detach() for t in operands(2, 6, 140, 20, 4))
    key = key[:, : 6 // copies].repeat_interleave(copies, 1)
    value.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = chunk_attention(query, key, value, 20)
    assert [tuple(t.shape) for t in kept[:2]] == [(2, 6, 140, 4), (2, 6 // copies, 140, 4)]
    expected = F.scaled_dot_product_attention(query, key, value, causal(140, 20))
    (wanted,), (grad,) = (torch.autograd.grad(each.sum(), value) for each in (expected, out))
    torch.testing.assert_close(grad[:, :, 20:], wanted[:, :, 20:], rtol=1e-11, atol=1e-12)


def test_a_contexts_keys_and_values_are_let_go_layer_by_layer() -> None:
    model: Any = tiny_model("qwen3")
    ids = text(PREFIX + CHUNK)[None]
    with torch.no_grad():
        expected = model(ids).logits[:, PREFIX:]
    past = read_prefix(model, ids[:, :PREFIX])
    held: list[list[int]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda *_: held.append([each.keys.numel() for each in past["past_key_values"].layers])
        )
    with torch.no_grad():
        found = model(ids[:, PREFIX:], **past).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    n = len(held)
    assert n == model.config.num_hidden_layers
    assert [[numel > 0 for numel in each] for each in held] == [[i > now for i in range(n)] for now in range(n)]


def test_two_dtypes_share_a_mask() -> None:
    model: Any = tiny_model("qwen3", dtype=torch.float32)
    ids = text(PREFIX + CHUNK)[None]

    def half(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return args, kwargs | {
            "hidden_states": kwargs["hidden_states"].bfloat16(),
            "position_embeddings": (cos.bfloat16(), sin.bfloat16()),
        }

    layer = model.model.layers[1].self_attn
    layer.to(torch.bfloat16)
    layer.register_forward_pre_hook(half, with_kwargs=True)
    layer.register_forward_hook(lambda module, args, output: (output[0].float(), *output[1:]))
    with torch.no_grad():
        expected = model(ids[:, PREFIX:], **read_prefix(model, ids[:, :PREFIX])).logits
        with ChunkAttention():
            found = model(ids[:, PREFIX:], **read_prefix(model, ids[:, :PREFIX])).logits
    assert same_bytes(found, expected)
