"""A memory with its provenance: made, read into, saved, loaded, attached; and refused where it does not belong."""

import gc
import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import locas
import locas.compose
from families import VOCAB, tiny_model
from helpers import START, fill, memory_for, same_bytes, snapshot, text
from locas.bank import Bank
from locas.initialise import InitSettings
from locas.memory import Memory, Provenance, create, load, read
from locas.sites import fingerprint
from locas.stream import ReadSettings
from locas.write import WriteSettings

READ = ReadSettings(window=29, chunk=11, write=WriteSettings(lr=0.1))
INIT = InitSettings(rank=3, tau_scale=8.0)
NAMED = replace(INIT, variant="glu", init="top-k", activation="silu")  # what "auto" is beside a Llama
families = pytest.mark.parametrize("family", ["llama", "gpt2"])
ModelOf = Callable[..., PreTrainedModel]


def learnt(model: PreTrainedModel, ids: Tensor, **more: object) -> Memory:
    memory = create(model, ids[:11], INIT, start_id=START, name="tiny", **more)  # type: ignore[arg-type]
    for _ in read(model, memory, ids, READ, start_id=START, name="a.txt"):
        pass
    return memory


@torch.no_grad()
def logits(model: PreTrainedModel, memory: Memory | None = None) -> Tensor:
    ids = text(13, seed=5)[None]
    if memory is None:
        return model(ids).logits
    with memory.attached(model):
        return model(ids).logits


def hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def sha(ids: Sequence[int]) -> str:
    return hashlib.sha256(b"".join(struct.pack("<q", i) for i in ids)).hexdigest()


# -------------------------------------------------------------------- strength


@families
def test_strength_is_a_dial_from_the_backbone_to_all_that_was_learnt(family: str, model_of: ModelOf) -> None:
    model = model_of(family, torch.float64)
    memory = learnt(model, text(41))
    before, plain, whole = memory.bank.clone(), logits(model), logits(model, memory)
    assert same_bytes(logits(model, memory.scaled(1)), whole)
    torch.testing.assert_close(logits(model, memory.scaled(0)), plain, rtol=0, atol=0)
    halves = locas.compose.compose([memory, memory], weights=[0.25, 0.25])
    torch.testing.assert_close(logits(model, memory.scaled(0.5)), logits(model, halves), rtol=1e-11, atol=1e-11)
    distances = [(logits(model, memory.scaled(s)) - plain).abs().max() for s in (0.25, 0.5, 0.75, 1)]
    assert distances == sorted(distances)
    assert same_bytes(memory.bank.rows, before.rows)
    assert same_bytes(memory.bank.tau, before.tau)


def test_strength_is_noted_with_the_memory(model_of: ModelOf, tmp_path: Path) -> None:
    model = model_of("llama", torch.float32)
    memory = learnt(model, text(41))
    memory.scaled(0.5).scaled(0.5).save(tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", model)
    assert loaded.provenance.settings["strength"] == 0.25
    assert torch.equal(loaded.bank.tau, memory.bank.tau / 4)
    assert "strength" not in memory.provenance.settings
    with pytest.raises(ValueError, match="strength must be a finite number, 1 as it was learnt; got nan"):
        memory.scaled(float("nan"))


# -------------------------------------------------------------------- there and back


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_memory_is_the_one_that_was_saved(
    family: str, dtype: torch.dtype, model_of: ModelOf, tmp_path: Path
) -> None:
    model = model_of(family, dtype)
    before, plain = snapshot(model), logits(model)
    memory = learnt(model, text(41))
    memory.save(tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", model)
    assert loaded.bank.layout() == memory.bank.layout()
    assert same_bytes(loaded.bank.rows, memory.bank.rows)
    assert same_bytes(loaded.bank.tau, memory.bank.tau)
    assert loaded.manifest() == memory.manifest()
    assert repr(loaded) == repr(memory)
    with_memory = logits(model, memory)
    assert not torch.equal(with_memory, plain)
    assert same_bytes(logits(model, loaded), with_memory)
    assert same_bytes(logits(model), plain)
    assert all(same_bytes(tensor, before[name]) for name, tensor in model.state_dict().items())
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


@families
def test_reading_on_after_loading_equals_never_having_stopped(family: str, model_of: ModelOf, tmp_path: Path) -> None:
    """As far as the memory's own file goes: the write rule's averages start afresh with every text."""
    model, first, second = model_of(family), text(23, seed=1), text(31, seed=2)
    memory = learnt(model, first)
    memory.save(tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", model)
    for one in (memory, loaded):
        for _ in read(model, one, second, READ, start_id=START, name="b.txt"):
            pass
    assert same_bytes(memory.bank.rows, loaded.bank.rows)
    assert memory.manifest() == loaded.manifest()
    assert [d.name for d in loaded.provenance.documents] == ["a.txt", "b.txt"]


def test_layers_and_their_ranks_survive(model_of: ModelOf, tmp_path: Path) -> None:
    model = model_of("llama")
    memory = learnt(model, text(23), layers={2: 5, 0: 2})
    memory.save(tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", model)
    assert loaded.bank.ranks == {0: 2, 2: 5}
    assert loaded.n_parameters == 3 * 22 * 7
    assert loaded.manifest()["ranks"] == {"0": 2, "2": 5}
    assert {n: tuple(t.shape) for n, t in loaded.tensors().items()} == {
        f"layers.{layer}.{part}": (rank, 22) for layer, rank in ((0, 2), (2, 5)) for part in ("gate", "key", "value")
    }
    for layer in (0, 2):
        assert same_bytes(loaded.tensors()[f"layers.{layer}.gate"], memory.bank.slots(layer).g[0])
        assert same_bytes(loaded.tensors()[f"layers.{layer}.key"], memory.bank.slots(layer).k[0])
        assert same_bytes(loaded.tensors()[f"layers.{layer}.value"], memory.bank.slots(layer).v[0])
    assert create(model, text(11), INIT, layers=[1]).bank.ranks == {1: 3}
    assert create(model, text(11), INIT, rank=2).bank.ranks == {0: 2, 1: 2, 2: 2}


def test_layers_do_not_change_places_in_the_file(tmp_path: Path) -> None:
    ranks = {0: 2, 2: 2, 10: 2, 11: 2}  # as texts, "10" sorts before "2"
    bank = fill(Bank("mlp", "relu", 5, ranks))
    Memory(bank, Provenance("x", "y")).save(tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors").bank
    assert list(loaded.ranks) == [0, 2, 10, 11]
    assert same_bytes(loaded.rows, bank.rows)
    assert same_bytes(loaded.tau, bank.tau)


# -------------------------------------------------------------------- provenance


def test_provenance_says_what_was_read_and_how(model_of: ModelOf, tmp_path: Path) -> None:
    model, ids = model_of("llama"), text(41)
    memory = learnt(model, ids, tokenizer_sha256="ef" * 32)
    assert memory.provenance == Provenance(
        backbone="tiny",
        backbone_fingerprint=fingerprint(model),
        tokenizer_sha256="ef" * 32,
        documents=memory.provenance.documents,
        settings={"init": asdict(NAMED), "read": asdict(READ)},
        library=locas.__version__,
    )
    (document,) = memory.provenance.documents
    assert (document.name, document.tokens, document.text_sha256) == ("a.txt", 41, None)
    assert document.ids_sha256 == sha(ids.tolist())
    memory.save(tmp_path / "m.safetensors")
    assert asdict(load(tmp_path / "m.safetensors").provenance) == asdict(memory.provenance)


def test_a_fresh_memory_has_read_nothing(model_of: ModelOf) -> None:
    memory = create(model_of("llama"), text(11), INIT)
    assert memory.provenance.documents == ()
    assert memory.provenance.settings == {"init": asdict(NAMED)}
    assert memory.provenance.backbone == "LlamaForCausalLM"
    assert "tokens_read=0" in repr(memory)


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("first_token", [0, 7])
def test_an_interrupted_read_notes_what_was_read(chunks: int, first_token: int, model_of: ModelOf) -> None:
    model, ids = model_of("llama"), text(41)
    memory = create(model, ids[:11], INIT)
    reading = read(model, memory, ids, READ, start_id=START, first_token=first_token, name="half")
    for _ in range(chunks):
        record = next(reading)
    reading.close()
    (document,) = memory.provenance.documents
    assert document.tokens == record.stop - first_token == 11 * chunks
    assert document.ids_sha256 == sha(ids[first_token : record.stop].tolist())


def test_a_read_that_is_dropped_or_breaks_is_noted_too(model_of: ModelOf) -> None:
    model, ids = model_of("llama"), text(41)
    memory = create(model, ids[:11], INIT)
    for record in read(model, memory, ids, READ):
        if record.stop >= 22:
            break
    gc.collect()
    assert [d.tokens for d in memory.provenance.documents] == [22]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    reading = read(model, memory, ids, READ)
    next(reading)
    handle = model.get_input_embeddings().register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        next(reading)
    handle.remove()
    assert [d.tokens for d in memory.provenance.documents] == [22, 11]
    assert hooks(model) == 0


def test_reading_without_learning_leaves_no_trace(model_of: ModelOf) -> None:
    model, ids = model_of("llama"), text(23)
    memory = learnt(model, ids)
    rows, provenance = memory.bank.rows.clone(), memory.provenance
    scored = torch.cat([r.nll for r in read(model, memory, ids, READ, start_id=START, learn=False)])
    assert scored.isfinite().all()
    assert same_bytes(memory.bank.rows, rows)
    assert memory.provenance is provenance
    reading = read(model, memory, ids, READ)
    reading.close()  # never begun
    assert memory.provenance is provenance


@pytest.mark.parametrize(
    "bad", [[], [[1, 2], [3, 4]], [1.5, 2.5], [1, VOCAB], [-1, 1]], ids=["empty", "two rows", "floats", "high", "low"]
)
def test_ids_that_are_none(bad: list[object], model_of: ModelOf) -> None:
    model = model_of("llama")
    memory = create(model, text(11), INIT)
    with pytest.raises(ValueError, match="document 0"):
        next(read(model, memory, bad, READ))  # type: ignore[arg-type]
    assert memory.provenance.documents == ()
    assert next(read(model, memory, [5, 7, 11], READ, start_id=START)).nll.shape == (3,)  # a list will do


# -------------------------------------------------------------------- where it does not belong


def other_backbones() -> dict[str, PreTrainedModel]:
    narrow = tiny_model("qwen2")
    shallow = tiny_model("llama", layers=2)
    return {"weights": tiny_model("llama", seed=1), "width": narrow, "layers": shallow, "family": tiny_model("gpt2")}


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("weights", r"made with the backbone 'tiny' \(fingerprint [0-9a-f]{12}\), but this model's FFN weights are"),
        ("width", r"hidden states of width 22, but Qwen2ForCausalLM has 20"),
        ("layers", r"layer"),
        ("family", r"made with the backbone 'tiny'"),
    ],
)
def test_another_backbone_is_refused_and_left_alone(
    which: str, message: str, model_of: ModelOf, tmp_path: Path
) -> None:
    other = other_backbones()[which]
    before = snapshot(other)
    memory = learnt(model_of("llama"), text(23))
    memory.save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m.safetensors", other)
    unchecked = load(tmp_path / "m.safetensors")
    for wrong in (memory, unchecked):
        with pytest.raises(ValueError, match=message):
            wrong.attached(other)
        with pytest.raises(ValueError, match=message):
            next(read(other, wrong, text(23), READ))
    assert hooks(other) == 0
    assert all(same_bytes(tensor, before[name]) for name, tensor in other.state_dict().items())
    with unchecked.attached(model_of("llama")) as attachment:
        assert attachment.bank is unchecked.bank
    assert [d.name for d in memory.provenance.documents] == ["a.txt"]


def test_a_memory_follows_its_backbone_into_another_precision(model_of: ModelOf, tmp_path: Path) -> None:
    model = tiny_model("llama", torch.bfloat16)
    memory = learnt(model, text(23))
    assert memory.bank.rows.dtype == torch.float32
    memory.save(tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", tiny_model("llama", torch.bfloat16).float())
    assert same_bytes(loaded.bank.rows, memory.bank.rows)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_memory_is_not_saved(value: float, model_of: ModelOf, tmp_path: Path) -> None:
    model = model_of("llama")
    memory = Memory(memory_for(model), Provenance("tiny", fingerprint(model)), model)
    path = tmp_path / "m.safetensors"
    memory.save(path)
    before = path.read_bytes()
    memory.bank.rows[0, 3, 4] = value
    with pytest.raises(ValueError, match="holds NaN or infinite numbers and was not saved"):
        memory.save(path)
    memory.bank.rows.fill_(1.0)
    memory.bank.tau[0, 1] = value
    with pytest.raises(ValueError, match="holds NaN or infinite numbers and was not saved"):
        memory.save(path)
    memory.bank.tau.fill_(1.0)
    memory.provenance = replace(memory.provenance, settings={"read": {"fill_eps": value}})
    with pytest.raises(ValueError, match="was not written: NaN or infinite numbers in its manifest"):
        memory.save(path)
    assert path.read_bytes() == before


def test_a_memory_is_one(model_of: ModelOf) -> None:
    with pytest.raises(ValueError, match=r"a memory is a bank of one; this bank holds 2 \(use bank.select\(i\)\)"):
        Memory(memory_for(model_of("llama"), size=2), Provenance("x", "y"))


def test_a_model_that_is_gone_is_not_taken_for_another(tmp_path: Path) -> None:
    """The memory remembers its model weakly: another one at the same address is checked again."""
    model = tiny_model("llama")
    memory = create(model, text(11), INIT)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="FFN weights are others"):
        memory.check(tiny_model("llama", seed=1))
    memory.check(tiny_model("llama"))
