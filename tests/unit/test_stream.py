"""The reader: what it shows the model and when, and what it refuses."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from families import FAMILY_NAMES, MAX_POSITIONS, VOCAB, tiny_model
from helpers import START, memory_for, same_bytes, text
from locas import stream
from locas.attach import attached
from locas.forward import IGNORED
from locas.initialise import InitSettings, create_bank
from locas.stream import Reader, ReadSettings
from readings import READ

ModelOf = Callable[..., PreTrainedModel]


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

    def chunk_nll(self, _model: Any, inputs: Tensor, targets: Tensor, prefix: Tensor, *_more: Any) -> Tensor:
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
        patch.setattr("locas.prefix.read_prefix", spy.read_prefix)
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
    # Where the context is kept, chunks are short; where it cannot be (learnt positions, no room), they are not.
    assert ReadSettings(reuse=True).sizes(unlimited) == (2048, 256)
    assert ReadSettings(reuse=True, chunk=99).sizes(unlimited) == (2048, 99)
    assert ReadSettings(reuse=True).sizes(model) == (MAX_POSITIONS, MAX_POSITIONS // 2)
    assert ReadSettings(reuse=True, window=2).sizes(unlimited) == (2, 1)
    assert ReadSettings(reuse=True, window=9).truncated().sizes(unlimited) == (9, 4)
    assert ReadSettings(window=9, chunk=3).truncated() == ReadSettings(window=9, chunk=3)
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
