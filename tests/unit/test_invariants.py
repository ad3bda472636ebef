"""The invariants of attaching, writing and detaching, for every family, with memory on all layers or on some."""

import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import FAMILY_NAMES, MLP, tiny_model
from helpers import START, fill, memory_for, same_bytes, snapshot, text
from locas.attach import attach, attached
from locas.bank import Bank
from locas.initialise import InitSettings, create_bank
from locas.sites import find_sites
from locas.stream import ChunkRecord, Reader, ReadSettings
from locas.write import WriteSettings

ModelOf = Callable[..., PreTrainedModel]

# (family, variant, strategy, layers): each family in its own variant on all layers and on some, and two strangers.
CASES: list[Any] = []
for _name in FAMILY_NAMES:
    _own = ("mlp", "step-wise") if _name in MLP else ("glu", "top-k")
    CASES += [(_name, *_own, [0, 1, 2]), (_name, *_own, [1])]
CASES += [("llama", "mlp", "step-wise", [0, 2]), ("opt", "glu", "gaussian", [0, 2])]
FEW = [case for case in CASES if len(case[3]) < 3]  # each family once, and the strangers
every = pytest.mark.parametrize(
    ("name", "variant", "strategy", "layers"), [pytest.param(*c, id=f"{c[0]}-{c[1]}-{len(c[3])}") for c in CASES]
)
each_family = pytest.mark.parametrize("name", FAMILY_NAMES)

each_once = pytest.mark.parametrize(
    ("name", "variant", "strategy", "layers"), [pytest.param(*c, id=f"{c[0]}-{c[1]}") for c in FEW]
)

READ = ReadSettings(window=13, chunk=5, write=WriteSettings(lr=0.1))


def make(model: nn.Module, variant: Any, strategy: Any, layers: list[int], size: int = 1) -> Bank:
    settings = InitSettings(3, variant, strategy, tau_scale=4.0)
    return Bank.stack([create_bank(model, text(11, 9), settings, layers=layers, start_id=START)] * size)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def batch(*lengths: int) -> Tensor:
    return torch.stack([text(n, 20 + i) for i, n in enumerate(lengths)])


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def read(model: nn.Module, bank: Bank | None, *documents: Tensor, learn: bool = True) -> list[list[ChunkRecord | None]]:
    return list(Reader(model, bank, documents, READ, start_id=START, learn=learn))


def scores(chunks: list[list[ChunkRecord | None]], row: int = 0) -> Tensor:
    return torch.cat([r[row].nll for r in chunks if r[row] is not None])  # type: ignore[union-attr]


# -------------------------------------------------------------------- 1, 2, 3, 6 and 9


@every
def test_1_2_3_6_memories_come_and_go(
    model_of: ModelOf, name: str, variant: Any, strategy: Any, layers: list[int]
) -> None:
    model, ids = model_of(name), batch(7, 7)
    weights, plain = snapshot(model), logits_of(model, ids)
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    bank = make(model, variant, strategy, layers)
    assert bank.layers == tuple(layers)
    # 1. fresh, detached, and -1 everywhere: the backbone, bit for bit
    with attached(model, bank):
        assert same_bytes(logits_of(model, ids), plain)
    assert same_bytes(logits_of(model, ids), plain)
    # 2. a write changes the logits
    read(model, bank, text(12, 1))
    with attached(model, bank):
        written = logits_of(model, ids)
    assert not torch.equal(written, plain)
    with attached(model, bank, [-1, -1]):
        assert same_bytes(logits_of(model, ids), plain)
    # 6. A, B, A
    other = fill(bank.clone(), 5)
    with attached(model, other):
        assert not torch.equal(logits_of(model, ids), written)
    with attached(model, bank):
        assert same_bytes(logits_of(model, ids), written)
    # 3. the backbone is as it was
    assert same_bytes(logits_of(model, ids), plain)
    assert all(same_bytes(t, weights[k]) for k, t in model.state_dict().items())
    assert flags == [(p.requires_grad, p.grad) for p in model.parameters()]
    assert hooks_on(model) == 0


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_1_2_3_in_lower_precision(model_of: ModelOf, name: str, dtype: torch.dtype) -> None:
    model, ids = model_of(name, dtype), batch(7, 7)
    weights, plain = snapshot(model), logits_of(model, ids)
    bank = make(model, "auto", "auto", [0, 2])
    assert bank.rows.dtype == torch.float32
    with attached(model, bank):
        assert same_bytes(logits_of(model, ids), plain)
    read(model, bank, text(12, 1))
    assert bank.rows.isfinite().all()
    with attached(model, bank):
        written = logits_of(model, ids)
    assert written.dtype == dtype
    assert not torch.equal(written, plain)
    assert same_bytes(logits_of(model, ids), plain)
    assert all(same_bytes(t, weights[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "mixtral"])
def test_1_under_autocast(model_of: ModelOf, name: str) -> None:
    """Autocast mixes dtypes within a layer; a memory must not change which ones."""
    model, ids = model_of(name, torch.float32), batch(7, 7)
    bank = make(model, "auto", "auto", [0, 1, 2], size=2)
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits_of(model, ids)
        for index in (None, [0, -1]):
            with attached(model, bank, index):
                again = logits_of(model, ids)
            assert same_bytes(again, plain)


def test_the_output_keeps_its_dtype(model_of: ModelOf) -> None:
    """An FFN may compute in one dtype and answer in another: what comes after it must not notice the memory."""
    model = model_of("qwen2", torch.float32)
    exit_ = find_sites(model)[0].exit
    dtypes: list[torch.dtype] = []
    first = exit_.register_forward_hook(lambda _m, _a, output: output.to(torch.bfloat16))
    with attached(model, memory_for(model)):
        last = exit_.register_forward_hook(lambda _m, _a, output: dtypes.append(output.dtype))
        logits_of(model, batch(7, 7))
    first.remove()
    last.remove()
    assert dtypes == [torch.bfloat16]


# -------------------------------------------------------------------- 4


@each_once
def test_4_no_score_depends_on_a_later_token(
    model_of: ModelOf, name: str, variant: Any, strategy: Any, layers: list[int]
) -> None:
    model, ids = model_of(name), text(19, 2)
    whole = scores(read(model, make(model, variant, strategy, layers), ids))
    cut = 12  # in the middle of a chunk, behind the text that the basis was chosen on
    changed = ids.clone()
    changed[cut:] = text(19, 3)[cut:]
    found = scores(read(model, make(model, variant, strategy, layers), changed))
    # The same shapes, so the same kernels: the same bits.
    assert same_bytes(found[:cut], whole[:cut])
    assert not torch.equal(found[cut:], whole[cut:])


# -------------------------------------------------------------------- 5


@each_once
def test_5_stopping_and_going_on_changes_nothing(
    model_of: ModelOf, name: str, variant: Any, strategy: Any, layers: list[int]
) -> None:
    model, ids = model_of(name), text(19, 2)
    one = make(model, variant, strategy, layers)
    whole = read(model, one, ids)
    resumed, state = [], None
    for _ in range(len(whole)):
        bank = make(model, variant, strategy, layers)  # as a fresh process has it
        reader = Reader(model, bank, [ids], READ, start_id=START)
        if state is not None:
            reader.load_state(state)
        resumed.append(reader.next_chunk())
        state = {key: tensor.clone() for key, tensor in reader.state().items()}
    assert same_bytes(scores(resumed), scores(whole))
    assert same_bytes(bank.rows, one.rows)


# -------------------------------------------------------------------- 8


@each_once
def test_8_documents_of_a_batch_do_not_see_one_another(
    model_of: ModelOf, name: str, variant: Any, strategy: Any, layers: list[int]
) -> None:
    """Whatever the neighbours are: bit for bit, as the shapes are the same."""
    model, mine = model_of(name), text(14, 2)
    found = []
    for seed in (3, 4):
        bank = make(model, variant, strategy, layers, 3)
        chunks = read(model, bank, text(14, seed), mine, text(9, seed + 10))
        found.append((scores(chunks, 1), bank.rows[1].clone(), scores(chunks, 0)))
    assert same_bytes(found[0][0], found[1][0])
    assert same_bytes(found[0][1], found[1][1])
    assert not torch.equal(found[0][2], found[1][2])


# float32 inside RMS norms, BLOOM's softmax, GPT-J's scores: a last bit of float64 may become one of float32.
def tolerance(name: str) -> float:
    return 1e-12 if name in MLP and name not in ("bloom", "gptj") else 2e-6


@every
def test_8_rows_with_different_memories_and_none_equal_separate_passes(
    model_of: ModelOf, name: str, variant: Any, strategy: Any, layers: list[int]
) -> None:
    model, ids = model_of(name), batch(7, 7, 7, 7)
    bank = fill(make(model, variant, strategy, layers, 3), 6)
    index = [2, -1, 0, 2]
    with attached(model, bank, index):
        together = logits_of(model, ids)
    for row, memory in enumerate(index):
        if memory < 0:
            alone = logits_of(model, ids[row : row + 1])
        else:
            with attached(model, bank.select(memory)):
                alone = logits_of(model, ids[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=tolerance(name), atol=tolerance(name))
    with attached(model, bank):  # one to one
        three = logits_of(model, ids[:3])
    with attached(model, bank.select(1)):
        alone = logits_of(model, ids[1:2])
    torch.testing.assert_close(three[1], alone[0], rtol=tolerance(name), atol=tolerance(name))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_8_a_batch_that_does_not_fit_is_refused(model_of: ModelOf, name: str) -> None:
    """Also where the family flattens [batch, seq], and the product would fit."""
    model = model_of(name)
    bank = memory_for(model, 2)
    for index, rows in (([0, 1], 3), ([0, 1, 0], 2), (None, 3), (None, 1)):
        with attached(model, bank, index), pytest.raises(ValueError, match=r"pass an index that|give one entry for"):
            logits_of(model, batch(*[6] * rows))
    with attached(model, bank, [0, 1]):
        doubled = logits_of(model, batch(6, 6, 6, 6))  # as beam search lays it out
    with attached(model, bank, [0, 0, 1, 1]):
        assert same_bytes(logits_of(model, batch(6, 6, 6, 6)), doubled)


def test_8_the_index_may_be_exchanged(model_of: ModelOf) -> None:
    model, ids = model_of("qwen3"), batch(6, 6)
    bank = memory_for(model, 3)
    attachment = attach(model, bank, [0, 1])
    first = logits_of(model, ids)
    attachment.index = torch.tensor([1, -1])
    second = logits_of(model, ids)
    attachment.detach()
    with attached(model, bank, [1, -1]):
        assert same_bytes(logits_of(model, ids), second)
    assert not torch.equal(first, second)


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


# -------------------------------------------------------------------- attaching


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3_moe"])
def test_memories_attached_together_add_up(model_of: ModelOf, name: str) -> None:
    model, ids = model_of(name), batch(7, 7)
    one, other = memory_for(model, seed=1), memory_for(model, seed=2)
    slots = [(one.slots(layer), other.slots(layer)) for layer in one.layers]
    both = Bank(one.variant, one.activation, one.d_model, dict.fromkeys(one.layers, 6), dtype=torch.float64)
    for i, layer in enumerate(one.layers):
        a, b, target = *slots[i], both.slots(layer)
        target.k.copy_(torch.cat([a.k, b.k], dim=1))
        if target.g is not None and a.g is not None and b.g is not None:
            target.g.copy_(torch.cat([a.g, b.g], dim=1))
        target.v.copy_(torch.cat([a.v * one.tau[0, i], b.v * other.tau[0, i]], dim=1))
    with attached(model, both):
        expected = logits_of(model, ids)
    first, second = attach(model, one), attach(model, other)
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=tolerance(name), atol=tolerance(name))
    first.detach()
    with attached(model, other):
        pass
    found = logits_of(model, ids)
    second.detach()
    with attached(model, other):
        assert same_bytes(logits_of(model, ids), found)
    # The same memory twice counts twice.
    for part in range(len(other.layers)):
        other.tau[:, part] *= 2
    with attached(model, other):
        doubled = logits_of(model, ids)
    other.tau /= 2
    with attached(model, other), attached(model, other):
        torch.testing.assert_close(logits_of(model, ids), doubled, rtol=tolerance(name), atol=tolerance(name))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_detach_is_idempotent_and_spares_others(model_of: ModelOf, name: str) -> None:
    model, ids = model_of(name), batch(7, 7)
    plain = logits_of(model, ids)
    one, other = attach(model, memory_for(model, seed=1)), attach(model, memory_for(model, seed=2))
    one.detach()
    one.detach()
    with attached(model, other.bank):
        pass
    assert not torch.equal(logits_of(model, ids), plain)
    other.detach()
    one.detach()
    assert same_bytes(logits_of(model, ids), plain)
    assert hooks_on(model) == 0


def test_an_exception_inside_the_block_detaches(model_of: ModelOf) -> None:
    model = model_of("opt")
    with pytest.raises(KeyError), attached(model, memory_for(model)):
        raise KeyError
    assert hooks_on(model) == 0


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_failing_attach_leaves_nothing_behind(model_of: ModelOf, name: str) -> None:
    model, ids = model_of(name), batch(7, 7)
    plain, good = logits_of(model, ids), memory_for(model, 2)
    wrong = {
        "this memory was made for hidden states of width 7, but": (Bank("mlp", "relu", 7, {0: 3}), None),
        "this model has no layers [3]; allowed are integers from 0 to 2": (
            Bank("mlp", "relu", good.d_model, {0: 3, 3: 3}),
            None,
        ),
        "the index names memory 2, but the bank holds 0..1 (-1: no memory)": (good, [0, 2]),
        "the index must be a non-empty vector of integers; got (0,)": (good, []),
        "the index must be a non-empty vector of integers; got (1, 2) torch.int64": (good, [[0, 1]]),
        "the index must be a non-empty vector of integers; got (2,) torch.float32": (good, [0.0, 1.0]),
    }
    for message, (bank, index) in wrong.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            attach(model, bank, index)  # type: ignore[arg-type]
        assert hooks_on(model) == 0
    assert same_bytes(logits_of(model, ids), plain)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_detached_memory_is_freed(model_of: ModelOf, name: str) -> None:
    model = model_of(name)
    bank = memory_for(model)
    gone = weakref.ref(bank)
    with attached(model, bank):
        logits_of(model, batch(7, 7))
    del bank
    assert gone() is None


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
