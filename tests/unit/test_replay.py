"""What is replayed is what would have run: with CUDA graphs, and where there is no GPU with recorded ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from families import ABSOLUTE, FAMILY_NAMES, MOE, tiny_model
from helpers import START, same_bytes, text
from locas import stream
from locas.attach import attached
from locas.bank import Bank
from locas.graphs import Graphs, graphs_for
from locas.initialise import InitSettings, create_bank
from locas.stream import Reader, ReadSettings
from locas.write import WriteSettings
from recorded import recorded_graphs

__all__ = ["recorded_graphs"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = 5  # a token at which the backbone's numbers are not finite
Found = tuple[Tensor, Tensor, Reader]


@pytest.fixture
def read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Found]:
    """The losses, the memories and the reader after documents of these lengths were read, replayed or not."""
    on_host: list[Tensor] = [] if torch.cuda.is_available() else request.getfixturevalue("recorded_graphs")

    def graphs(model: Any, device: torch.device) -> Graphs | None:
        return graphs_for(model, device) if device.type == "cuda" else Graphs(model)

    def run(
        lengths: list[int], replayed: bool, name: str = "qwen3", spoil: tuple[int, ...] = (),
        resume: int | None = None, poison: int | None = None, dtype: torch.dtype = torch.float32, **how: Any,
    ) -> Found:  # fmt: skip
        monkeypatch.setattr(stream, "graphs_for", graphs if replayed else lambda *_: None)
        model = tiny_model(name, dtype).to(DEVICE)
        documents = [text(n, seed=i) for i, n in enumerate(lengths)]
        documents = [ids.where(ids != POISON, POISON + 1) for ids in documents]
        if poison is not None:
            model.get_input_embeddings().weight.data[POISON] = torch.nan
            documents[-1][poison] = POISON
        documents = [ids.to(DEVICE) for ids in documents]
        one = create_bank(model, documents[0][:40], how.pop("init", InitSettings(rank=5)), start_id=START)
        bank = Bank.stack([one] * len(documents))
        on_host.append(bank.frozen)
        learn = how.pop("learn", True)
        write = WriteSettings(**how.pop("write", {"damping": 0.3}))
        settings = ReadSettings(**{"window": 40, "chunk": 16} | how, write=write)

        def reader() -> Reader:
            return Reader(model, bank, documents, settings, start_id=START, learn=learn, on_failure="drop")

        own, nll, asked, undone = reader(), [], [], 0
        while not own.done:
            with attached(model, bank), torch.no_grad():  # somebody asks in between
                asked.append(model(documents[0][None, :9].expand(len(documents), -1)).logits.flatten().cpu())
            if len(nll) in spoil:
                bank.rows[-1].fill_(torch.inf)
            records = own.next_chunk()
            nll.append(torch.cat([record.nll for record in records if record is not None]))
            undone += sum(record.undone for record in records if record is not None)
            if len(nll) == resume:
                state = {name: t.clone() for name, t in own.state().items()}
                bank.rows.fill_(torch.nan)
                own = reader()
                own.load_state(state)
        assert undone == len(spoil)
        assert set(own.failed) == (set() if poison is None else {len(lengths) - 1})
        return torch.cat([*nll, *asked]).float(), bank.rows, own

    return run


def close(found: Found, expected: Found) -> None:
    """On a CPU the same operations give the same bits."""
    if DEVICE == "cpu":
        assert all(same_bytes(x, y) for x, y in zip(found[:2], expected[:2], strict=True))
    else:
        # Sums come in any order there.
        loss, row = (1e-3, 1e-2) if found[2].model.dtype == torch.float32 else (3e-2, 1e-1)
        torch.testing.assert_close(found[0], expected[0], rtol=loss, atol=loss / 10, equal_nan=True)
        assert (found[1] - expected[1]).norm() < row * expected[1].norm()


@pytest.mark.parametrize(
    ("lengths", "how"),
    [
        ([150], {"reuse": False}),
        ([150], {"reuse": True}),
        ([150], {"reuse": True, "refresh": 1}),
        ([150], {"reuse": True, "refresh": 2}),
        ([150], {"reuse": True, "refresh": 3}),
        ([150], {"reuse": True, "chunk": 5}),
        ([150], {"reuse": True, "chunk": 20}),
        ([150], {"reuse": True, "chunk": 7, "sinks": 0, "refresh": 2}),
        ([150] * 3, {"reuse": False}),
        ([150] * 3, {"reuse": True}),
        ([170, 80, 120], {"reuse": False}),
        ([170, 80, 120], {"reuse": True, "chunk": 9}),
        ([150], {"reuse": False, "spoil": (6, 8)}),
        ([150], {"reuse": True, "spoil": (6, 8)}),
        ([150] * 3, {"reuse": True, "spoil": (6, 8)}),
        ([150], {"reuse": True, "refresh": 2, "chunk": 8, "spoil": (12,)}),
        ([170, 150, 170], {"reuse": True, "poison": 101}),
        ([170, 150, 170], {"reuse": True, "poison": 101, "refresh": 2}),
        ([170, 150, 170], {"reuse": True, "poison": 120, "refresh": 2}),
        ([170, 150, 170], {"reuse": False, "poison": 101}),
        ([150], {"reuse": True, "resume": 5}),
        ([150, 120], {"reuse": True, "resume": 5, "chunk": 8}),
        ([150], {"reuse": False, "steps": 2}),
        ([150], {"reuse": True, "steps": 2}),
        ([150], {"reuse": False, "attention_gradient": "full"}),
        ([150], {"reuse": True, "attention_gradient": "full"}),
        ([150], {"reuse": True, "recompute_ffn": True}),
        ([150], {"reuse": False, "write": {"rule": "adamw", "lr": 0.01}}),
        ([150], {"reuse": False, "write": {"damping": 0.3, "damping_every": 2}}),
        ([150] * 3, {"reuse": True, "write": {"damping": 0.3, "damping_every": 2}, "spoil": (6, 8)}),
        ([150], {"reuse": True, "write": {"damping": 0.3, "damping_every": 3}, "resume": 4}),
        ([150], {"reuse": False, "init": InitSettings(rank=131, variant="mlp", init="step-wise")}),
        ([150], {"reuse": False, "steps": 2, "init": InitSettings(rank=31, variant="mlp", init="step-wise")}),
        ([150], {"reuse": False, "learn": False}),
        ([150] * 3, {"reuse": True, "learn": False}),
        ([150], {"reuse": True, "dtype": torch.bfloat16}),
    ],
)  # fmt: skip
def test_replayed_chunks_are_what_would_have_run(
    lengths: list[int], how: dict[str, Any], read: Callable[..., Found]
) -> None:
    found = read(lengths, True, **how)
    assert found[2]._graphs is not None
    assert found[2]._graphs.replayed > 2
    expected = read(lengths, False, **how)
    assert expected[2]._graphs is None
    close(found, expected)


@pytest.mark.parametrize(
    ("name", "reuse"),
    [(name, reuse) for name in FAMILY_NAMES for reuse in (False, True) if not (reuse and name in ABSOLUTE)],
)
def test_every_family_is_replayed_or_says_that_it_cannot(name: str, reuse: bool, read: Callable[..., Found]) -> None:
    how = {"name": name, "reuse": reuse, "chunk": 10, "refresh": 6}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = read([90], True, **how)
    assert found[2]._graphs is not None
    assert any("kernel by kernel" in str(w.message) for w in said) == (found[2]._graphs.replayed == 0)
    if DEVICE == "cpu":  # which expert has which tokens is asked for, and a list is an index
        assert (found[2]._graphs.replayed > 2) == (name not in (*MOE, "falcon"))
    assert found[2].reuses == reuse
    close(found, read([90], False, **how))
