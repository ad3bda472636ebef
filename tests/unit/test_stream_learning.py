"""The reader: what it learns from a chunk, and what stays as it was."""

import math
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from families import tiny_model
from helpers import START, fill, fresh, memory_for, same_bytes, text
from locas.attach import attached
from locas.bank import Bank
from locas.stream import Reader, ReadSettings
from locas.write import Rule, WriteSettings
from readings import KINDS, READ, reading, same_record

ModelOf = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("name", KINDS)
def test_records_say_what_happened(model_of: ModelOf, name: str) -> None:
    model = model_of(name)
    bank = fresh(model, name)
    reader = Reader(model, bank, [text(25, 1)], reading(), start_id=START)
    assert not reader.done
    for begin in range(0, 25, 7):
        before = bank.rows.clone()
        (record,) = reader.next_chunk()
        assert record is not None
        assert (record.start, record.stop) == (begin, min(begin + 7, 25))
        assert record.nll.dtype == torch.float32
        assert record.nll.shape == (record.stop - begin,)
        assert record.seconds > 0
        assert not record.undone
        assert record.step_scale == 1
        assert record.row_norm == pytest.approx(float(bank.rows.norm(dim=-1).mean()))
        assert not torch.equal(bank.rows, before)
        fills = name != "qwen2" and begin == 0  # rank 5, 7 tokens a chunk
        assert record.filled == (5 if fills else 0)
        assert math.isnan(record.grad_norm) == fills
    assert reader.done
    assert bank.grad is None
    assert not bank.read(0, torch.zeros(1, 1, bank.d_model)).requires_grad


def test_grad_norm_is_the_gradient_of_the_mean_loss(model_of: ModelOf) -> None:
    model = model_of("gpt2")
    bank, ids = memory_for(model), text(7, 5)
    twin = bank.clone().requires_grad_()
    with attached(model, twin):
        logits = model(torch.tensor([[START, *ids[:-1].tolist()]])).logits[0]
    torch.nn.functional.cross_entropy(logits, ids).backward(inputs=twin.leaves())
    (record,) = Reader(model, bank, [ids], reading(), start_id=START).next_chunk()
    assert record is not None
    assert twin.grad is not None
    assert record.grad_norm == pytest.approx(float(twin.grad.norm()), rel=1e-6)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("rule", "steps"), [("muon", 1), ("adamw", 3)])
def test_documents_side_by_side_are_read_as_if_alone(model_of: ModelOf, name: str, rule: Rule, steps: int) -> None:
    model = model_of(name)
    documents = [text(n, n) for n in (17, 1, 22, 8)]
    for start in (START, None) if steps == 1 else (START,):
        together = fresh(model, name, 4)
        reader = Reader(model, together, documents, reading(rule, steps), start_id=start)
        chunks = list(reader)
        # RMS norms are float32: a last bit of float64 becomes one of float32, and a write makes it larger.
        tolerance = 1e-4 if name == "qwen2" else 1e-11
        for i, document in enumerate(documents):
            alone = fresh(model, name)
            single = list(Reader(model, alone, [document], reading(rule, steps), start_id=start))
            assert [records[i] for records in chunks[len(single) :]] == [None] * (len(chunks) - len(single))
            for (mine,), records in zip(single, chunks, strict=False):
                same_record(mine, records[i], tolerance)
            torch.testing.assert_close(together.rows[i], alone.rows[0], rtol=tolerance, atol=tolerance)
            assert same_bytes(together.tau[i], alone.tau[0])


def test_memories_that_are_full_and_memories_that_are_not_side_by_side(model_of: ModelOf) -> None:
    """One fills slots where another takes gradient steps; layers differ in room."""
    model = model_of("gpt2")
    documents = [text(25, 1), text(25, 2), text(25, 3)]
    banks = [Bank("mlp", "gelu_new", 22, {0: 3, 1: 11, 2: 3}, dtype=torch.float64) for _ in documents]
    fill(banks[1])
    fill(banks[2])
    banks[2].slots(1).k[0, 4:] = 0
    banks[2].slots(1).v[0, 4:] = 0
    for steps in (1, 2):
        together = Bank.stack(banks)
        chunks = list(Reader(model, together, documents, reading(steps=steps), start_id=START))
        assert [r.filled for r in chunks[0] if r is not None] == [7, 0, 7]
        assert [r.filled for r in chunks[1] if r is not None] == [4, 0, 0]
        for i, document in enumerate(documents):
            alone = banks[i].clone()
            single = list(Reader(model, alone, [document], reading(steps=steps), start_id=START))
            for (mine,), records in zip(single, chunks, strict=True):
                same_record(mine, records[i], 1e-11)
            torch.testing.assert_close(together.rows[i], alone.rows[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", KINDS)
def test_more_steps_learn_more_from_the_same_chunk(model_of: ModelOf, name: str) -> None:
    model, ids = model_of(name), text(7, 8)
    losses = []
    for steps in (1, 3, 9):
        bank = fresh(model, name)
        list(Reader(model, bank, [ids], ReadSettings(17, 7, steps, write=WriteSettings(lr=0.02)), start_id=START))
        ((again,),) = Reader(model, bank, [ids], READ, start_id=START, learn=False)
        assert again is not None
        losses.append(float(again.nll.mean()))
    assert losses[0] > losses[1] > losses[2]


def test_filling_stands_for_the_first_step_only(model_of: ModelOf) -> None:
    model, ids = model_of("gpt2"), text(7, 8)
    rows = []
    for steps in (1, 2):
        bank = fresh(model, "gpt2")
        reader = Reader(model, bank, [ids], reading(steps=steps), start_id=START)
        (record,) = reader.next_chunk()
        assert record is not None
        assert record.filled == 5
        assert math.isnan(record.grad_norm) == (steps == 1)
        assert reader.writer is not None
        assert reader.writer.counts.tolist() == [steps - 1]
        rows.append(bank.rows.clone())
    assert not torch.equal(*rows)


def test_fill_eps_is_the_length_of_a_slot_over_all_layers(model_of: ModelOf) -> None:
    model = model_of("gpt2")
    bank = fresh(model, "gpt2")
    Reader(model, bank, [text(7, 8)], reading(fill_eps=0.3), start_id=START).next_chunk()
    lengths = torch.stack([bank.slots(layer).v[0].square().sum(-1) for layer in bank.layers]).sum(0).sqrt()
    torch.testing.assert_close(lengths, torch.full((5,), 0.3, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_without_learning_nothing_is_written(model_of: ModelOf, name: str) -> None:
    model = model_of(name)
    for bank in (fresh(model, name), memory_for(model)):
        before = bank.clone()
        records = list(Reader(model, bank, [text(25)], READ, start_id=START, learn=False))
        assert same_bytes(bank.rows, before.rows)
        assert same_bytes(bank.tau, before.tau)
        for (record,) in records:
            assert record is not None
            assert math.isnan(record.grad_norm)
            assert record.filled == 0
            assert record.row_norm == pytest.approx(float(bank.rows.norm(dim=-1).mean()))


def test_without_a_memory(model_of: ModelOf) -> None:
    model = model_of("gpt2")
    plain = list(Reader(model, None, [text(25), text(9)], READ, start_id=START))
    zero = list(Reader(model, fresh(model, "gpt2", 2), [text(25), text(9)], READ, start_id=START, learn=False))
    for one, other in zip(plain, zero, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert same_bytes(a.nll, b.nll)
                assert math.isnan(a.row_norm)
                assert math.isnan(a.grad_norm)


def test_the_backbone_is_frozen_while_it_is_read_and_put_back_after() -> None:
    model = tiny_model("gpt2", layers=1)
    model.train()
    model.transformer.h[0].eval()
    parameters = list(model.parameters())
    parameters[3].requires_grad_(False)
    before = [p.requires_grad for p in parameters], [m.training for m in model.modules()]
    seen: list[tuple[bool, bool]] = []
    handle = model.lm_head.register_forward_hook(
        lambda *_: seen.append((any(p.requires_grad for p in parameters), any(m.training for m in model.modules())))
    )
    list(Reader(model, fresh(model, "gpt2"), [text(16)], READ, start_id=START))
    handle.remove()
    assert set(seen) == {(False, False)}
    assert before == ([p.requires_grad for p in parameters], [m.training for m in model.modules()])
    assert all(p.grad is None for p in parameters)
