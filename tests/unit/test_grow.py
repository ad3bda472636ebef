"""Growing and freezing: the function stays at that moment, old slots stay for ever, new ones learn."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from families import tiny_model
from helpers import START, fill, same_bytes, text
from locas.bank import Bank
from locas.cli import main
from locas.grow import freeze, grow, thaw
from locas.initialise import InitSettings
from locas.memory import Memory, create, load, read
from locas.run import Run
from locas.stream import ReadSettings
from locas.write import Rule, Writer, WriteSettings
from runs import SETTINGS, make_text, run_to_end
from tokens import tiny_backbone

ModelOf = Callable[..., PreTrainedModel]
READ = ReadSettings(window=29, chunk=11)


def after_a(model: PreTrainedModel, layers: dict[int, int] | None = None, **init: object) -> Memory:
    """A memory of text A, 2 and 7 slots on two layers unless told."""
    memory = create(model, text(11), InitSettings(tau_scale=8.0, **init), layers=layers or {0: 2, 2: 7}, start_id=START)
    list(read(model, memory, text(43), READ, start_id=START))
    return memory


def old_part(grown: Bank, old: Bank) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of tensors that must stay equal: the first slots of the grown bank, and the old one's."""
    pairs = []
    for layer, rank in old.ranks.items():
        new, was = grown.slots(layer), old.slots(layer)
        pairs += [(new.k[:, :rank], was.k), (new.v[:, :rank], was.v)]
        if new.g is not None and was.g is not None:
            pairs.append((new.g[:, :rank], was.g))
    return pairs


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3_moe"])
def test_growing_changes_no_function_and_no_old_slot(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    memory = after_a(model)
    before = memory.bank.clone()
    grown = grow(memory, model, text(13, seed=5), rank=3, start_id=START)
    assert grown.bank.ranks == {0: 5, 2: 10}
    assert same_bytes(grown.bank.tau, before.tau)
    assert all(same_bytes(new, old) for new, old in old_part(grown.bank, before))
    assert same_bytes(memory.bank.rows, before.rows)  # the old memory is as it was
    for layer, rank in before.ranks.items():
        slots = grown.bank.slots(layer)
        assert not slots.v[:, rank:].any()
        if slots.g is not None:
            torch.testing.assert_close(slots.k[:, rank:].norm(dim=-1), torch.ones(1, 3, dtype=torch.float64))
    ids = text(37, seed=7)[None]
    with torch.no_grad(), memory.attached(model):
        old = model(ids).logits
    with torch.no_grad(), grown.attached(model):
        new = model(ids).logits
    with torch.no_grad():
        assert (model(ids).logits - old).abs().max() > 1e-3
    torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12)


def test_new_slots_are_chosen_from_the_text_that_comes_as_the_grown_model_sees_it(model_of: ModelOf) -> None:
    """Slots of a memory on layer 0 change what layer 2 sees: the choice there is made with it in place."""
    model = model_of("llama")
    memory = after_a(model, {0: 5, 2: 3})
    fill(memory.bank, seed=3).tau.mul_(4)
    grown = grow(memory, model, text(13, seed=5), rank=3, init=InitSettings(init="activation"), start_id=START)
    with memory.attached(model):
        seen = create(model, text(13, seed=5), InitSettings(init="activation"), layers={0: 3, 2: 3}, start_id=START)
    alone = create(model, text(13, seed=5), InitSettings(init="activation"), layers={0: 3, 2: 3}, start_id=START)
    assert same_bytes(grown.bank.slots(2).k[:, 3:], seen.bank.slots(2).k)
    assert not torch.allclose(grown.bank.slots(2).k[:, 3:], alone.bank.slots(2).k)


@pytest.mark.parametrize("init", ["random-rows", "gaussian"])
def test_random_slots_are_not_those_that_it_has(init: str, model_of: ModelOf) -> None:
    memory = create(model_of("llama"), text(11), InitSettings(rank=5, init=init))  # type: ignore[arg-type]
    grown = grow(memory, model_of("llama"), text(11), 5, InitSettings(init=init))  # type: ignore[arg-type]
    keys = grown.bank.slots(0).k[0]
    assert not torch.allclose(keys[:5], keys[5:])
    assert (keys @ keys.T).fill_diagonal_(0).abs().amin() >= 0
    assert (keys[:5] @ keys[5:].T).amax() < 1 or init == "random-rows"


@pytest.mark.parametrize("rule", ["muon", "adamw"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("clip", [True, False])
def test_frozen_slots_stay_to_the_last_bit_while_reading_on(
    name: str, rule: Rule, clip: bool, model_of: ModelOf, tmp_path: Path
) -> None:
    model = model_of(name, torch.float32)
    memory = after_a(model)
    memory.bank.rows.mul_(1.7)  # longer than clipping allows
    grown = grow(freeze(memory), model, text(13, seed=5), rank=3, start_id=START)
    grown.save(tmp_path / "m.safetensors")
    grown = load(tmp_path / "m.safetensors", model)
    assert grown.frozen == {"0": 2, "2": 7}
    before = grown.bank.clone()
    records = list(read(model, grown, text(71, seed=9), replace(READ, write=WriteSettings(rule, clip=clip))))
    assert not any(record.undone for record in records)
    assert all(same_bytes(new, old) for new, old in old_part(grown.bank, memory.bank))
    for layer, rank in memory.bank.ranks.items():
        new, was = grown.bank.slots(layer), before.slots(layer)
        assert (new.v[:, rank:] != was.v[:, rank:]).any(dim=-1).all()
    assert not same_bytes(grown.bank.rows, before.rows)


@given(st.integers(0, 11), st.integers(0, 3), st.integers(0, 11), st.integers(0, 97))
@settings(max_examples=40, deadline=None)
def test_free_slots_are_written_as_if_frozen_ones_were_not_there(one: int, two: int, three: int, seed: int) -> None:
    """Two memories frozen differently, ranks above and below d_model, against a bank of the free slots alone."""
    ranks, d_model = {0: 11, 1: 3}, 7
    bank = fill(Bank("glu", "silu", d_model, ranks, size=2, dtype=torch.float64), seed)
    bank.frozen.copy_(torch.tensor([[one, two], [three, 0]]))
    before = bank.clone()
    writer = Writer(bank, WriteSettings(lr=0.1))
    steps = [torch.randn(bank.rows.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + i))
             for i in range(3)]  # fmt: skip
    frozen = bank.frozen_rows()
    frozen = torch.zeros(bank.rows.shape[:2], dtype=torch.bool) if frozen is None else frozen
    for grad in steps:
        assert not writer.write(grad, torch.ones(2)).any()
    assert same_bytes(bank.rows[frozen], before.rows[frozen])
    for i, counts in enumerate([(one, two), (three, 0)]):
        free = {layer: rank - n for (layer, rank), n in zip(ranks.items(), counts, strict=True) if rank > n}
        if not free:
            continue
        alone = Bank("glu", "silu", d_model, free, dtype=torch.float64)
        alone.rows.copy_(before.rows[i][~frozen[i]][None])
        other = Writer(alone, WriteSettings(lr=0.1))
        for grad in steps:
            other.write(grad[i][~frozen[i]][None], torch.ones(1))
        # Rounding, not 1e-10: Newton-Schulz multiplies what is small by 480, and its Gram matrix squares it first.
        torch.testing.assert_close(bank.rows[i][~frozen[i]][None], alone.rows, rtol=0, atol=1e-6)


def test_stepwise_slots_are_filled_behind_the_frozen_ones_even_where_those_are_empty(model_of: ModelOf) -> None:
    model = model_of("gpt2")
    memory = create(model, text(11), InitSettings(init="step-wise", tau_scale=1.0), layers={1: 13}, start_id=START)
    list(read(model, memory, text(5), READ, start_id=START))  # 5 slots of 13
    assert (memory.bank.slots(1).k[0] != 0).any(dim=-1).sum() == 5
    grown = grow(freeze(memory), model, text(11, seed=3), rank=17, init=InitSettings(init="step-wise"), start_id=START)
    assert not grown.bank.slots(1).k[0, 13:].any()
    (record, *_) = read(model, grown, text(43, seed=3), READ, start_id=START)
    assert record.filled == 11
    assert all(same_bytes(new, old) for new, old in old_part(grown.bank, memory.bank))


def test_a_thawed_memory_is_written_again(model_of: ModelOf) -> None:
    model = model_of("llama")
    memory = after_a(model)
    thawed = thaw(freeze(memory))
    assert "frozen" not in thawed.manifest()
    list(read(model, thawed, text(23), READ))
    list(read(model, memory, text(23), READ))
    assert same_bytes(thawed.bank.rows, memory.bank.rows)


def test_growing_twice_is_noted(model_of: ModelOf, tmp_path: Path) -> None:
    model = model_of("llama")
    memory = grow(after_a(model), model, text(7), 2)
    list(read(model, memory, text(19), READ))
    memory = grow(freeze(memory), model, text(7), 5)
    memory.save(tmp_path / "m.safetensors")
    memory = load(tmp_path / "m.safetensors", model)
    steps = [(s["rank"], s["after_tokens"]) for s in memory.provenance.settings["grow"]]
    assert steps == [(2, 43), (5, 62)]
    assert memory.bank.frozen.tolist() == [[4, 9]]
    assert main(["info", str(tmp_path / "m.safetensors")]) == 0


def test_a_bank_keeps_what_is_frozen() -> None:
    one, other = (Bank("mlp", "relu", 3, {1: 2, 5: 7}) for _ in range(2))
    one.frozen.copy_(torch.tensor([[1, 7]]))
    both = Bank.stack([other, one])
    assert both.frozen.tolist() == [[0, 0], [1, 7]]
    assert both.select(1).to(dtype=torch.float64).clone().frozen.tolist() == [[1, 7]]
    rows = both.frozen_rows()
    assert rows is not None
    assert rows[1].tolist() == [True, False] * 2 + [True] * 14
    assert not rows[0].any()
    assert other.frozen_rows() is None


@pytest.mark.parametrize(("frozen", "message"), [({"0": 4}, "slots are frozen, of"), ({"1": 1}, "1 is missing")])
def test_a_file_that_freezes_what_it_lacks_is_refused(
    frozen: dict[str, int], message: str, model_of: ModelOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = create(model_of("llama"), text(11), layers={0: 3}, start_id=START)
    manifest = memory.manifest() | {"frozen": frozen}
    monkeypatch.setattr(Memory, "manifest", lambda self: manifest)
    memory.save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m.safetensors")


def test_growth_that_cannot_be(model_of: ModelOf) -> None:
    memory = after_a(model_of("llama"))
    before = memory.bank.clone()
    with pytest.raises(ValueError, match="a memory grows by 1 slot or more; got 0"):
        grow(memory, model_of("llama"), text(11), 0)
    with pytest.raises(ValueError, match="has only 37; use a smaller rank"):
        grow(memory, model_of("llama"), text(11), 41)
    with pytest.raises(ValueError, match="made with the backbone"):
        grow(memory, tiny_model("llama", seed=1), text(11), 3)
    assert same_bytes(memory.bank.rows, before.rows)
    assert memory.bank.ranks == before.ranks


# -------------------------------------------------------------------- as a run


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_run_grows_freezes_stops_anywhere_and_goes_on(name: str, model_of: ModelOf, tmp_path: Path) -> None:
    backbone = tiny_backbone(model_of(name, torch.float32))
    first = Run(backbone, [make_text(backbone, 23, 0)], tmp_path / "a.safetensors", SETTINGS)
    run_to_end(first)
    changes = {"start_from": str(tmp_path / "a.safetensors"), "grow": 5, "freeze": True}
    grows = replace(SETTINGS, **changes)
    texts = [make_text(backbone, 31, 1), make_text(backbone, 17, 2)]
    whole = Run(backbone, texts, tmp_path / "whole.safetensors", grows)
    expected, figures = run_to_end(whole)
    assert whole.memory.bank.ranks == dict.fromkeys(range(3), 8)
    assert all(same_bytes(new, old) for new, old in old_part(whole.memory.bank, first.memory.bank))
    for stop in range(1, 6):
        output = tmp_path / "again.safetensors"
        run = Run(backbone, texts, output, grows)
        for count, _ in enumerate(run, start=1):
            if count == stop:
                break
        run.save_state()
        run = Run(backbone, texts, output, grows)
        assert run.resume()
        assert run_to_end(run) == (expected, figures)
    others = {Run(backbone, texts, output, replace(grows, **change)).key for change in ({"grow": 7}, {"freeze": False})}
    assert len(others | {whole.key}) == 3


def test_settings_that_make_no_sense(model_of: ModelOf, tmp_path: Path) -> None:
    backbone = tiny_backbone(model_of("llama", torch.float32))
    texts = [make_text(backbone, 23, 0)]
    with pytest.raises(ValueError, match="only a memory that exists can grow"):
        replace(SETTINGS, grow=3)
    with pytest.raises(ValueError, match="grows by 1 slot or more"):
        replace(SETTINGS, start_from="a", grow=-1)
    run_to_end(Run(backbone, texts, tmp_path / "a.safetensors", SETTINGS))
    with pytest.raises(ValueError, match=r"every slot of .*a\.safetensors is frozen.*--grow 32"):
        Run(backbone, texts, tmp_path / "b.safetensors",
            replace(SETTINGS, start_from=str(tmp_path / "a.safetensors"), freeze=True))  # fmt: skip


def test_the_command_line_names_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("Call me Ishmael.")
    assert main(["memorize", str(tmp_path / "a.txt"), "-o", str(tmp_path / "m.safetensors"), "--grow", "3"]) == 2
    assert "--memory FILE" in capsys.readouterr().err
