"""The reader: what it shows the model and when, what it learns, how it recovers, and how it resumes."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import FAMILY_NAMES, MAX_POSITIONS, VOCAB, tiny_model
from helpers import START, fill, fresh, memory_for, same_bytes, text
from locas import stream
from locas.attach import attached
from locas.bank import Bank
from locas.forward import IGNORED
from locas.initialise import InitSettings, create_bank
from locas.stream import ChunkRecord, Reader, ReadSettings
from locas.write import Rule, WriteSettings

ModelOf = Callable[..., PreTrainedModel]
# (family, memory): a gated family, one with step-wise slots, one without an FFN module.
KINDS = ["qwen2", "gpt2", "opt"]


def plan(length: int, start: int | None, window: int, chunk: int, everywhere: bool, first: int) -> list[Any]:
    """Naively: for each chunk, (start, stop, tokens shown, the last of them only to be predicted, first target).

    The most context that fits beside a chunk of full length; the start token counts when it is in every window,
    and else stands where nothing of the document is cut off.
    """
    found = []
    for begin in range(first, length, chunk):
        end = min(begin + chunk, length)
        always = start is not None and everywhere
        left = next(left for left in range(begin + 1) if begin + chunk - left + always <= window or left == begin)
        lead = [start] if start is not None and (always or left == 0) else []
        shown = [*lead, *range(left, end)]
        first_target = begin if lead or left < begin else begin + 1
        found.append((begin, end, lead, left, shown, first_target))
    return found


# -------------------------------------------------------------------- bookkeeping


class Spy:
    """Stands for the model: notes what it is shown; every token's loss is its own id."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, int]] = []

    def read_prefix(self, _model: Any, inputs: Tensor) -> Tensor:
        return inputs

    def chunk_nll(self, _model: Any, inputs: Tensor, targets: Tensor, prefix: Tensor, _head: Any) -> Tensor:
        self.calls.append((torch.cat([prefix, inputs], dim=1), prefix.shape[1]))
        assert inputs.shape == targets.shape
        return torch.where(targets == IGNORED, 0, targets).float()


@functools.cache
def tiny_gpt2() -> PreTrainedModel:
    return tiny_model("gpt2")


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.data())
def test_every_token_is_scored_once_in_the_right_window(data: st.DataObject) -> None:
    model = tiny_gpt2()
    window = data.draw(st.integers(2, 23), label="window")
    chunk = data.draw(st.integers(1, window - 1), label="chunk")
    first = data.draw(st.integers(0, 9), label="first_token")
    lengths = data.draw(st.lists(st.integers(first + 1, 61), min_size=1, max_size=3), label="lengths")
    start = data.draw(st.sampled_from([None, START]), label="start")
    everywhere = data.draw(st.booleans(), label="start_in_every_window")
    documents = [text(n, seed) for seed, n in enumerate(lengths)]
    spy = Spy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "read_prefix", spy.read_prefix)
        patch.setattr(stream, "chunk_nll", spy.chunk_nll)
        read = ReadSettings(window=window, chunk=chunk, start_in_every_window=everywhere)
        reader = Reader(model, None, documents, read, start_id=start, first_token=first)
        chunks = list(reader)
    assert reader.done
    plans = [plan(n, start, window, chunk, everywhere, first) for n in lengths]
    assert len(chunks) == max(len(p) for p in plans)
    calls = iter(spy.calls)
    for number, records in enumerate(chunks):
        live = [i for i, p in enumerate(plans) if number < len(p)]
        assert [i for i, record in enumerate(records) if record is not None] == live
        nothing = all(plans[i][number][5] >= plans[i][number][1] for i in live)
        inputs, prefix = (None, None) if nothing else next(calls)
        for row, i in enumerate(live):
            begin, end, lead, left, shown, first_target = plans[i][number]
            record, document = records[i], documents[i]
            assert record is not None
            assert (record.start, record.stop) == (begin, end)
            expected = document[begin:end].float()
            expected[: first_target - begin] = torch.nan
            assert same_bytes(record.nll, expected)
            if inputs is None:
                continue
            mine = [*lead, *document[left : end - 1].tolist()]
            assert len(shown) <= window + (not everywhere)
            assert inputs[row, : len(mine)].tolist() == mine
            assert (inputs[row, len(mine) :] == 0).all()
            assert inputs.shape[1] <= window
            assert prefix == len(lead) + first_target - left - 1
    assert next(calls, None) is None
    for i, document in enumerate(documents):
        scored = torch.cat([records[i].nll for records in chunks if records[i] is not None])
        expected = document[first:].float()
        if start is None and first == 0:
            expected[0] = torch.nan
        assert same_bytes(scored, expected)


# Families that compute in float64 throughout: a cache then changes nothing. RMS norms, BLOOM's softmax and GPT-J's
# scores are float32 whatever the dtype: a difference of the last bit of float64 may become one of float32's there.
EXACT = {"gpt2", "opt", "opt_post_norm", "gpt_neox", "phi", "starcoder2", "falcon"}


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_scores_equal_a_naive_pass_over_the_same_window(model_of: ModelOf, name: str) -> None:
    """With memory, beyond the sliding windows (29) of the families that have one."""
    model, n, window, chunk = model_of(name), 71, 41, 13
    ids = text(n, 3)
    bank = memory_for(model, layers={0: 3, 2: 5})
    for start, everywhere in ((None, True), (START, False)):
        read = ReadSettings(window=window, chunk=chunk, start_in_every_window=everywhere)
        records = [r for (r,) in Reader(model, bank, [ids], read, start_id=start, learn=False) if r is not None]
        plans = plan(n, start, window, chunk, everywhere, 0)
        for record, (begin, end, lead, left, _, first_target) in zip(records, plans, strict=True):
            inputs = torch.tensor([*lead, *ids[left : end - 1].tolist()])
            with torch.no_grad(), attached(model, bank):
                logits = model(inputs[None], use_cache=False).logits[0]
            expected = -logits.log_softmax(-1)[range(first_target - end, 0), ids[first_target:end]]
            got = record.nll[first_target - begin :]
            # Records are float32.
            torch.testing.assert_close(got, expected.float(), rtol=3e-7, atol=0 if name in EXACT else 1e-5)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_scores_equal_a_naive_pass_to_ten_digits(model_of: ModelOf, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, window, chunk = model_of(name), text(47, 4), 31, 11
    bank = memory_for(model)
    exact: list[Tensor] = []
    score = stream.chunk_nll

    def keep(*args: Any) -> Tensor:
        exact.append(score(*args))
        return exact[-1]

    monkeypatch.setattr(stream, "chunk_nll", keep)
    list(Reader(model, bank, [ids], ReadSettings(window=window, chunk=chunk), start_id=START, learn=False))
    for nll, (_, end, lead, left, _, first_target) in zip(exact, plan(47, START, window, chunk, True, 0), strict=True):
        inputs = torch.tensor([*lead, *ids[left : end - 1].tolist()])
        with torch.no_grad(), attached(model, bank):
            logits = model(inputs[None], use_cache=False).logits[0]
        expected = -logits.log_softmax(-1)[range(first_target - end, 0), ids[first_target:end]]
        torch.testing.assert_close(nll[0], expected, rtol=1e-10, atol=0)


def test_the_first_token_without_a_start_token_is_nan(model_of: ModelOf) -> None:
    model = model_of("gpt2")
    for chunk in (1, 4):
        bank = memory_for(model)
        before = bank.rows.clone()
        reader = Reader(model, bank, [text(9)], ReadSettings(window=7, chunk=chunk))
        (record,) = reader.next_chunk()
        assert record is not None
        assert record.nll.isnan().tolist() == [True] + [False] * (chunk - 1)
        assert math.isnan(record.grad_norm) == (chunk == 1)
        assert torch.equal(bank.rows, before) == (chunk == 1)
        assert not any(r.nll.isnan().any() for (r,) in reader if r is not None)


def test_a_single_token_is_scored_after_the_start_token(model_of: ModelOf) -> None:
    model = model_of("gpt2")
    ((record,),) = Reader(model, None, [text(1)], ReadSettings(window=7), start_id=START)
    with torch.no_grad():
        logits = model(torch.tensor([[START]])).logits[0, -1]
    assert record is not None
    assert float(record.nll) == pytest.approx(-float(logits.log_softmax(-1)[text(1)]), rel=1e-6)
    ((record,),) = Reader(model, None, [text(1)], ReadSettings(window=7))
    assert record is not None
    assert record.nll.isnan().all()


# -------------------------------------------------------------------- learning

READ = ReadSettings(window=17, chunk=7, write=WriteSettings(lr=0.1))


def reading(rule: Rule = "muon", steps: int = 1, **more: Any) -> ReadSettings:
    return ReadSettings(window=17, chunk=7, steps=steps, write=WriteSettings(rule, lr=0.05), **more)


def same_record(one: ChunkRecord | None, other: ChunkRecord | None, tolerance: float = 0.0) -> None:
    """All fields but the time."""
    if one is None or other is None:
        assert one is other
        return
    assert (one.start, one.stop, one.filled, one.undone) == (other.start, other.stop, other.filled, other.undone)
    assert one.step_scale == other.step_scale
    for name in ("nll", "grad_norm", "row_norm"):
        a, b = (torch.as_tensor(getattr(r, name)) for r in (one, other))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


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


# -------------------------------------------------------------------- losses that are not finite


def run_with(
    model: nn.Module, name: str, interfere: Callable[[Reader, int], None], steps: int = 1, size: int = 3
) -> tuple[list[list[ChunkRecord | None]], Bank]:
    """Three documents; `interfere(reader, chunk)` is called before each chunk."""
    bank = fresh(model, name, size)
    reader = Reader(model, bank, [text(36, i) for i in range(size)], reading(steps=steps, fill_eps=1.0), start_id=START)
    chunks = []
    while not reader.done:
        interfere(reader, len(chunks))
        chunks.append(reader.next_chunk())
    return chunks, bank


def column(chunks: list[list[ChunkRecord | None]], i: int) -> list[ChunkRecord]:
    return [records[i] for records in chunks if records[i] is not None]  # type: ignore[misc]


@pytest.mark.parametrize("name", KINDS)
def test_a_gradient_that_is_not_finite_is_not_written(model_of: ModelOf, name: str) -> None:
    model = model_of(name)
    kept: list[Tensor] = []

    def interfere(reader: Reader, chunk: int) -> None:
        real = Reader._gradient

        def poisoned(losses: Tensor) -> Tensor:
            grad = real(reader, losses)
            grad[1, 3, 2] = torch.nan
            return grad

        reader._gradient = poisoned if chunk == 2 else real.__get__(reader)  # type: ignore[method-assign]
        assert reader.bank is not None
        kept.append(reader.bank.rows.clone())

    chunks, bank = run_with(model, name, interfere)
    clean, untouched = run_with(model, name, lambda *_: None)
    for i in (0, 2):
        for a, b in zip(column(chunks, i), column(clean, i), strict=True):
            same_record(a, b)
        assert same_bytes(bank.rows[i], untouched.rows[i])
    hit = column(chunks, 1)
    assert [r.undone for r in hit] == [False, False, True, False, False, False]
    assert [r.step_scale for r in hit] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert same_bytes(kept[3][1], kept[2][1])
    assert not torch.equal(kept[4][1], kept[3][1])
    assert all(r.nll.isfinite().all() for r in hit)


@pytest.mark.parametrize(("name", "steps"), [("qwen2", 1), ("opt", 1), ("gpt2", 2)])
def test_a_write_that_breaks_the_loss_is_taken_back(model_of: ModelOf, name: str, steps: int) -> None:
    """The first write of chunk 2 throws memory 1 far away: rows stay finite, the loss does not."""
    model = model_of(name)
    kept: list[Tensor] = []

    def interfere(reader: Reader, chunk: int) -> None:
        writer, calls = reader.writer, []
        assert writer is not None
        real = type(writer).write

        def far(grad: Tensor, active: Tensor) -> Tensor:
            failed = real(writer, grad, active)
            if not calls:
                writer.bank.rows[1] = 1e200
            calls.append(1)
            return failed

        writer.write = far if chunk == 2 else real.__get__(writer)  # type: ignore[method-assign]
        kept.append(writer.bank.rows.clone())

    chunks, bank = run_with(model, name, interfere, steps)
    clean, untouched = run_with(model, name, lambda *_: None, steps)
    for i in (0, 2):
        for a, b in zip(column(chunks, i), column(clean, i), strict=True):
            same_record(a, b)
        assert same_bytes(bank.rows[i], untouched.rows[i])
    hit = column(chunks, 1)
    # With one step, the next chunk's score finds it; with more, the next step's.
    seen = 3 if steps == 1 else 2
    assert [r.undone for r in hit] == [i == seen for i in range(6)]
    assert [r.step_scale for r in hit] == [0.5 if i >= seen else 1.0 for i in range(6)]
    assert all(r.nll.isfinite().all() for r in hit)
    assert bank.rows.isfinite().all()
    if steps == 1:  # chunk 3 was scored with the memory as before the bad write
        rows = kept[2][1:2]
        reader = Reader(model, bank.like(rows, bank.tau[1:2]), [text(36, 1)], READ, start_id=START, learn=False)
        reader.position = 21
        (again,) = reader.next_chunk()
        assert again is not None
        torch.testing.assert_close(again.nll, hit[3].nll, rtol=1e-6, atol=1e-5)


def test_filling_that_breaks_the_loss_is_taken_back(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2")
    real = stream.stepwise_rows
    for poison in (torch.nan, 1.7e308):
        calls: list[int] = []

        def poisoned(*args: Any, poison: float = poison, calls: list[int] = calls) -> Any:
            keys, values = real(*args)
            if not calls:
                values[1][1] = poison
            calls.append(1)
            return keys, values

        monkeypatch.setattr(stream, "stepwise_rows", poisoned)
        chunks, bank = run_with(model, "gpt2", lambda *_: None)
        monkeypatch.setattr(stream, "stepwise_rows", real)
        clean, untouched = run_with(model, "gpt2", lambda *_: None)
        for i in (0, 2):
            for a, b in zip(column(chunks, i), column(clean, i), strict=True):
                same_record(a, b, 1e-12)
        hit = column(chunks, 1)
        seen = 0 if math.isnan(poison) else 1
        assert [r.undone for r in hit] == [i == seen for i in range(6)]
        assert hit[0].filled == (0 if seen == 0 else 5)
        assert hit[1].filled == 5  # empty again, so filled again
        assert bank.rows.isfinite().all()
        torch.testing.assert_close(bank.rows[0], untouched.rows[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_memory", [True, False])
def test_a_backbone_that_is_not_finite_is_reported(with_memory: bool) -> None:
    model = tiny_model("gpt2")

    def poison(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.masked_fill((args[0] == 5)[..., None], torch.nan)

    model.get_input_embeddings().register_forward_hook(poison)
    documents = [torch.tensor([7, 8, 9, 10, 11]), torch.tensor([7, 8, 9, 5, 10, 11, 12])]
    bank = fresh(tiny_model("gpt2"), "gpt2", 2) if with_memory else None
    reader = Reader(model, bank, documents, ReadSettings(window=9, chunk=3), start_id=START)
    reader.next_chunk()
    rows = bank.rows.clone() if bank is not None else None
    message = (
        "the loss on tokens 3..6 of document(s) [1] is not finite, and not because of the memory's last write; check "
        "the backbone in its dtype on this text (try float32)"
    )
    with pytest.raises(FloatingPointError, match=f"^{re.escape(message)}$"):
        reader.next_chunk()
    assert reader.position == 3
    if bank is not None and rows is not None:
        assert same_bytes(bank.rows[0], rows[0])
        assert bank.grad is None
    assert sum(len(m._forward_hooks) for m in model.modules()) == 1


def test_a_memory_that_is_not_finite_is_reported_without_learning(model_of: ModelOf) -> None:
    model = model_of("gpt2")
    bank = memory_for(model)
    bank.rows[0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="is not finite"):
        Reader(model, bank, [text(9)], READ, start_id=START, learn=False).next_chunk()


# -------------------------------------------------------------------- resuming


@pytest.mark.parametrize(("name", "rule"), [("qwen2", "muon"), ("gpt2", "muon"), ("opt", "adamw")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(model_of: ModelOf, name: str, rule: Rule) -> None:
    model = model_of(name)
    documents = [text(26, 1), text(12, 2)]

    def reader() -> Reader:
        return Reader(model, fresh(model, name, 2), documents, reading(rule, 2), start_id=START)

    whole = reader()
    states, chunks = [], []
    while not whole.done:
        states.append({k: t.clone() for k, t in whole.state().items()})
        chunks.append(whole.next_chunk())
    end = whole.state()
    used = whole  # a reader that has read to the end can go back, too
    for stop, state in enumerate(states):
        for resumed in (reader(), used):
            resumed.load_state({k: t.clone() for k, t in state.items()})
            for records, expected in zip(resumed, chunks[stop:], strict=True):
                for a, b in zip(records, expected, strict=True):
                    same_record(a, b)
            assert set(resumed.state()) == set(end)
            for key, tensor in resumed.state().items():
                assert same_bytes(tensor, end[key]), key


def test_a_resumed_run_can_still_take_its_last_write_back(model_of: ModelOf) -> None:
    model = model_of("qwen2")
    one = Reader(model, fresh(model, "qwen2"), [text(36)], reading(), start_id=START)
    one.next_chunk()
    one.next_chunk()
    other = Reader(model, fresh(model, "qwen2"), [text(36)], reading(), start_id=START)
    other.load_state({k: t.clone() for k, t in one.state().items()})
    for reader in (one, other):
        assert reader.bank is not None
        reader.bank.rows.fill_(1e200)
    for a, b in zip(one, other, strict=True):
        same_record(a[0], b[0])


def test_a_state_that_does_not_fit_changes_nothing(model_of: ModelOf) -> None:
    model = model_of("qwen2")

    def reader(rule: Rule = "muon", size: int = 1, learn: bool = True, bank: Bank | None = None) -> Reader:
        bank = bank or fresh(model, "qwen2", size)
        return Reader(model, bank, [text(36)] * size, reading(rule), start_id=START, learn=learn)

    target = reader()
    target.next_chunk()
    before = {k: t.clone() for k, t in target.state().items()}
    donors = {
        "rows of ((2, 45, 20), torch.float64)": reader(size=2),
        "rows of ((1, 45, 20), torch.float32)": reader(bank=fresh(model, "qwen2").to(dtype=torch.float32)),
        "writer.counts of None": reader(learn=False),
        "writer.moment.1": reader("adamw"),
    }
    for what, donor in donors.items():
        donor.next_chunk()
        with pytest.raises(ValueError, match=re.escape(f"this state holds {what}")) as error:
            target.load_state(donor.state())
        assert "resume with the settings that the run was started with" in str(error.value)
        for key, tensor in target.state().items():
            assert same_bytes(tensor, before[key]), key
    adamw = reader("adamw")
    with pytest.raises(ValueError, match=re.escape("this state holds writer.moment.1 of None")):
        adamw.load_state(before)
    torn = {k: t for k, t in before.items() if k != "writer.before.1"}
    with pytest.raises(ValueError, match=re.escape("this state holds writer.before.1 of None")):
        target.load_state(torn)


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "a window needs at least 2 tokens; got 1"),
        ({"chunk": 0}, "a chunk needs at least 1 token; got 0"),
        ({"steps": 0}, "steps must be 1 or more (to score without learning pass learn=False); got 0"),
    ],
)
def test_errors_of_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ReadSettings(**arguments)


def test_sizes(model_of: ModelOf) -> None:
    model, unlimited = model_of("gpt2"), model_of("bloom")
    assert ReadSettings().sizes(model) == (MAX_POSITIONS, MAX_POSITIONS // 2)
    assert ReadSettings().sizes(unlimited) == (2048, 1024)
    assert ReadSettings(window=2).sizes(model) == (2, 1)
    assert ReadSettings(chunk=3).sizes(model) == (MAX_POSITIONS, 3)
    assert ReadSettings(window=9999).sizes(unlimited) == (9999, 4999)
    message = (
        "a window of 132 tokens is longer than the 131 that this backbone was trained for; use 131 or less "
        "(--window 131)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ReadSettings(window=132).sizes(model)
    message = (
        "a chunk of 9 tokens does not fit into a window of 9: at least one token of context goes before it; use "
        "--chunk 4 or a longer --window"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ReadSettings(window=9, chunk=9).sizes(model)


@pytest.mark.parametrize(
    ("documents", "more", "message"),
    [
        ([], {}, "there is no document to read"),
        ([text(5)], {"size": 2}, "1 documents need as many memories; the bank holds 2"),
        ([text(5), text(0)], {}, "document 1 has 0 tokens: there is nothing to read from 0 on"),
        ([text(5)], {"first_token": 5}, "document 0 has 5 tokens: there is nothing to read from 5 on"),
        ([text(5)], {"first_token": -1}, "document 0 has 5 tokens: there is nothing to read from -1 on"),
        ([text(4)[None]], {}, "document 0 must be a vector of token ids; got (1, 4) torch.int64"),
        ([text(4) > 5], {}, "document 0 must be a vector of token ids; got (4,) torch.bool"),
        ([text(4).float()], {}, "document 0 must be a vector of token ids; got (4,) torch.float32"),
        (
            [torch.tensor([3, VOCAB])],
            {},
            f"document 0 has token ids 3..{VOCAB}, but the backbone knows 0..{VOCAB - 1}; was it encoded with another "
            "tokenizer?",
        ),
        (
            [torch.tensor([-1, 4])],
            {},
            f"document 0 has token ids -1..4, but the backbone knows 0..{VOCAB - 1}; was it encoded with another "
            "tokenizer?",
        ),
        ([text(4)], {"start_id": VOCAB}, f"the start token {VOCAB} is not among the 0..{VOCAB - 1} that"),
        ([text(4)], {"start_id": -1}, f"the start token -1 is not among the 0..{VOCAB - 1} that"),
    ],
)
def test_errors_of_documents(
    model_of: ModelOf, documents: Sequence[Tensor], more: dict[str, Any], message: str
) -> None:
    model = model_of("gpt2")
    more = dict(more)
    size = more.pop("size", None)
    bank = None if size is None else memory_for(model, size)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Reader(model, bank, documents, READ, **more)


def test_a_memory_of_another_width_is_refused(model_of: ModelOf) -> None:
    with pytest.raises(ValueError, match="was made for hidden states of width 20"):
        Reader(model_of("gpt2"), memory_for(model_of("qwen2")), [text(5)], READ)


def test_reading_on_after_the_end_is_an_error(model_of: ModelOf) -> None:
    reader = Reader(model_of("gpt2"), None, [text(5)], READ)
    list(reader)
    with pytest.raises(ValueError, match=r"^every document is read to its end$"):
        reader.next_chunk()


def test_first_token_makes_the_earlier_ones_context(model_of: ModelOf) -> None:
    model, ids = model_of("gpt2"), text(20)
    bank = create_bank(model, ids, InitSettings(4, "mlp", "top-k"))
    ((record,),) = Reader(model, bank, [ids], ReadSettings(window=30, chunk=7), first_token=13, learn=False)
    ((whole,),) = Reader(model, bank, [ids], ReadSettings(window=30, chunk=29), learn=False)
    assert record is not None
    assert whole is not None
    assert (record.start, record.stop) == (13, 20)
    torch.testing.assert_close(record.nll, whole.nll[13:], rtol=1e-6, atol=1e-6)
