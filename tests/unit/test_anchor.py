"""Anchoring: values that solve the least-squares problem they are said to solve, and what a command says of them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import tiny_model
from helpers import START, memory_for, same_bytes, snapshot, text
from locas.anchor import anchored, own_text
from locas.attach import attached
from locas.backbone import load_backbone
from locas.cli import main
from locas.evaluate import learners
from locas.evaluate.forgetting import ForgettingSettings, book, configs, measure, unrelated_text
from locas.fit import part_of, sample_activations
from locas.forward import call
from locas.memory import Memory, Provenance, load
from locas.sites import fingerprint
from locas.stream import ReadSettings
from locas.text import collect

HERE, ELSEWHERE = text(97, seed=3), text(61, seed=4)


def a_memory(model: PreTrainedModel, layers: dict[int, int] | None = None) -> Memory:
    return Memory(memory_for(model, layers=layers), Provenance("tiny", fingerprint(model)), model)


def cost(model: PreTrainedModel, responder: Memory, values: dict[int, Tensor], strength: float) -> float:
    """What V' minimises, computed token by token from the text's activations with the old memory attached."""
    total = 0.0
    for ids, weight, zero in ((HERE, 1.0, False), (ELSEWHERE, strength, True)):
        for layer, a in sample_activations(model, responder.bank, ids, start_id=START).items():
            part = part_of(responder.bank, layer)
            difference = values[layer] if zero else values[layer] - part.v
            total += weight * float((part.responses(a.double()) @ difference).square().sum(dim=-1).mean())
    return total


def values_of(memory: Memory) -> dict[int, Tensor]:
    return {layer: part_of(memory.bank, layer).v for layer in memory.bank.layers}


@pytest.mark.parametrize("name", ["qwen3", "apertus", "gpt2"])
def test_the_values_cost_least_and_all_else_stays(name: str) -> None:
    model = tiny_model(name)
    memory, before = a_memory(model, {0: 3, 2: 5}), snapshot(model)
    found = anchored(memory, model, HERE, ELSEWHERE, 0.7, start_id=START)
    values = values_of(found.memory)
    least = cost(model, memory, values, 0.7)
    assert least < cost(model, memory, values_of(memory), 0.7)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        nearby = {k: v + 1e-3 * torch.randn(v.shape, generator=generator).to(v) for k, v in values.items()}
        assert least < cost(model, memory, nearby, 0.7)
    for layer in memory.bank.layers:
        one, other = memory.bank.slots(layer), found.memory.bank.slots(layer)
        assert same_bytes(one.k, other.k)
        assert one.g is None or (other.g is not None and same_bytes(one.g, other.g))
    assert 0 < found.difference < 1
    assert 0 < found.elsewhere < 1
    (note,) = found.memory.provenance.settings["anchor"]
    assert note == {
        "strength": 0.7, "text_tokens": 97, "other_tokens": 61,
        "difference": found.difference, "elsewhere": found.elsewhere,
    }  # fmt: skip
    after = snapshot(model)
    assert all(same_bytes(before[key], after[key]) for key in before)


def test_strength_is_a_dial_from_all_to_nothing() -> None:
    model = tiny_model("qwen3")
    memory = a_memory(model)
    found = [anchored(memory, model, HERE, ELSEWHERE, s, start_id=START) for s in (1e-9, 0.1, 1.0, 10.0, 1e9)]
    differences, elsewhere = [f.difference for f in found], [f.elsewhere for f in found]
    assert differences == sorted(differences)
    assert elsewhere == sorted(elsewhere, reverse=True)
    assert differences[0] < 1e-6
    assert elsewhere[-1] < 1e-6
    same = anchored(memory, model, HERE, HERE, 3.0, start_id=START)  # nothing tells the texts apart: a quarter is left
    assert same.elsewhere == pytest.approx(0.25, rel=1e-6)
    assert same.difference == pytest.approx(0.75, rel=1e-6)


def test_frozen_slots_stay_and_the_others_are_anchored_as_if_alone() -> None:
    model = tiny_model("qwen3")
    memory = a_memory(model, {0: 6, 1: 4})
    memory.bank.frozen[0] = torch.tensor([2, 4])
    found = anchored(memory, model, HERE, ELSEWHERE, 1.0, start_id=START)
    for layer, n in ((0, 2), (1, 4)):
        old, new = part_of(memory.bank, layer).v, part_of(found.memory.bank, layer).v
        assert same_bytes(old[:n], new[:n])
        assert n == len(old) or not torch.allclose(old[n:], new[n:])
    assert torch.equal(found.memory.bank.frozen, memory.bank.frozen)


def test_a_slot_that_answers_nowhere_keeps_its_value() -> None:
    model = tiny_model("apertus")
    memory = a_memory(model, {1: 4})
    memory.bank.slots(1).k[0, 2] = 0
    found = anchored(memory, model, HERE, ELSEWHERE, 1.0, start_id=START)
    old, new = part_of(memory.bank, 1).v, part_of(found.memory.bank, 1).v
    torch.testing.assert_close(new[2], old[2], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(new[0], old[0])


@pytest.mark.parametrize(
    ("strength", "others", "message"),
    [
        (0.0, ELSEWHERE, "strength of anchoring must be a positive number; got 0.0"),
        (float("nan"), ELSEWHERE, "strength of anchoring must be a positive number"),
        (1.0, ELSEWHERE[:3], r"two texts of 4 tokens or more, better thousands; got \[97, 3\]"),
    ],
)
def test_it_refuses(strength: float, others: Tensor, message: str) -> None:
    model = tiny_model("qwen3")
    with pytest.raises(ValueError, match=message):
        anchored(a_memory(model), model, HERE, others, strength, start_id=START)


# -------------------------------------------------------------------- the backbone's own text


@pytest.mark.parametrize("start_id", [START, None])
def test_own_text_is_seeded_of_the_length_asked_and_drawn_from_the_model(start_id: int | None) -> None:
    model = tiny_model("qwen3", dtype=torch.float32)
    state = torch.get_rng_state()
    seen: list[tuple[int, int]] = []
    one, other = (own_text(model, 700, start_id=start_id, seed=seed) for seed in (0, 1))
    two = own_text(model, 700, start_id=start_id, on_progress=lambda *at: seen.append(at))  # a look changes nothing
    assert seen == sorted(seen)
    assert (len(seen), seen[-1]) == (255, (700, 700))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.shape == (700,)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert (one[::256] == START).all() == (start_id is not None)
    with torch.no_grad():  # likelier under the model than what is drawn evenly
        losses = []
        for ids in (one[:256], torch.randint(int(one.max()) + 1, (256,), generator=torch.Generator().manual_seed(0))):
            logits = call(model, ids[None]).logits[0, :-1]
            losses.append(float(torch.nn.functional.cross_entropy(logits, ids[1:])))
    assert losses[0] < losses[1]
    with pytest.raises(ValueError, match="1 token or more; got 0"):
        own_text(model, 0)


def test_own_text_heeds_no_setting_of_the_model() -> None:
    model = tiny_model("qwen3", dtype=torch.float32)
    plain, config = own_text(model, 256, start_id=START), model.generation_config
    config.temperature, config.top_k, config.top_p, config.repetition_penalty = 0.1, 1, 0.2, 5.0
    assert torch.equal(own_text(model, 256, start_id=START), plain)
    config.eos_token_id = int(plain[7])
    assert not (own_text(model, 256, start_id=START) == plain[7]).any()  # no piece ends early


# -------------------------------------------------------------------- as a method, and as a command


def test_an_anchored_method_gains_less_and_changes_other_text_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "SAMPLE_TOKENS", 2_048)
    backbone, settings = load_backbone(), ForgettingSettings(later_tokens=128, unrelated_tokens=256)
    read = ReadSettings(window=64, chunk=32)
    folder = Path(__file__).parents[2]
    a, b = (collect([str(folder / name)])[0] for name in ("LICENSE", "LOG.md"))
    learnt, other = book(backbone, a, 512, settings), unrelated_text(backbone, b, settings)
    chosen = configs(backbone, ["locas", "locas:anchor=1", "locas:anchor=30"], [4], [1.0], read)
    assert [setup.anchor for _, setup in chosen] == [None, 1.0, 30.0]
    assert "anchor" not in chosen[0][1].record()
    assert chosen[1][1].record()["anchor"] == 1.0
    assert [setup.random for _, setup in chosen] == [False, True, True]
    points = [measure(backbone, learnt, [other], config, read, settings)["points"][0] for config, _ in chosen]
    assert points[0]["kl"] > points[1]["kl"] > points[2]["kl"] > 0
    assert points[0]["gain"] > points[2]["gain"] > 0
    with pytest.raises(ValueError, match="anchor must be a positive number, or none; got 'x'"):
        configs(backbone, ["locas:anchor=x"], [4], [1.0], read)
    with pytest.raises(ValueError, match="strength of anchoring must be a positive number; got -1"):
        configs(backbone, ["locas:anchor=-1"], [4], [1.0], read)


def test_the_command_says_what_is_left(read_memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, a = tmp_path / "kept.safetensors", str(read_memory / "a.txt")
    command = ["anchor", str(read_memory / "m.safetensors"), "-o", str(output), "--text", a]
    command += ["--tokens", "400", "--strength", "3"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["on_text"]["tokens"] == 400
    assert result["on_others"]["tokens"] == 100
    assert 0 < result["on_others"]["kl_after"] < 0.8 * result["on_others"]["kl_before"]
    assert 0 < result["on_text"]["gain_after"] < result["on_text"]["gain_before"]
    assert 0 < result["difference"] < 1
    (note,) = load(output).provenance.settings["anchor"]
    assert note["strength"] == 3
    assert note["text_tokens"] == note["other_tokens"] == 400
    assert main([*command, "--others", str(Path(__file__).parents[2] / "LOG.md")]) == 0
    assert "gain over no memory, on the text" in capsys.readouterr().out


def test_the_command_refuses_before_it_works(
    read_memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = read_memory / "a.txt"
    before, output = a.read_bytes(), str(tmp_path / "k.safetensors")
    rest = [str(read_memory / "m.safetensors"), "--text", str(a)]
    for more, message in (
        (["-o", output, "--strength", "0"], "must be a positive number; got 0"),
        (["-o", output, "--tokens", "7"], "--tokens must be 8 or more"),
        (["-o", str(a)], "is not a memory and would be overwritten"),
        (["-o", str(tmp_path / "no/k.safetensors")], "does not exist"),
    ):
        assert main(["anchor", *rest, *more]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert a.read_bytes() == before
    assert not list(tmp_path.iterdir())


def test_anchoring_changes_what_the_backbone_says_with_the_memory_only() -> None:
    model = tiny_model("llama")
    memory = a_memory(model)
    found = anchored(memory, model, HERE, ELSEWHERE, 1.0, start_id=START)
    ids = text(11)[None]
    with torch.no_grad():
        plain = call(model, ids).logits
        with attached(model, memory.bank):
            one = call(model, ids).logits
        with attached(model, found.memory.bank):
            two = call(model, ids).logits
        assert same_bytes(call(model, ids).logits, plain)
    assert not torch.equal(one, two)
