"""The invariants of attaching, writing and detaching, for every family, with memory on all layers or on some."""

import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from families import FAMILY_NAMES, MLP
from helpers import START, fill, logits_of, memory_for, same_bytes, snapshot, text
from locas.attach import attach, attached
from locas.bank import Bank
from locas.sites import find_sites
from locas.stream import Reader
from memories import READ, batch, hooks_on, make, read, scores

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
