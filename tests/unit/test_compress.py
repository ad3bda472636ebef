"""Compressing: exact where it can be, measured where it cannot, the same for any sign of a singular vector."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import tiny_model
from helpers import START, memory_for, same_bytes, text
from locas.bank import ACTIVATIONS, Bank
from locas.cli import main
from locas.compress import METHODS, Method, compress, eliminate, nl_svd, reduce
from locas.cycle import CycleRun, read_and_compress
from locas.fit import Part, part_of, sample_activations
from locas.grow import freeze, grow, thaw
from locas.initialise import InitSettings
from locas.memory import Memory, Provenance, create, load, read
from locas.sites import find_sites, fingerprint
from locas.stream import ReadSettings
from runs import SETTINGS, make_text, run_to_end
from tokens import tiny_backbone

ModelOf = Callable[..., PreTrainedModel]
GLU: list[Method] = ["eliminate", "distil", "refit", "merge", "prune"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_memory(model: PreTrainedModel, layers: dict[int, int], seed: int = 0) -> Memory:
    return Memory(memory_for(model, layers=layers, seed=seed), Provenance("tiny", fingerprint(model)), model)


def part(variant: str, activation: str = "silu", rank: int = 11, d_model: int = 7) -> Part:
    k, g, v = random(rank, d_model), random(rank, d_model, seed=1), random(rank, d_model, seed=2)
    return Part(k, g if variant == "glu" else None, v, ACTIVATIONS[activation])


def error(new: Part, old: Part, a: Tensor) -> float:
    truth = old.responses(a) @ old.v
    return float((new.responses(a) @ new.v - truth).norm() / truth.norm())


# -------------------------------------------------------------------- NL-SVD


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_nl_svd_is_exact_on_its_probes(activation: str, rank: int) -> None:
    old = part("mlp", activation)
    k, v = nl_svd(old.k, old.v, old.act, rank)
    assert k.shape == v.shape == (rank, 7)
    torch.testing.assert_close(k @ k.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    new = replace(old, k=k, v=v)
    torch.testing.assert_close(new.responses(k) @ new.v, old.responses(k) @ old.v, rtol=1e-10, atol=1e-12)


def test_nl_svd_takes_the_leading_directions_of_the_weighted_keys() -> None:
    old = part("mlp", "relu")
    k, _ = nl_svd(old.k, old.v, old.act, 3)
    weighted = old.v.norm(dim=-1, keepdim=True) * old.k
    values, vectors = torch.linalg.eigh(weighted.T @ weighted)  # the paper's way: the Gram matrix's eigenvectors
    leading = vectors[:, values.argsort(descending=True)[:3]].T
    torch.testing.assert_close((k * leading).sum(-1).abs(), torch.ones(3, dtype=torch.float64), rtol=1e-9, atol=0)


def test_nl_svd_of_orthonormal_relu_slots_is_the_memory_itself() -> None:
    """Their probes are the keys, with the sign at which they fire: minus a key answers nothing."""
    q = torch.linalg.qr(random(7, 7))[0][:5]
    v = random(5, 7, seed=3)
    v = v / v.norm(dim=-1, keepdim=True) * torch.tensor([[5.0], [4.0], [3.0], [2.0], [1.0]], dtype=torch.float64)
    for flipped in (q, -q):
        k, values = nl_svd(flipped, v, ACTIVATIONS["relu"], 5)
        torch.testing.assert_close(k, flipped, rtol=0, atol=1e-12)
        torch.testing.assert_close(values, v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "relu2"])
def test_nl_svd_does_not_depend_on_the_sign_that_the_decomposition_returns(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = part("mlp", activation)
    expected = nl_svd(old.k, old.v, old.act, 5)
    svd = torch.linalg.svd

    def turned(x: Tensor, **more: bool) -> tuple[Tensor, Tensor, Tensor]:
        u, s, right = svd(x, **more)
        signs = torch.tensor([1.0, -1.0] * 4, dtype=x.dtype)[: len(right), None]
        return u * signs.T, s, right * signs

    monkeypatch.setattr(torch.linalg, "svd", turned)
    for one, other in zip(expected, nl_svd(old.k, old.v, old.act, 5), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_nl_svd_drops_directions_that_say_nothing() -> None:
    k = random(5, 7)
    k = torch.cat([k, k[:2] * 3, torch.zeros(4, 7, dtype=torch.float64)])
    probes, values = nl_svd(k, random(11, 7, seed=4), ACTIVATIONS["relu"], 11)
    assert probes.shape == values.shape == (5, 7)
    assert nl_svd(k.float(), random(11, 7), ACTIVATIONS["relu"], 11)[0].dtype == torch.float64
    empty, nothing = nl_svd(torch.zeros(3, 7), torch.zeros(3, 7), ACTIVATIONS["relu"], 2)
    assert empty.shape == (1, 7)
    assert not nothing.any()


# -------------------------------------------------------------------- methods for both


@pytest.mark.parametrize("variant", ["glu", "mlp"])
def test_elimination_takes_the_cheapest_step_each_time(variant: str) -> None:
    """Against the slow way: fit all others anew for every slot that could go."""
    old, a = part(variant), random(101, 7, seed=9)
    m, truth = old.responses(a), old.responses(a) @ old.v
    left = list(range(11))
    while len(left) > 4:
        costs = []
        for j in left:
            rest = [i for i in left if i != j]
            w = torch.linalg.lstsq(m[:, rest], truth).solution
            costs.append(float((m[:, rest] @ w - truth).square().sum()))
        left.remove(left[costs.index(min(costs))])
        assert eliminate(m, old.v, len(left)).tolist() == left


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["glu", "mlp"])
def test_slots_that_are_not_needed_cost_nothing(variant: str, method: Method) -> None:
    """Slots with zero values, and (where the choice sees them) doubles, go without a trace."""
    if method.startswith("nl-svd"):
        return  # its slots are new ones: see above
    old, a = part(variant, rank=5), random(101, 7, seed=9)
    silent = replace(part(variant, rank=3), k=random(3, 7, seed=7), v=torch.zeros(3, 7, dtype=torch.float64))
    pieces = [old, silent, *([] if method in ("prune", "refit") else [old.take(torch.tensor([0, 3]))])]
    both = Part(*(None if old.k is None or (name == "g" and old.g is None) else
                  torch.cat([getattr(p, name) for p in pieces]) for name in "kgv"), old.act)  # type: ignore[arg-type]  # fmt: skip
    new = reduce(both, a, 5, method)
    if method != "merge":  # it may join a silent slot with one that speaks before it joins the doubles
        assert error(new, both, random(53, 7, seed=10)) < 1e-6
    assert error(reduce(both, a, 7, method), both, random(53, 7, seed=10)) < (0.5 if method == "merge" else 1e-6)


@pytest.mark.parametrize("variant", ["glu", "mlp"])
def test_fitting_is_never_worse_on_what_it_is_fitted_to(variant: str) -> None:
    old, a = part(variant), random(211, 7, seed=9)
    errors = {method: error(reduce(old, a, 5, method), old, a) for method in GLU}
    assert errors["refit"] < errors["prune"]
    assert errors["distil"] <= errors["eliminate"] < 1
    assert errors["distil"] < errors["eliminate"] * 0.98  # keys that move find more
    if variant == "mlp":
        svd = {method: error(reduce(old, a, 5, method), old, a) for method in ("nl-svd", "nl-svd-refit")}
        assert svd["nl-svd-refit"] < svd["nl-svd"]
    more = [error(reduce(old, a, rank, "eliminate"), old, a) for rank in (2, 4, 6, 8, 10)]
    assert more == sorted(more, reverse=True)


def test_merging_sees_through_the_sign_of_a_gated_key() -> None:
    old, a = part("glu", rank=5), random(101, 7, seed=9)
    double = replace(old, k=torch.cat([old.k, -old.k[:2]]), g=torch.cat([old.g, old.g[:2]]),
                     v=torch.cat([old.v, old.v[:2] * 0.5]))  # fmt: skip
    assert error(reduce(double, a, 5, "merge"), double, random(53, 7, seed=10)) < 1e-6


# -------------------------------------------------------------------- whole memories


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "bloom", "qwen3_moe"])
def test_the_measured_error_is_that_of_the_attached_memory(name: str, model_of: ModelOf) -> None:
    """Against the functions themselves on the last quarter of the activations."""
    model = model_of(name)
    memory = a_memory(model, {0: 11, 2: 3})
    ids = text(97)
    before = memory.bank.clone()
    small = compress(memory, model, ids, 5, start_id=START)
    assert small.memory.bank.ranks == {0: 5, 2: 3}
    assert small.tokens == 97
    assert same_bytes(memory.bank.rows, before.rows)
    samples = sample_activations(model, memory.bank, ids, start_id=START)
    with torch.no_grad():
        for layer, expected in small.errors.items():
            a = samples[layer][int(97 * 0.75) :][None]
            truth = memory.bank.read(layer, a)
            found = float((small.memory.bank.read(layer, a) - truth).norm() / truth.norm())
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert small.errors[2] < 1e-12
    assert 0 < small.errors[0] < 1
    assert small.memory.bank.rows.norm(dim=-1).max() <= max(1.0, float(before.rows.norm(dim=-1).max())) + 1e-12
    (note,) = small.memory.provenance.settings["compress"]
    assert (note["method"], note["rank"], note["from"]) == ("eliminate", 5, 11)


def test_activations_are_those_of_the_text_in_order_with_the_memory_in_place(model_of: ModelOf) -> None:
    model = model_of("llama")
    bank = memory_for(model, layers={1: 3})
    ids = text(151)  # two windows of 130 tokens and the start token
    found = sample_activations(model, bank, ids, start_id=START)[1]
    assert found.shape == (151, 22)
    site, seen = find_sites(model, [1])[1], []
    from locas.attach import attached

    with attached(model, bank), torch.no_grad():
        handle = site.entry.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0, 1:]))
        model(torch.cat([torch.tensor([START]), ids[:130]])[None])
        model(torch.cat([torch.tensor([START]), ids[130:]])[None])
        handle.remove()
    torch.testing.assert_close(found, torch.cat(seen), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compressed_memory_saves_loads_and_reads_on(dtype: torch.dtype, model_of: ModelOf, tmp_path: Path) -> None:
    model = model_of("llama", dtype)
    memory = create(model, text(11), InitSettings(rank=7), start_id=START)
    list(read(model, memory, text(61), ReadSettings(window=29, chunk=11), start_id=START))
    small = compress(memory, model, text(61), 3, start_id=START).memory
    assert small.bank.rows.dtype == torch.float32
    small.save(tmp_path / "small.safetensors")
    again = load(tmp_path / "small.safetensors", model)
    assert same_bytes(again.bank.rows, small.bank.rows)
    assert [d.tokens for d in again.provenance.documents] == [61]
    list(read(model, again, text(31, seed=1), ReadSettings(window=29, chunk=11), start_id=START))
    assert main(["info", str(tmp_path / "small.safetensors")]) == 0


def test_a_value_that_comes_out_long_raises_tau(model_of: ModelOf) -> None:
    """Five slots alike, each with a value of length 1: the one that is left answers for all of them."""
    model = model_of("gpt2")
    bank = Bank("mlp", find_sites(model)[0].activation, 22, {1: 5}, dtype=torch.float64)
    bank.slots(1).k.copy_(random(22) / 22**0.5)
    bank.slots(1).v.copy_(torch.nn.functional.normalize(random(22, seed=1), dim=0))
    bank.tau.fill_(0.3)
    memory = Memory(bank, Provenance("tiny", fingerprint(model)), model)
    small = compress(memory, model, text(53), 1, start_id=START)
    assert float(small.memory.bank.tau) == pytest.approx(1.5, rel=1e-6)
    assert small.error < 1e-6
    assert float(small.memory.bank.slots(1).v.norm()) == pytest.approx(1.0)


def test_it_is_the_same_every_time(model_of: ModelOf) -> None:
    model = model_of("llama", torch.float32)
    memory = create(model, text(11), InitSettings(rank=7))
    list(read(model, memory, text(61), ReadSettings(window=29, chunk=11)))
    for method in GLU:
        seen: list[tuple[int, int]] = []
        one = compress(memory, model, text(61), 3, method=method).memory.bank.rows
        other = compress(
            memory, model, text(61), 3, method=method, on_progress=lambda *at, seen=seen: seen.append(at)
        ).memory.bank.rows
        assert seen == [(i + 1, len(memory.bank.layers)) for i in range(len(memory.bank.layers))]
        assert same_bytes(one, other), method


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_frozen_slots_stay_frozen_and_as_they_are(name: str, model_of: ModelOf, tmp_path: Path) -> None:
    model = model_of(name, torch.float32)
    memory = create(model, text(11), InitSettings(rank=5, tau_scale=8.0, init="random-rows"), layers={0: 5, 2: 3})
    list(read(model, memory, text(61), ReadSettings(window=29, chunk=11)))
    memory = grow(freeze(memory), model, text(13), 7, InitSettings(init="random-rows"))
    list(read(model, memory, text(61, seed=1), ReadSettings(window=29, chunk=11)))
    methods = [m for m in METHODS if name == "gpt2" or not m.startswith("nl-svd")]
    for method in methods:
        small = compress(memory, model, text(97), 8, method=method).memory
        assert small.bank.ranks == {0: 8, 2: 8}
        assert small.frozen == memory.frozen == {"0": 5, "2": 3}
        for i, layer in enumerate(small.bank.layers):
            now, then, n = small.bank.slots(layer), memory.bank.slots(layer), int(memory.bank.frozen[0, i])
            doubled = float(small.bank.tau[0, i] / memory.bank.tau[0, i])
            assert doubled in (1.0, 2.0, 4.0, 8.0)
            assert same_bytes(now.k[:, :n], then.k[:, :n])
            assert same_bytes(now.v[:, :n] * doubled, then.v[:, :n])
            if now.g is not None and then.g is not None:
                assert same_bytes(now.g[:, :n], then.g[:, :n])
    small.save(tmp_path / "small.safetensors")
    assert load(tmp_path / "small.safetensors", model).frozen == memory.frozen
    with pytest.raises(ValueError, match=r"5 slots of a layer are frozen .* 5 slots leave no room.*--thaw"):
        compress(memory, model, text(97), 5)
    assert compress(thaw(memory), model, text(97), 5).memory.bank.ranks == {0: 5, 2: 5}


def test_what_cannot_be_compressed(model_of: ModelOf) -> None:
    model = model_of("llama")
    memory = a_memory(model, {0: 5, 2: 3})
    for arguments, message in (
        ((text(31), 5), "this memory has 5 slots a layer; compress to 1 or more, and fewer"),
        ((text(31), 0), "compress to 1 or more"),
        ((text(3), 2), "gives 3 activations to look at"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(memory, model, *arguments)
    with pytest.raises(ValueError, match=r"nl-svd is for Locas-MLP.*use eliminate"):
        compress(memory, model, text(31), 2, method="nl-svd")
    with pytest.raises(ValueError, match="method 'best' is not one of eliminate"):
        compress(memory, model, text(31), 2, method="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="made with the backbone"):
        compress(memory, tiny_model("llama", seed=1), text(31), 2)


# -------------------------------------------------------------------- the cycle


def test_the_cycle_fills_compresses_and_fills_again(model_of: ModelOf) -> None:
    model = model_of("gpt2", torch.float32)
    memory = create(model, text(11), InitSettings(rank=29, init="step-wise", tau_scale=1.0), start_id=START)
    settings = ReadSettings(window=29, chunk=11)
    before, steps = None, []
    for step in read_and_compress(model, memory, text(89), 7, settings, start_id=START):
        steps.append((step.compressed, step.record.filled))
        if len(steps) == 2:
            before = memory.bank.clone()
        if len(steps) == 3:
            break
    assert steps == [(False, 11), (False, 11), (True, 11)]
    assert before is not None
    for layer in memory.bank.layers:
        was, now = part_of(before, layer), memory.bank.slots(layer)
        k, v = nl_svd(was.k, was.v, was.act, 7)
        torch.testing.assert_close(now.k[0, :7].double(), k, rtol=1e-5, atol=1e-6)
        tau = before.tau[0, layer].double()
        torch.testing.assert_close(now.v[0, :7].double() * tau, v, rtol=1e-4, atol=1e-6)
        assert now.k[0, 7:18].any(dim=-1).all()
        assert not now.k[0, 18:].any()
    assert [d.tokens for d in memory.provenance.documents] == [33]


def test_the_layer_with_least_room_decides_when_the_cycle_compresses(model_of: ModelOf) -> None:
    model = model_of("gpt2", torch.float32)
    memory = create(model, text(11), InitSettings(rank=29, init="step-wise", tau_scale=1.0), start_id=START)
    first = memory.bank.layers[0]
    memory.bank.slots(first).k[0, :12] = 1.0  # 17 are left of its 29
    memory.bank.slots(first).v[0, :12] = 0.01
    settings = ReadSettings(window=29, chunk=11)
    steps = [
        (step.compressed, step.record.filled)
        for step in read_and_compress(model, memory, text(33), 7, settings, start_id=START)
    ]
    assert steps == [(False, 11), (True, 11), (False, 11)]


def test_the_cycle_scores_what_the_reader_scores_until_it_is_full(model_of: ModelOf) -> None:
    model = model_of("gpt2", torch.float32)
    settings = ReadSettings(window=29, chunk=11)
    init = InitSettings(rank=29, init="step-wise", tau_scale=1.0)
    one, other = (create(model, text(11), init, start_id=START) for _ in range(2))
    cycled = [s.record.nll for s in read_and_compress(model, one, text(89), 7, settings, start_id=START)]
    plain = [r.nll for r in read(model, other, text(89), settings, start_id=START)]
    assert all(same_bytes(x, y) for x, y in zip(cycled[:3], plain[:3], strict=False)) is False
    assert all(same_bytes(x, y) for x, y in zip(cycled[:2], plain[:2], strict=True))
    assert len(cycled) == len(plain) == 9
    assert all(x.isfinite().all() for x in cycled)


def test_a_cycle_that_cannot_be(model_of: ModelOf) -> None:
    model = model_of("gpt2", torch.float32)
    memory = create(model, text(11), InitSettings(rank=5), start_id=START)
    with pytest.raises(ValueError, match=r"compressing 5 slots \(the memory's capacity\) to 5 leaves no room"):
        next(read_and_compress(model, memory, text(31), 5))
    gated = create(model_of("llama"), text(11), InitSettings(rank=5))
    with pytest.raises(ValueError, match="is for Locas-MLP"):
        next(read_and_compress(model_of("llama"), gated, text(31), 3))
    memory.bank.frozen.fill_(2)
    with pytest.raises(ValueError, match="thaw them first"):
        next(read_and_compress(model, memory, text(31), 3))


@pytest.mark.parametrize("start", [False, True])
def test_a_run_of_the_cycle_stops_anywhere_and_goes_on(start: bool, model_of: ModelOf, tmp_path: Path) -> None:
    backbone = tiny_backbone(model_of("gpt2", torch.float32))
    settings = replace(SETTINGS, init=InitSettings(rank=23, tau_scale=1.0), cycle=5)
    texts = [make_text(backbone, 61, 1), make_text(backbone, 17, 2)]
    if start:  # goes on with a memory that is full
        first = CycleRun(backbone, [make_text(backbone, 29, 3)], tmp_path / "a.safetensors", settings)
        run_to_end(first)
        settings = replace(settings, start_from=str(tmp_path / "a.safetensors"))
    whole = CycleRun(backbone, texts, tmp_path / "whole.safetensors", settings)
    expected = run_to_end(whole)
    assert whole.memory.provenance.settings["cycle"] == {"rank": 5}
    memory = (
        load(tmp_path / "a.safetensors", backbone.model)
        if start
        else create(backbone.model, texts[0].ids[:11], settings.init, start_id=backbone.start_id)
    )
    steps = []
    for each in texts:
        steps += list(read_and_compress(backbone.model, memory, each.ids, 5, settings.read, start_id=backbone.start_id))
    assert sum(step.compressed for step in steps) >= 2
    assert same_bytes(memory.bank.rows, whole.memory.bank.rows)
    n = sum(1 for _ in CycleRun(backbone, texts, tmp_path / "n.safetensors", settings))
    for stop in range(1, n):
        run = CycleRun(backbone, texts, tmp_path / "again.safetensors", settings)
        for count, _ in enumerate(run, start=1):
            if count == stop:
                break
        run.save_state()
        run = CycleRun(backbone, texts, tmp_path / "again.safetensors", settings)
        assert run.resume()
        assert run_to_end(run) == expected
    gated = tiny_backbone(model_of("llama", torch.float32))
    with pytest.raises(ValueError, match="is for Locas-MLP"):
        CycleRun(gated, texts, tmp_path / "b.safetensors", replace(settings, start_from=None))
    with pytest.raises(ValueError, match="the cycle leaves 1 slot or more"):
        replace(settings, cycle=-1)


# -------------------------------------------------------------------- command line


def test_the_command_says_how_much_survives(read_memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = read_memory
    command = ["compress", str(folder / "m.safetensors"), "-o", str(folder / "s.safetensors"), "--rank", "4",
               "--text", str(folder / "a.txt")]  # fmt: skip
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rank"] == 4
    assert result["parameters_before"] == 2 * result["parameters"]
    without, before, after = (result[name]["nll"] for name in ("without", "before", "after"))
    assert result["gain_nats"] == pytest.approx(without - before)
    assert result["gain_left_nats"] == pytest.approx(without - after)
    assert result["gain_left_share"] == pytest.approx((without - after) / (without - before))
    assert 0.3 < result["gain_left_share"] < 1
    assert 0 < result["function_error"] < 1
    assert result["tokens"] > 400
    assert load(folder / "s.safetensors").bank.ranks == dict.fromkeys(range(6), 4)
    assert main(["score", str(folder / "a.txt"), "--memory", str(folder / "s.safetensors"), "--json"]) == 0
    capsys.readouterr()
    assert main(command) == 0
    assert "after" in capsys.readouterr().out


def test_the_command_refuses_before_it_works(read_memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory, rest = str(read_memory / "m.safetensors"), ["--text", str(read_memory / "a.txt")]
    assert main(["compress", memory, "-o", str(read_memory / "no/s.safetensors"), "--rank", "4", *rest]) == 2
    assert "does not exist; create it" in capsys.readouterr().err
    assert main(["compress", memory, "-o", str(read_memory / "t.safetensors"), "--rank", "8", *rest]) == 2
    assert "this memory has 8 slots a layer" in capsys.readouterr().err
    assert not (read_memory / "t.safetensors").exists()
    before = (read_memory / "a.txt").read_bytes()
    assert main(["compress", memory, "-o", str(read_memory / "a.txt"), "--rank", "4", *rest]) == 2
    assert "is not a memory and would be overwritten" in capsys.readouterr().err
    assert (read_memory / "a.txt").read_bytes() == before


def test_the_cycle_and_thawing_on_the_command_line(read_memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = read_memory
    size = ["--window", "64", "--chunk", "32", "--max-tokens", "160"]
    command = ["memorize", str(folder / "a.txt"), "-o", str(folder / "c.safetensors"), *size, "--rank", "48"]
    assert main([*command, "--cycle", "8"]) == 2
    assert "is for Locas-MLP; make the memory with variant mlp" in capsys.readouterr().err
    assert main([*command, "--variant", "mlp", "--cycle", "48"]) == 2
    assert "leaves no room" in capsys.readouterr().err
    assert main([*command, "--variant", "mlp", "--cycle", "8", "--batch", "2"]) == 2
    assert "--cycle and --batch do not go together" in capsys.readouterr().err
    assert main([*command, "--variant", "mlp", "--cycle", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 160
    memory = load(folder / "c.safetensors")
    assert memory.provenance.settings["cycle"] == {"rank": 8}
    freeze(memory).save(folder / "f.safetensors")
    capsys.readouterr()
    onwards = ["memorize", str(folder / "a.txt"), *size, "--memory", str(folder / "f.safetensors")]
    assert main([*onwards, "-o", str(folder / "g.safetensors")]) == 2
    assert "--thaw" in capsys.readouterr().err
    assert main([*onwards, "--freeze", "--thaw", "-o", str(folder / "g.safetensors")]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert main([*onwards, "--thaw", "-o", str(folder / "g.safetensors")]) == 0
    assert not any(load(folder / "g.safetensors").frozen.values())
    assert main(["memorize", str(folder / "a.txt"), "--thaw", "-o", str(folder / "g.safetensors")]) == 2
    assert "thawed: name it (--memory FILE)" in capsys.readouterr().err
