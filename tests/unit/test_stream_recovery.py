"""The reader: losses that are not finite, and going on from a saved state."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import tiny_model
from helpers import START, fresh, memory_for, same_bytes, text
from locas import stream
from locas.bank import Bank
from locas.stream import ChunkRecord, Reader, ReadSettings
from locas.window import Window
from locas.write import Rule
from readings import KINDS, READ, reading, same_record

ModelOf = Callable[..., PreTrainedModel]


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

        def poisoned(window: Window, losses: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
            grad, curvature = real(reader, window, losses)
            grad[1, 3, 2] = torch.nan
            return grad, curvature

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

        def far(*args: Any) -> Tensor:
            failed = real(writer, *args)
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
        "writer.curvature of None": reader("adamw"),
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
