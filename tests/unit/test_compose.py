"""Composing: one memory that reads as several do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny_model
from helpers import START, fill, memory_for, same_bytes, text
from locas.attach import attached
from locas.bank import Bank
from locas.cli import main
from locas.compose import compose, split, subtract
from locas.composed_fit import FitSettings
from locas.grow import freeze, grow, thaw
from locas.initialise import InitSettings
from locas.memory import DocumentRead, Memory, Provenance, create, load, read
from locas.stream import ReadSettings

D_MODEL = 5


def memory(ranks: dict[int, int], seed: int, dtype: torch.dtype = torch.float32, **more: Any) -> Memory:
    shape = {"variant": "glu", "activation": "silu", "d_model": D_MODEL} | more
    known = {"backbone": "tiny", "backbone_fingerprint": "ab" * 32, "tokenizer_sha256": None}
    documents = (DocumentRead(f"{seed}.txt", 11, "0" * 64),)
    provenance = Provenance(**(known | {k: shape.pop(k) for k in known if k in shape}), documents=documents)
    return Memory(fill(Bank(**shape, ranks=ranks, dtype=dtype), seed), provenance)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_composed_is_attached_one_beside_the_other(name: str) -> None:
    model, ids = tiny_model(name), text(13)[None]
    banks = [memory_for(model, layers=layers, seed=i) for i, layers in enumerate(({0: 3, 2: 5}, {0: 2, 1: 7}, {2: 1}))]
    both = compose([Memory(bank, Provenance("tiny", "ab" * 32)) for bank in banks])
    assert both.bank.ranks == {0: 5, 1: 7, 2: 6}
    with torch.no_grad():
        with attached(model, banks[0]), attached(model, banks[1]), attached(model, banks[2]):
            wanted = model(ids).logits
        with attached(model, both.bank):
            torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-12, atol=1e-12)


def test_what_is_exact_and_what_is_rounded_once() -> None:
    one, two = memory({3: 2}, 0), memory({3: 7}, 1)
    one.bank.tau.fill_(0.3)
    two.bank.tau.fill_(0.7)
    both, old, new = compose([one, two]).bank.slots(3), one.bank.slots(3), two.bank.slots(3)
    assert same_bytes(both.k, torch.cat([old.k, new.k], 1))
    assert same_bytes(both.g, torch.cat([old.g, new.g], 1))
    assert same_bytes(both.v[:, 2:], new.v)  # it has the largest tau
    factor = one.bank.tau.double() / two.bank.tau.double()
    exact = old.v.double() * factor
    assert ((both.v[:, :2].double() - exact).abs() <= 2**-24 * exact.abs()).all()
    assert (both.v[:, :2].double().norm(dim=-1) <= old.v.double().norm(dim=-1)).all()
    one.bank.tau.fill_(0.7 / 4)  # a power of two below: exact again
    assert same_bytes(compose([one, two]).bank.slots(3).v[:, :2], old.v / 4)
    one.bank.tau.fill_(0.0)
    two.bank.tau.fill_(0.0)
    assert same_bytes(compose([one, two]).bank.slots(3).v[:, :2], old.v)


def test_a_composed_file_says_where_it_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = memory({0: 2}, 0, tokenizer_sha256="cd" * 32)
    parts = [one, memory({0: 3, 1: 5}, 1, torch.float64)]
    for part, name in zip(parts, "ab", strict=True):
        part.save(tmp_path / name)
    command = ["compose", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "c")]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    both = load(tmp_path / "c")
    assert result["ranks"] == {"0": 5, "1": 5}
    assert both.bank.rows.dtype == torch.float64
    assert [document.name for document in both.provenance.documents] == ["0.txt", "1.txt"]
    assert both.provenance.tokenizer_sha256 == "cd" * 32
    assert [part["ranks"] for part in both.provenance.settings["compose"]["parts"]] == [{"0": 2}, {"0": 3, "1": 5}]
    assert main(command) == 0
    assert "rank 5 on 2 layers" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "c")]) == 0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"variant": "mlp"}, "variant"),
        ({"activation": "relu"}, "activation"),
        ({"d_model": 7}, "width"),
        ({"backbone_fingerprint": "ba" * 32}, "backbone"),
        ({"tokenizer_sha256": "ba" * 32}, "tokenizer"),
    ],
)
def test_memories_that_do_not_fit_together(change: dict[str, Any], what: str) -> None:
    one = memory({0: 2}, 0, tokenizer_sha256="ab" * 32)
    with pytest.raises(ValueError, match=f"memory 2 has another {what} than memory 1"):
        compose([one, memory({0: 2}, 0, **change)])
    with pytest.raises(ValueError, match="no memory to compose"):
        compose([])


# -------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_scale_what_each_part_adds(name: str) -> None:
    model = tiny_model(name)
    layers: list[dict[int, int]] = [{0: 3, 2: 5}, {0: 2, 1: 7}]
    banks = [memory_for(model, layers=ranks, seed=i) for i, ranks in enumerate(layers)]
    parts = [Memory(bank, Provenance("tiny", "ab" * 32)) for bank in banks]
    a = torch.randn(1, 11, banks[0].d_model, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    both = compose(parts, weights=[0.3, -1.7])
    for layer in (0, 1, 2):
        wanted = sum(w * b.read(layer, a) for w, b in zip((0.3, -1.7), banks, strict=True) if layer in b.ranks)
        torch.testing.assert_close(both.bank.read(layer, a), wanted, rtol=1e-12, atol=1e-12)
    assert [part["weight"] for part in both.provenance.settings["compose"]["parts"]] == [0.3, -1.7]
    silent = compose(parts, weights=[0, 0])
    assert not any(silent.bank.read(layer, a).any() for layer in (0, 1, 2))
    for weights, message in (
        ([1.0], "2 memories need as many weights; got 1"),
        ([1.0, float("nan")], "weights must be finite numbers; got .*nan"),
    ):
        with pytest.raises(ValueError, match=message):
            compose(parts, weights=weights)


# -------------------------------------------------------------------- frozen slots


def test_frozen_slots_stay_frozen_and_the_sum_stays_exact() -> None:
    model, ids = tiny_model("llama"), text(61)
    parts = [create(model, text(11, seed=i), InitSettings(rank=r, tau_scale=4.0)) for i, r in enumerate((3, 5, 2))]
    for i, part in enumerate(parts):
        fill(part.bank, i)
    parts[0] = grow(freeze(parts[0]), model, text(13), 2)
    parts[2] = freeze(parts[2])
    fill(parts[0].bank, 7)
    for part in parts:
        part.bank.tau.fill_(0.5)
    both = compose(parts)
    assert both.frozen == {"0": 5, "1": 5, "2": 5}
    with torch.no_grad():
        with attached(model, parts[0].bank), attached(model, parts[1].bank), attached(model, parts[2].bank):
            wanted = model(ids[None]).logits
        with attached(model, both.bank):
            torch.testing.assert_close(model(ids[None]).logits, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(split(both), parts, strict=True):
        assert same_bytes(one.bank.rows, other.bank.rows)
        assert one.frozen == other.frozen
    before = both.bank.clone()
    list(read(model, both, ids, ReadSettings(window=29, chunk=11), start_id=START))
    for layer in before.layers:
        for now, then in zip((both.bank.slots(layer).v, both.bank.slots(layer).k),
                             (before.slots(layer).v, before.slots(layer).k), strict=True):  # fmt: skip
            assert same_bytes(now[:, :5], then[:, :5])
            assert not torch.equal(now[:, 5:], then[:, 5:])
    assert not any(thaw(both).frozen.values())


# -------------------------------------------------------------------- taking apart


def test_subtracting_gives_the_file_that_was_there_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks: list[dict[int, int]] = [{0: 2, 3: 5}, {0: 3}, {3: 7}]
    parts = [memory(r, seed, tokenizer_sha256="cd" * 32) for seed, r in enumerate(ranks)]
    for part, name in zip(parts, "abc", strict=True):
        part.bank.tau.fill_(0.7)
        part.save(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in (*"abc", "abc", "bc", "left", "last", "kept")}
    assert main(["compose", *(paths[name] for name in "abc"), "-o", paths["abc"]]) == 0
    assert main(["compose", *(paths[name] for name in "bc"), "-o", paths["bc"]]) == 0
    assert main(["compose", paths["abc"], "--subtract", paths["a"], "-o", paths["left"]]) == 0
    assert (tmp_path / "left").read_bytes() == (tmp_path / "bc").read_bytes()
    for gone, stays in ("bc", "cb"):
        assert main(["compose", paths["left"], "--subtract", paths[gone], "-o", paths["last"]]) == 0
        assert (tmp_path / "last").read_bytes() == (tmp_path / stays).read_bytes()
    capsys.readouterr()
    before = (tmp_path / "last").read_bytes()
    assert main(["compose", paths["left"], "--subtract", paths["a"], "-o", paths["last"]]) == 2
    assert "is none of those that were composed" in capsys.readouterr().err
    assert main(["compose", paths["a"], paths["left"], "--subtract", paths["a"], "-o", paths["last"]]) == 2
    assert main(["compose", paths["a"], "--subtract", paths["a"], "-o", paths["last"]]) == 2
    assert "this memory was not composed" in capsys.readouterr().err
    assert (tmp_path / "last").read_bytes() == before


def test_a_part_that_was_rounded_or_changed_is_not_passed_off_as_the_original() -> None:
    one, two = memory({0: 11}, 0), memory({0: 3}, 1)
    one.bank.tau.fill_(0.3)
    two.bank.tau.fill_(0.7)
    with pytest.raises(ValueError, match=r"part 1 cannot be given back to the bit.*from their own files"):
        subtract(compose([one, two]), two)
    one.bank.tau.fill_(0.7)
    both = compose([one, two], weights=[0.6, 0.6])
    assert same_bytes(subtract(both, 1).bank.rows, compose([one], weights=[0.6]).bank.rows)
    assert float(subtract(both, 1).bank.tau) == pytest.approx(0.42)
    changed = compose([one, two])
    changed.bank.rows[0, 3, 1] += 1e-6
    with pytest.raises(ValueError, match="something was learnt since"):
        subtract(changed, one)
    for number, message in ((2, r"has the parts 0\.\.1"), (-1, "part -1 asked for")):
        with pytest.raises(ValueError, match=message):
            subtract(both, number)
    with pytest.raises(ValueError, match="without it there is nothing left"):
        subtract(compose([one]), one)


def test_compositions_of_compositions_of_compositions_can_still_be_loaded(tmp_path: Path) -> None:
    """A file's manifest may not nest without end; the inner parts' histories are cut short in time."""
    pile = memory({0: 1}, 0)
    for seed in range(1, 13):
        pile = compose([pile, memory({0: 1}, seed)])
        pile.save(tmp_path / "pile.safetensors")
        again = load(tmp_path / "pile.safetensors")
        assert again.bank.ranks == {0: seed + 1}
        assert len(again.provenance.documents) == seed + 1
    assert (tmp_path / "pile.safetensors").stat().st_size < 50_000


# -------------------------------------------------------------------- fitting


def two_that_have_read(name: str = "llama", **init: Any) -> tuple[Any, list[Memory], list[torch.Tensor]]:
    """Two memories that know a repeated phrase each."""
    model = tiny_model(name, torch.float32)
    texts = [text(17, seed=i).repeat(13) for i in (1, 2)]
    parts = []
    for i, ids in enumerate(texts):
        part = create(model, ids[:19], InitSettings(rank=5 + i, **init), start_id=START)
        list(read(model, part, ids, ReadSettings(window=53, chunk=23), start_id=START))
        parts.append(part)
    return model, parts, texts


def divergence(model: Any, bank: Bank, other: Bank, ids: torch.Tensor) -> float:
    """Nats a token from the predictions with `other`."""
    window = torch.cat([torch.tensor([START]), ids])[None]
    with torch.no_grad():
        with attached(model, other):
            wanted = model(window[:, :130]).logits.double().log_softmax(-1)
        with attached(model, bank):
            found = model(window[:, :130]).logits.double().log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_fitted_memory_predicts_on_each_text_as_that_texts_own(name: str) -> None:
    init: dict[str, Any] = {} if name == "llama" else {"init": "activation"}
    model, parts, texts = two_that_have_read(name, **init)
    plain = compose(parts)
    settings = FitSettings(epochs=7, lr=0.03, text_share=0.0)
    fitted = compose(parts, model=model, fit=texts, start_id=START, settings=settings)
    seen: list[tuple[int, int]] = []
    again = compose(
        parts, model=model, fit=texts, start_id=START, settings=settings, on_progress=lambda *at: seen.append(at)
    )
    windows = seen[-1][1] // (7 + 2)  # seven passes, and one before and after
    assert seen == [(i + 1, 9 * windows) for i in range(9 * windows)]
    assert same_bytes(fitted.bank.rows, again.bank.rows)
    assert fitted.bank.ranks == plain.bank.ranks
    assert fitted.bank.rows.norm(dim=-1).max() <= 1 + 1e-5
    for part, ids in zip(parts, texts, strict=True):
        before, after = (divergence(model, m.bank, part.bank, ids) for m in (plain, fitted))
        assert 0 < after < 0.75 * before, (before, after)
    record = fitted.provenance.settings["compose"]["fit"]
    assert (record["epochs"], [t["tokens"] for t in record["texts"]]) == (7, [221, 221])
    assert all(t["divergence"] < 0.75 * t["divergence_before"] for t in record["texts"])
    with pytest.raises(ValueError, match="was fitted to all its parts together; compose the memories that are to"):
        split(fitted)


def test_a_share_of_the_texts_own_tokens_lowers_their_loss() -> None:
    model, parts, texts = two_that_have_read()
    plain = compose(parts)
    losses = {}
    for share in (0.0, 0.5):
        settings = FitSettings(lr=0.03, text_share=share)
        fitted = compose(parts, model=model, fit=texts, start_id=START, settings=settings)
        losses[share] = [
            float(torch.cat([r.nll for r in read(model, fitted, ids, start_id=START, learn=False)]).mean())
            for ids in texts
        ]
    before = [
        float(torch.cat([r.nll for r in read(model, plain, ids, start_id=START, learn=False)]).mean()) for ids in texts
    ]
    assert all(x < y for x, y in zip(losses[0.5], losses[0.0], strict=True))
    assert all(x < y - 0.1 for x, y in zip(losses[0.5], before, strict=True)), (losses, before)


def test_frozen_slots_are_not_fitted(tmp_path: Path) -> None:
    model, parts, texts = two_that_have_read()
    plain = compose([freeze(parts[0]), parts[1]])
    fitted = compose(
        [freeze(parts[0]), parts[1]], model=model, fit=texts, start_id=START, settings=FitSettings(epochs=1)
    )
    assert fitted.frozen == {"0": 5, "1": 5, "2": 5}
    for layer in fitted.bank.layers:
        now, then = fitted.bank.slots(layer), plain.bank.slots(layer)
        assert same_bytes(now.k[:, :5], then.k[:, :5])
        assert same_bytes(now.v[:, :5], then.v[:, :5])
        assert not torch.equal(now.v[:, 5:], then.v[:, 5:])
    fitted.save(tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors", model).frozen == fitted.frozen
    with pytest.raises(ValueError, match="every slot of these memories is frozen"):
        compose([freeze(part) for part in parts], model=model, fit=texts, start_id=START)


def test_what_cannot_be_fitted() -> None:
    model, parts, texts = two_that_have_read()
    for arguments, message in (
        ({"fit": texts}, "fitting needs a model: compose"),
        ({"fit": texts[:1], "model": model}, "2 memories need as many texts; got 1"),
        ({"fit": [texts[0], texts[1][:3]], "model": model}, "text 2 has 3 tokens to fit to; give 4 or more"),
        ({"fit": texts, "model": tiny_model("llama", torch.float32, seed=1)}, "made with the backbone"),
    ):
        with pytest.raises(ValueError, match=message):
            compose(parts, **arguments)  # type: ignore[arg-type]
    for given, message in (
        ({"tokens": 3}, "fitting looks at 4 tokens of each text or more"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"text_share": 1.1}, r"text_share must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            FitSettings(**given)  # type: ignore[arg-type]


# -------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def two_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two texts and memories of them, made with the built-in backbone."""
    folder = tmp_path_factory.mktemp("compose")
    license_ = (Path(__file__).parents[2] / "LICENSE").read_text()
    for name, start in (("a", 0), ("b", 5000)):
        (folder / f"{name}.txt").write_text(license_[start : start + 1800])
        size = ["--window", "128", "--chunk", "64", "--rank", "4", "-o", str(folder / name)]
        assert main(["memorize", str(folder / f"{name}.txt"), *size]) == 0
    return folder


def test_the_command_fits_and_says_what_is_kept(two_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (str(two_files / name) for name in "abc")
    command = ["compose", a, b, "-o", c, "--fit", f"{a}.txt", "--fit", f"{b}.txt", "--fit-epochs", "1"]
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [each["text"] for each in result["kept"]] == [f"{a}.txt", f"{b}.txt"]
    fit = result["settings"]["compose"]["fit"]
    assert fit["epochs"] == 1
    for each, text_ in zip(result["kept"], fit["texts"], strict=True):
        assert each["kept_share"] == pytest.approx(each["gain_composed_nats"] / each["gain_nats"])
        assert each["tokens"] == (each["tokens"] + text_["tokens"]) // 8  # the last eighth
        assert text_["divergence"] < text_["divergence_before"]
    assert main(["info", c]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "composed part 1 rank 4, weight 1: " in told
    assert "fitted epochs 1; nats a token" in told
    assert f"{fit['texts'][1]['divergence_before']:.4f} -> {fit['texts'][1]['divergence']:.4f}" in told
    few = ["--fit-tokens", "64", "--fit-epochs", "1", "--fit-text-share", "0"]
    assert main(["compose", a, b, "-o", c, "--fit", f"{a}.txt", f"{b}.txt", *few]) == 0
    assert "that were not fitted to" in capsys.readouterr().out


def test_the_command_takes_weights_as_people_write_them(two_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (str(two_files / name) for name in "abc")
    for words, expected in (
        (["0.75,0.5"], [0.75, 0.5]),
        (["0.75", "0.5"], [0.75, 0.5]),
        (["0.6"], [0.6, 0.6]),
    ):
        assert main(["compose", a, b, "-o", c, "--weights", *words]) == 0
        assert [p["weight"] for p in load(c).provenance.settings["compose"]["parts"]] == expected
    capsys.readouterr()
    before = Path(c).read_bytes()
    for more, message in (
        (["--weights", "1,2,3"], "2 memories need as many weights; got 3"),
        (["--weights"], "2 memories need as many weights; got 0"),
        (["--weights", "much"], "--weights takes numbers such as 0.75,0.75; got much"),
        (["--fit", f"{a}.txt"], "--fit takes one text for each memory, in their order; got 1 for 2"),
        (["--fit-epochs", "3"], "go with --fit TEXT"),
        (["--subtract", a], "leave --weights, --fit and others out"),
    ):
        assert main(["compose", a, b, "-o", c, *more]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert main(["compose", a, b, "-o", f"{a}.txt"]) == 2
    assert "is not a memory and would be overwritten" in capsys.readouterr().err
    assert Path(c).read_bytes() == before
