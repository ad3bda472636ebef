"""Composing: one memory that reads as several do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny_model
from helpers import fill, memory_for, same_bytes, text
from locas.attach import attached
from locas.bank import Bank
from locas.cli import main
from locas.compose import compose
from locas.memory import DocumentRead, Memory, Provenance, load

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
