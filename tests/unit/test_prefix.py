"""Context kept from chunk to chunk: against one naive pass under a mask, and the reader's invariants again."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import ABSOLUTE, FAMILY_NAMES, tiny_model
from helpers import START, fresh, memory_for, same_bytes, text
from locas.attach import attached
from locas.forward import positions_are_relative
from locas.prefix import _Layer
from locas.sites import decoder_of
from locas.stream import Reader, ReadSettings

ModelOf = Callable[..., PreTrainedModel]
RELATIVE = [name for name in FAMILY_NAMES if name not in ABSOLUTE]
WINDOW, CHUNK = 25, 7
LIMIT = WINDOW - CHUNK - 1


def settings(**more: Any) -> ReadSettings:
    return ReadSettings(**{"window": WINDOW, "chunk": CHUNK, "reuse": True, "refresh": 9, "sinks": 3, **more})


def scores(reader: Reader, row: int = 0) -> Tensor:
    return torch.cat([records[row].nll for records in reader if records[row] is not None])


def one_pass(ids: Tensor, sinks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A whole document as one sequence: tokens, positions, who may see whom, and where the text's own tokens are.

    Before each chunk from which older tokens were cut off stands a copy of the sinks, which see nothing but each
    other; a chunk's tokens see those, what is left of the tokens before them, and one another.
    """
    inputs = [START, *ids[:-1].tolist()]
    tokens: list[int] = []
    positions: list[int] = []
    sees: list[list[int]] = []
    own: list[int] = []
    for start in range(0, len(inputs), CHUNK):
        room = LIMIT if start <= LIMIT else LIMIT - sinks
        visible = own[max(0, start - room) :]
        if start > LIMIT and sinks:
            first = start - room - sinks
            copy = range(len(tokens), len(tokens) + sinks)
            tokens += inputs[:sinks]
            positions += range(first, first + sinks)
            sees += [list(copy[: i + 1]) for i in range(sinks)]
            visible = [*copy, *visible]
        for i in range(start, min(start + CHUNK, len(inputs))):
            own.append(len(tokens))
            visible = [*visible, len(tokens)]
            tokens.append(inputs[i])
            positions.append(i)
            sees.append(visible)
    mask = torch.full((len(tokens), len(tokens)), -torch.inf, dtype=torch.float64)
    for row, columns in enumerate(sees):
        mask[row, columns] = 0.0
    return torch.tensor(tokens), torch.tensor(positions), mask, torch.tensor(own)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("name", [name for name in RELATIVE if name != "bloom"])  # ALiBi takes no mask from outside
def test_scores_equal_one_naive_pass_under_a_mask(model_of: ModelOf, name: str, sinks: int) -> None:
    model, ids = model_of(name), text(53, 3)
    bank = memory_for(model)
    reader = Reader(model, bank, [ids], settings(sinks=sinks), start_id=START, learn=False)
    assert reader.reuses
    found = scores(reader)
    tokens, positions, mask, own = one_pass(ids, sinks)
    with torch.no_grad(), attached(model, bank):
        logits = model(
            tokens[None], position_ids=positions[None], attention_mask=mask[None, None], use_cache=False
        ).logits[0, own]
    expected = -logits.log_softmax(-1)[range(len(ids)), ids]
    # Records are float32; RMS norms and rotations are float32 in any dtype.
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RELATIVE)
def test_recomputing_every_window_is_the_exact_reading(model_of: ModelOf, name: str) -> None:
    model, ids = model_of(name), text(61, 4)
    kept = scores(Reader(model, fresh(model, name), [ids], settings(refresh=1), start_id=START))
    exact = scores(Reader(model, fresh(model, name), [ids], settings(reuse=False), start_id=START))
    torch.testing.assert_close(kept, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gpt_neox", "bloom"])
def test_keeping_changes_scores_only_after_the_first_window(model_of: ModelOf, name: str) -> None:
    model, ids = model_of(name), text(61, 5)
    kept = scores(Reader(model, fresh(model, name), [ids], settings(), start_id=START))
    exact = scores(Reader(model, fresh(model, name), [ids], settings(reuse=False), start_id=START))
    assert same_bytes(kept[:CHUNK], exact[:CHUNK])
    assert not same_bytes(kept[CHUNK:], exact[CHUNK:])  # the memory has changed since those keys were made
    assert (kept - exact).abs().mean() < 0.2 * exact.mean()  # random weights: nothing that one could expect exactly


@pytest.mark.parametrize("name", sorted(ABSOLUTE))
def test_absolute_positions_are_recomputed_and_said_so(model_of: ModelOf, name: str) -> None:
    model, ids = model_of(name), text(40, 6)
    assert not positions_are_relative(model, 100)
    with pytest.warns(UserWarning, match="every window is recomputed"):
        reader = Reader(model, fresh(model, name), [ids], settings(), start_id=START)
    assert not reader.reuses
    exact = scores(Reader(model, fresh(model, name), [ids], settings(reuse=False), start_id=START))
    assert same_bytes(scores(reader), exact)


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_positions_are_known_for_what_they_are_when_everything_is_rounded(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype, layers=12)
    assert positions_are_relative(model, 100) == (name not in ABSOLUTE)


def test_positions_that_end_are_found_out(model_of: ModelOf) -> None:
    """GPT-J looks its rotations up in a table."""
    model = model_of("gptj")
    assert positions_are_relative(model, 100)
    assert not positions_are_relative(model, 100_000)


@pytest.mark.parametrize("name", ["qwen2", "opt"])
def test_positions_are_probed_with_the_first_layer_only_and_leave_nothing_behind(name: str) -> None:
    model, ran = tiny_model(name), []
    first, *later = decoder_of(model)
    for layer in later:
        layer.register_forward_pre_hook(lambda *_: ran.append(1))
    hooks, before = dict(first._forward_hooks), {n: t.data_ptr() for n, t in model.state_dict().items()}
    assert positions_are_relative(model, 100) == (name == "qwen2")
    assert not ran
    assert dict(first._forward_hooks) == hooks
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_positions_that_end_leave_cuda_as_it_was_and_a_memory_may_lie_elsewhere() -> None:
    model, ids = tiny_model("gpt2", torch.float32).cuda(), text(40, 6)
    assert not positions_are_relative(model, 100_000)
    bank = fresh(model, "gpt2").to("cpu")
    nll = scores(Reader(model, bank, [ids], settings(reuse=False), start_id=START))
    assert nll.isfinite().all()


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "starcoder2", "gpt_neox"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(model_of: ModelOf, name: str) -> None:
    """For three chunks, after which all that the rest depends on is the same to the last bit."""
    model, documents = model_of(name), [text(12, 2), text(64, 1)]

    def reader() -> Reader:
        return Reader(model, fresh(model, name, 2), documents, settings(refresh=5), start_id=START)

    def state_of(reader: Reader) -> dict[str, Tensor]:
        return {k: t.clone() for k, t in sorted(reader.state().items(), reverse=True)}

    whole, states, chunks = reader(), [], []
    while not whole.done:
        states.append(state_of(whole))
        chunks.append([None if r is None else r.nll for r in whole.next_chunk()])
    states.append(state_of(whole))
    # Stops before the first refresh and after it, with sinks read ahead and without.
    assert len(chunks) == 10
    assert {"prefix.sink.0" in state for state in states[1:5]} == {"prefix.sink.0" in state for state in states[6:]}
    assert any("prefix.sink.0" in state for state in states)
    for stop, state in enumerate(states[:-1]):
        end = min(stop + 3, len(chunks))
        for resumed in (reader(), whole):  # a reader that has read to the end can go back, too
            resumed.load_state({k: t.clone() for k, t in state.items()})
            for expected in chunks[stop:end]:
                for record, nll in zip(resumed.next_chunk(), expected, strict=True):
                    assert (record is None) == (nll is None)
                    assert record is None or same_bytes(record.nll, nll)
            found = resumed.state()
            assert found.keys() == states[end].keys()
            assert all(same_bytes(tensor, states[end][key]) for key, tensor in found.items())


@pytest.mark.parametrize("name", ["qwen2", "phi"])
def test_documents_side_by_side_are_read_as_if_alone(model_of: ModelOf, name: str) -> None:
    model, documents = model_of(name), [text(33, 1), text(90, 2), text(5, 3), text(61, 4)]
    together = Reader(model, fresh(model, name, 4), documents, settings(), start_id=START)
    chunks = list(together)
    for row, ids in enumerate(documents):
        alone = Reader(model, fresh(model, name), [ids], settings(), start_id=START)
        found = torch.cat([records[row].nll for records in chunks if records[row] is not None])
        torch.testing.assert_close(found, scores(alone), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.bank.rows[row], alone.bank.rows[0], rtol=1e-4, atol=1e-5)


def test_no_score_depends_on_a_later_token(model_of: ModelOf) -> None:
    model, ids = model_of("qwen3"), text(70, 7)
    changed = ids.clone()
    changed[52] = (changed[52] + 1) % 90
    one, other = (scores(Reader(model, fresh(model, "qwen3"), [x], settings(), start_id=START)) for x in (ids, changed))
    assert same_bytes(one[:52], other[:52])
    assert not same_bytes(one[52:], other[52:])


def test_a_memory_gone_bad_is_taken_back_and_the_window_recomputed(model_of: ModelOf) -> None:
    model = model_of("qwen2")
    reader = Reader(model, fresh(model, "qwen2"), [text(60)], settings(), start_id=START)
    for _ in range(5):
        reader.next_chunk()
    assert reader.bank is not None
    reader.bank.rows.fill_(1e200)
    (record,) = reader.next_chunk()
    assert record is not None
    assert record.undone
    assert record.nll.isfinite().all()


@pytest.mark.parametrize("name", ["qwen3", "gpt_neox"])
def test_the_context_is_there_once_and_a_state_is_a_copy(model_of: ModelOf, name: str) -> None:
    model = model_of(name)
    reader = Reader(model, memory_for(model), [text(12 * CHUNK, 3)], settings(refresh=20), start_id=START)
    places = []
    for n in range(12):
        reader.next_chunk()
        kept = reader._prefix._kept  # type: ignore[union-attr]
        assert {t.shape[-2] for t in (*kept.keys, *kept.values)} == {min((n + 1) * CHUNK, LIMIT)}
        places.append([t.untyped_storage().data_ptr() for t in (*kept.keys, *kept.values)])
        if n == 7:
            state, expected = reader.state(), {name: t.clone() for name, t in reader.state().items()}
    assert all(place == places[0] for place in places)  # there is room for a window: it is written in place
    assert kept.keys[0].untyped_storage().nbytes() == kept.keys[0][:, :, 0].nbytes * (LIMIT + CHUNK)
    assert all(same_bytes(t, expected[key]) for key, t in state.items() if key.startswith("prefix."))


def test_a_short_text_takes_no_room_for_a_window(model_of: ModelOf) -> None:
    model = model_of("qwen3")
    reader = Reader(model, memory_for(model, size=2), [text(5), text(8)], settings(), start_id=START)
    reader.next_chunk()
    key = reader._prefix._kept.keys[0]  # type: ignore[union-attr]
    assert key.untyped_storage().nbytes() == key[:, :, 0].nbytes * 9


def test_a_layer_keeps_its_keys_without_what_their_gradients_need() -> None:
    layer = _Layer(7)
    for n in (1, 2):
        given = torch.randn(2, 3, n, 4, requires_grad=True), torch.randn(2, 3, n, 4)
        keys, values = layer.update(*given)
        assert same_bytes(keys[:, :, -n:], given[0])
        assert same_bytes(values[:, :, -n:], given[1])
        assert layer.keys.grad_fn is None
        assert layer.keys.data_ptr() == keys.data_ptr()
        (grad,) = torch.autograd.grad(keys.sum(), given[0])
        assert torch.equal(grad, torch.ones_like(given[0]))
    assert layer.get_seq_length() == 3


@pytest.mark.parametrize("reuse", [True, False])
def test_no_chunk_leaves_anything_behind(model_of: ModelOf, reuse: bool) -> None:
    """Neither tensors that only the garbage collector would find: they would pile up until it comes."""
    model = model_of("qwen3")
    reader = Reader(model, memory_for(model), [text(12 * CHUNK)], settings(reuse=reuse, refresh=99), start_id=START)
    gc.collect()
    gc.disable()
    try:
        alive = []
        for _ in range(8):
            reader.next_chunk()
            alive.append(sum(type(each) is Tensor for each in gc.get_objects()))
    finally:
        gc.enable()
    assert len(set(alive[5:])) == 1


def test_a_torn_state_changes_nothing(model_of: ModelOf) -> None:
    model = model_of("qwen2")
    reader = Reader(model, fresh(model, "qwen2"), [text(60)], settings(), start_id=START)
    for _ in range(4):
        reader.next_chunk()
    state = {k: t.clone() for k, t in reader.state().items()}
    for bad in (
        {k: t for k, t in state.items() if k != "prefix.key.1"},
        {k: t for k, t in state.items() if k != "prefix.numbers"},
        state | {"prefix.value.0": state["prefix.value.0"][:, :, 1:]},
        state | {"prefix.sink.1": state["prefix.sink.1"][..., 1:, :]},
        state | {"prefix.numbers": torch.tensor([1, 2, 1, 7])},
        state | {"prefix.numbers": torch.tensor([1])},
    ):
        with pytest.raises(ValueError, match=re.escape("kept context does not fit")):
            reader.load_state(bad)
        for key, tensor in reader.state().items():
            assert same_bytes(tensor, state[key]), key


@pytest.mark.parametrize(("field", "value"), [("refresh", 0), ("sinks", -1)])
def test_settings_out_of_range(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} must be"):
        settings(**{field: value})


def test_windows_too_short_to_keep_anything_are_recomputed(model_of: ModelOf) -> None:
    model, ids = model_of("qwen2"), text(23, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = Reader(model, None, [ids], ReadSettings(window=5, chunk=4, reuse=True), start_id=START)
    assert not reader.reuses
    tight = Reader(model, None, [ids], ReadSettings(window=7, chunk=4, reuse=True, sinks=4), start_id=START)
    assert tight.reuses
    assert scores(tight).isfinite().all()
