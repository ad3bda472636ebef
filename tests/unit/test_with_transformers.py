"""What transformers, torch and accelerate do with a model goes on with a memory beside it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import FAMILY_NAMES, MLP, tiny_model
from helpers import fill, logits_of, memory_for, same_bytes, text
from locas.attach import attach, attached
from locas.bank import Bank
from memories import batch, hooks_on, make, read, scores

ModelOf = Callable[..., PreTrainedModel]
each_family = pytest.mark.parametrize("name", FAMILY_NAMES)


# -------------------------------------------------------------------- generation


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, **more
    )[:, ids.shape[1] :]


@each_family
def test_generation_with_cache_padding_and_memories_is_row_by_row(model_of: ModelOf, name: str) -> None:
    # In float64 these two backbones are NaN under padding: their float32 softmax makes -inf of float64's minimum.
    model = model_of(name, torch.float32 if name in ("gemma2", "bloom") else torch.float64)
    bank = fill(memory_for(model, 2, {0: 3, 2: 5}), 8)
    lengths, index = (9, 4, 7), [1, -1, 0]
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, n in enumerate(lengths):
        ids[row, 9 - n :] = text(n, row)
        mask[row, 9 - n :] = 1
    with attached(model, bank, index):
        together = generate(model, ids, mask)
    for row, n in enumerate(lengths):
        if index[row] < 0:
            alone = generate(model, ids[row : row + 1, 9 - n :])
        else:
            with attached(model, bank.select(index[row])):
                alone = generate(model, ids[row : row + 1, 9 - n :])
                # and without a cache, token by token
                naive = ids[row : row + 1, 9 - n :]
                for _ in range(5):
                    logits = logits_of(model, naive)[:, -1:]
                    logits[..., model.generation_config.eos_token_id] = -torch.inf
                    naive = torch.cat([naive, logits.argmax(-1)], dim=1)
                assert torch.equal(naive[:, n:], alone)
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("name", ["llama", "opt", "falcon"])
def test_beam_search_with_an_index(model_of: ModelOf, name: str) -> None:
    model, ids, index = model_of(name), batch(6, 6, 6), [1, -1, 0]
    bank = fill(memory_for(model, 2), 8)
    with attached(model, bank, index):
        together = generate(model, ids, num_beams=3)
    for row, memory in enumerate(index):
        with attached(model, bank, [memory]):
            assert torch.equal(generate(model, ids[row : row + 1], num_beams=3)[0], together[row])


# -------------------------------------------------------------------- gradients


def memory_gradient(model: Any, bank: Bank, ids: Tensor) -> Tensor:
    bank.requires_grad_()
    with attached(model, bank):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()  # reentrant checkpointing knows no `inputs`; and the memory must still be attached
    grad = bank.grad
    bank.requires_grad_(False)
    assert grad is not None
    return grad


@each_family
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = tiny_model(name)
    bank, ids = memory_for(model, 2, {0: 3, 2: 5}), batch(7, 7)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if name == "falcon":
        model.config.hidden_dropout = model.config.attention_dropout = 0.0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    plain = memory_gradient(model, bank, ids)
    assert (plain != 0).any(dim=-1).float().mean() > 0.3  # relu and routing leave some slots out
    model.train()
    # The name since transformers 5.2x, and before.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    for reentrant in (False, True):
        enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        torch.testing.assert_close(memory_gradient(model, bank, ids), plain, rtol=1e-10, atol=1e-14)


# -------------------------------------------------------------------- torch.compile


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("dynamo")
def test_compiled_code_never_goes_stale() -> None:
    model, ids = tiny_model("opt", layers=1), batch(7, 7)
    bank = memory_for(model, 2)
    plain = logits_of(model, ids)
    with attached(model, bank, [1, 0]):
        expected = logits_of(model, ids)
    compiled: Any = torch.compile(model, backend="eager")
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(logits_of(compiled, ids), plain, **close)
    with attached(compiled, bank, [1, 0]) as attachment:
        torch.testing.assert_close(logits_of(compiled, ids), expected, **close)
        attachment.index = torch.tensor([-1, -1])
        torch.testing.assert_close(logits_of(compiled, ids), plain, **close)
        attachment.index = torch.tensor([1, 0])
        bank.rows.mul_(2)
        changed = logits_of(compiled, ids)
        assert (changed - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(compiled, ids), plain, **close)
    assert hooks_on(compiled) == 0


@pytest.mark.usefixtures("dynamo")
def test_compiling_after_attaching() -> None:
    model, ids = tiny_model("gpt2", layers=1), batch(7, 7)
    plain = logits_of(model, ids)
    attachment = attach(model, memory_for(model))
    expected = logits_of(model, ids)
    compiled: Any = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits_of(compiled, ids), expected, rtol=1e-12, atol=1e-12)
    attachment.detach()
    torch.testing.assert_close(logits_of(compiled, ids), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_model_is_read_as_an_eager_one() -> None:
    """Looking at activations and filling slots hook modules, too, and compiled code does not see new hooks."""
    model, ids = tiny_model("gpt2", layers=1), text(14, 2)
    strategies = ["top-k", "activation", "step-wise"]
    eager_banks = [make(model, "mlp", strategy, [0]) for strategy in strategies]
    compiled: Any = torch.compile(model, backend="eager")
    logits_of(compiled, text(11, 9)[None])  # of the length that is looked at below
    banks = [make(compiled, "mlp", strategy, [0]) for strategy in strategies]
    for eager_bank, bank in zip(eager_banks, banks, strict=True):
        assert same_bytes(bank.rows, eager_bank.rows)
        eager = scores(read(model, eager_bank, ids))
        assert same_bytes(scores(read(compiled, bank, ids)), eager)
        assert same_bytes(bank.rows, eager_bank.rows)
    assert hooks_on(model) == 0


# -------------------------------------------------------------------- accelerate


@pytest.mark.parametrize(("name", "strategy"), [("llama", "top-k"), ("opt", "step-wise"), ("qwen3_moe", "top-k")])
@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_an_offloaded_model_is_read_as_a_plain_one(
    model_of: ModelOf, name: str, strategy: str, how: str, tmp_path: Path
) -> None:
    plain, ids = model_of(name), text(14, 2)
    variant = "mlp" if name in MLP else "glu"
    expected_bank = make(plain, variant, strategy, [0, 1])
    expected = scores(read(plain, expected_bank, ids))
    model: Any = tiny_model(name)
    if how == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        layers = "model.decoder.layers" if name == "opt" else "model.layers"
        stem = layers.removesuffix(".layers")
        others = [f"{stem}.{n}" for n, _ in model.get_submodule(stem).named_children() if n != "layers"]
        device_map = dict.fromkeys(["lm_head", *others], "cpu")
        device_map |= {f"{layers}.0": "cpu", f"{layers}.1": "disk", f"{layers}.2": "cpu"}
        model = dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    hooks = hooks_on(model)
    bank = make(model, variant, strategy, [0, 1])
    assert bank.device == torch.device("cpu")
    torch.testing.assert_close(bank.rows, make(plain, variant, strategy, [0, 1]).rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bank.tau, expected_bank.tau, rtol=1e-12, atol=0)
    torch.testing.assert_close(scores(read(model, bank, ids)), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bank.rows, expected_bank.rows, rtol=1e-6, atol=1e-6)
    assert hooks_on(model) == hooks
