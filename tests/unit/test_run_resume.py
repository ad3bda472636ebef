"""A run that is stopped anywhere and goes on leaves the file and the figures of one that was not."""

import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from families import tiny_model
from helpers import same_bytes
from locas.backbone import Backbone
from locas.memory import read
from locas.run import Run
from locas.run_memories import OneMemory
from locas.store import load_tensors, save_tensors
from locas.stream import Reader
from locas.write import WriteSettings
from runs import N_CHUNKS, SETTINGS, make_text, run_to_end, three_texts
from tokens import tiny_backbone, word_tokenizer

ModelOf = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("compare", [False, True])
def test_stopped_after_any_chunk_it_goes_on_to_the_same_bytes(compare: bool, backbone: Backbone, output: Path) -> None:
    settings = replace(SETTINGS, compare=compare)
    expected = run_to_end(Run(backbone, three_texts(backbone), output, settings))
    for chunks in range(N_CHUNKS + 1):
        output.unlink()
        first = Run(backbone, three_texts(backbone), output, settings)
        steps = iter(first)
        for _ in range(chunks):
            next(steps)
        first.save_state()
        for _ in steps:  # what it still did after its last state is lost with it
            pass
        second = Run(backbone, three_texts(backbone), output, settings)
        assert second.resume()
        assert second.tokens == [0, 11, 22, 23, 34, 45, 54, 65][chunks]
        assert run_to_end(second) == expected
        assert list(output.parent.iterdir()) == [output]


def test_with_kept_context_it_is_compared_with_truncated_reading(backbone: Backbone, output: Path) -> None:
    """The memory reads in short chunks, the baseline in its own, longer ones; both go on where they were."""
    kept = replace(SETTINGS.read, chunk=None, reuse=True)
    settings, texts = replace(SETTINGS, read=kept, compare=True), three_texts(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # learnt positions: every window is recomputed
        expected = run_to_end(Run(backbone, texts, output, settings))
        truncated = replace(kept, reuse=False)
        plain = [list(read(backbone.model, None, t.ids, truncated, start_id=backbone.start_id)) for t in texts]
        nll = [float(torch.cat([r.nll for r in records]).nansum()) for records in plain]
        assert [d["nll"] for d in expected[1]["baseline"]["documents"]] == pytest.approx(nll)
        n_chunks = len(list(Run(backbone, texts, output, settings)))
        assert n_chunks > 2 * len(plain) or kept.sizes(backbone.model) == truncated.sizes(backbone.model)
        for chunks in range(0, n_chunks, 3):
            first = Run(backbone, texts, output, settings)
            for progress, _ in zip(first, range(chunks), strict=False):
                assert progress.baseline is not None
                assert progress.baseline.tokens == progress.score.tokens
            first.save_state()
            second = Run(backbone, texts, output, settings)
            assert second.resume()
            assert run_to_end(second) == expected


def test_stopped_after_every_chunk(backbone: Backbone, output: Path) -> None:
    settings = replace(SETTINGS, compare=True)
    expected = run_to_end(Run(backbone, three_texts(backbone), output, settings))
    stops = 0
    while True:
        run = Run(backbone, three_texts(backbone), output, settings)
        assert run.resume() == (stops > 0)
        if next(iter(run), None) is None:
            break
        run.save_state()
        stops += 1
    assert stops == N_CHUNKS
    assert run_to_end(run) == expected


def test_a_state_after_the_last_text(llama: Backbone, output: Path) -> None:
    run = Run(llama, three_texts(llama), output, SETTINGS)
    assert len(list(run)) == N_CHUNKS
    run.save_state()
    other = Run(llama, three_texts(llama), output, SETTINGS)
    assert other.resume()
    assert list(other) == []
    assert [d.name for d in other.memory.provenance.documents] == ["0.txt", "1.txt", "2.txt"]
    assert run_to_end(other) == run_to_end(run)


def test_time_and_undone_writes_add_up(llama: Backbone, output: Path) -> None:
    run = Run(llama, three_texts(llama), output, replace(SETTINGS, compare=True))
    next(iter(run))
    run.seconds, run.baseline_seconds, run.undone = 1000.0, 2000.0, 3
    run.save_state()
    other = Run(llama, three_texts(llama), output, replace(SETTINGS, compare=True))
    assert other.resume()
    run_to_end(other)
    assert 1000 < other.seconds < 1100
    assert 2000 < other.baseline_seconds < 2100
    assert other.undone == 3


def test_an_undone_write_is_remembered(llama: Backbone, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is not finite takes back the last write of all: also when a stop lies between the two."""
    broken = {"at": -1, "calls": 0}
    score = Reader._score

    def sometimes(self: Reader, window: Any) -> Any:
        nll, losses = score(self, window)
        broken["calls"] += 1
        if window.start == broken["at"] and broken["calls"] == broken["on"]:
            losses = losses * torch.nan
        return nll, losses

    monkeypatch.setattr(Reader, "_score", sometimes)

    def go(stop: bool) -> tuple[bytes, int]:
        one = make_text(llama, 53, seed=7)
        run = Run(llama, [one], output, SETTINGS)
        broken.update(at=22, calls=0, on=3)
        steps = iter(run)
        next(steps), next(steps)
        if stop:
            run.save_state()
            run = Run(llama, [one], output, SETTINGS)
            assert run.resume()
            steps = iter(run)
        for _ in steps:
            pass
        run.finish()
        return output.read_bytes(), run.undone

    whole = go(stop=False)
    assert whole[1] == 1
    assert go(stop=True) == whole


def other_length(run: dict[str, Any]) -> None:
    run["texts"][1] = make_text(run["backbone"], 30, seed=1)


def other_text(run: dict[str, Any]) -> None:
    run["texts"][1] = replace(make_text(run["backbone"], 31, seed=9), name="1.txt")


def other_ids(run: dict[str, Any]) -> None:
    """As where a caller gives no hash of the text."""
    run["texts"][1] = replace(run["texts"][1], ids=run["texts"][1].ids.flip(0))


def other_order(run: dict[str, Any]) -> None:
    run["texts"].reverse()


def other_weights(run: dict[str, Any]) -> None:
    run["backbone"] = tiny_backbone(tiny_model("llama", torch.float32, seed=1))


def other_precision(run: dict[str, Any]) -> None:
    run["backbone"] = tiny_backbone(tiny_model("llama", torch.bfloat16))


def other_tokenizer(run: dict[str, Any]) -> None:
    run["backbone"] = tiny_backbone(run["backbone"].model, word_tokenizer(adds_bos=False))


def other_start(run: dict[str, Any]) -> None:
    """A tokenizer's BOS is no part of its definition's hash."""
    run["backbone"] = replace(run["backbone"], start_id=2)


def other_context(run: dict[str, Any]) -> None:
    """The default window is the trained context, which the weights do not tell."""
    model = tiny_model("llama", torch.float32)
    model.config.max_position_embeddings = 61
    run["backbone"] = tiny_backbone(model)
    run["settings"] = replace(run["settings"], read=replace(run["settings"].read, window=None))


def settings(**more: Any) -> Callable[[dict[str, Any]], None]:
    def change(run: dict[str, Any]) -> None:
        run["settings"] = replace(run["settings"], **more)

    change.__name__ = ", ".join(more)
    return change


def read_settings(**more: Any) -> Callable[[dict[str, Any]], None]:
    change = settings(read=replace(SETTINGS.read, **more))
    change.__name__ = ", ".join(more)
    return change


MATTERS = [other_length, other_text, other_ids, other_order, other_weights, other_precision, other_tokenizer]

MATTERS += [other_start, settings(compare=True), settings(layers="0-1"), settings(init_tokens=5)]

MATTERS += [settings(init=replace(SETTINGS.init, rank=2)), settings(init=replace(SETTINGS.init, seed=1))]

MATTERS += [settings(init=replace(SETTINGS.init, tau_scale=7.0)), read_settings(window=28), read_settings(chunk=10)]

MATTERS += [read_settings(steps=2), read_settings(fill_eps=0.5), read_settings(start_in_every_window=False)]

MATTERS += [read_settings(write=WriteSettings(lr=0.2)), read_settings(write=WriteSettings("adamw", lr=0.1))]


@pytest.mark.parametrize("change", MATTERS, ids=lambda f: f.__name__)
def test_a_run_never_goes_on_with_anothers_state(
    change: Callable[[dict[str, Any]], None], llama: Backbone, output: Path
) -> None:
    first = Run(llama, three_texts(llama), output, SETTINGS)
    next(iter(first))
    first.save_state()
    state = first.state_path.read_bytes()
    other: dict[str, Any] = {"backbone": llama, "texts": three_texts(llama), "settings": SETTINGS}
    change(other)
    second = Run(other["backbone"], other["texts"], output, other["settings"])
    assert second.key != first.key
    assert second.state_path != first.state_path
    assert not second.resume()
    assert second.tokens == 0
    next(iter(second))
    second.save_state()
    second.finish()
    assert first.state_path.read_bytes() == state
    third = Run(llama, three_texts(llama), output, SETTINGS)
    assert third.resume()
    assert third.tokens == 11


def test_the_trained_context_matters_where_it_sets_the_window(llama: Backbone, output: Path) -> None:
    default = replace(SETTINGS, read=replace(SETTINGS.read, window=None))
    run: dict[str, Any] = {"settings": SETTINGS}
    other_context(run)
    one = Run(llama, three_texts(llama), output, default)
    other = Run(run["backbone"], three_texts(llama), output, run["settings"])
    assert one.key != other.key


def test_what_does_not_matter_keeps_the_key(model_of: ModelOf, llama: Backbone, output: Path, tmp_path: Path) -> None:
    one = Run(llama, three_texts(llama), output, SETTINGS)
    again = replace(tiny_backbone(tiny_model("llama", torch.float32)), name="elsewhere")
    moved = tmp_path / "other.safetensors"
    assert Run(again, three_texts(llama), moved, SETTINGS).key == one.key
    assert Run(again, three_texts(llama), moved, SETTINGS).state_path.parent == tmp_path
    resolved = replace(SETTINGS, read=replace(SETTINGS.read, start_in_every_window=True))
    assert Run(llama, three_texts(llama), output, resolved).key == one.key


def test_states_from_before_there_was_a_setting_are_found(
    llama: Backbone, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Run(llama, three_texts(llama), output, SETTINGS).key
    monkeypatch.setattr(
        "locas.run_settings.asdict",
        lambda settings: {k: v for k, v in asdict(settings).items() if k not in ("thaw", "cycle")},
    )
    assert Run(llama, three_texts(llama), output, SETTINGS).key == key
    monkeypatch.undo()
    assert Run(llama, three_texts(llama), output, replace(SETTINGS, init_tokens=7)).key != key


def test_damaged_states_are_refused_and_change_nothing(backbone: Backbone, output: Path) -> None:
    expected = run_to_end(Run(backbone, three_texts(backbone), output, SETTINGS))
    run = Run(backbone, three_texts(backbone), output, SETTINGS)
    steps = iter(run)
    for _ in range(4):
        next(steps)
    run.save_state()
    raw, path = run.state_path.read_bytes(), run.state_path
    fresh = Run(backbone, three_texts(backbone), output, SETTINGS)
    damages = [raw[:i] + bytes([raw[i] ^ 16]) + raw[i + 1 :] for i in range(9, len(raw), len(raw) // 31)]
    damages += [raw[:n] for n in (0, 7, 100, len(raw) // 2, len(raw) - 1)]
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=path.name):
            fresh.resume()
    assert run_to_end(fresh) == expected


POSITION = "reader.position"


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest, _: manifest.pop("document"),
        lambda manifest, _: manifest.pop("key"),
        lambda manifest, _: manifest.pop("seconds"),
        lambda manifest, _: manifest.update(document=3),
        lambda manifest, _: manifest.update(document=-1),
        lambda manifest, _: manifest.update(document="1"),
        lambda manifest, _: manifest.update(document=None),
        lambda manifest, _: manifest.update(seconds="soon"),
        lambda manifest, _: manifest.update(undone=[]),
        lambda manifest, _: manifest.update(key="0" * 64),
        lambda _, tensors: tensors.clear(),
        lambda _, tensors: tensors.pop("losses.1"),
        lambda _, tensors: tensors.update({"losses.1": torch.zeros(7)}),
        lambda _, tensors: tensors.pop("reader.rows"),
        lambda _, tensors: tensors.pop("reader.tau"),
        lambda _, tensors: tensors.update({"reader.tau": torch.zeros(1, 7)}),
        lambda _, tensors: tensors.update({"reader.rows": tensors["reader.rows"].double()}),
        lambda _, tensors: tensors.pop("reader.writer.counts"),
        lambda _, tensors: tensors.pop("reader.writer.moment.0"),
        lambda _, tensors: tensors.update({"reader.writer.moment.0": torch.zeros(3)}),
        lambda _, tensors: tensors.update({POSITION: torch.tensor(10**9)}),
        lambda _, tensors: tensors.update({POSITION: torch.tensor(-11)}),
        lambda _, tensors: tensors.update({POSITION: torch.tensor([1, 2])}),
        lambda _, tensors: tensors.update({POSITION: torch.tensor(1.5)}),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(
    change: Callable[[dict[str, Any], dict[str, Any]], object], llama: Backbone, output: Path
) -> None:
    run = Run(llama, three_texts(llama), output, SETTINGS)
    steps = iter(run)
    for _ in range(4):
        next(steps)
    run.save_state()
    tensors, manifest = load_tensors(run.state_path, kind=OneMemory.kind, may_be_nan=("losses.",))
    change(manifest, tensors)
    save_tensors(run.state_path, tensors, manifest)
    fresh = Run(llama, three_texts(llama), output, SETTINGS)
    rows, tau = fresh.memory.bank.rows.clone(), fresh.memory.bank.tau.clone()
    with pytest.raises(ValueError, match=f"{run.state_path.name}.*move it away to start afresh"):
        fresh.resume()
    assert (fresh.first, fresh.tokens, fresh.seconds, fresh.undone) == (0, 0, 0.0, 0)
    assert fresh.memory.provenance.documents == ()
    assert same_bytes(fresh.memory.bank.rows, rows)
    assert same_bytes(fresh.memory.bank.tau, tau)
    assert all(losses.isnan().all() for losses in fresh.losses)
