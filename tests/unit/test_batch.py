"""Texts side by side, each into a memory of its own: as if alone, whatever becomes of the others."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import tiny_model
from helpers import START, fresh, same_bytes, text
from locas.backbone import Backbone
from locas.bank import Bank
from locas.initialise import InitSettings
from locas.memory import load
from locas.run import Run
from locas.run_memories import MemoryEach, unique_names
from locas.run_settings import RunSettings, Text
from locas.store import load_tensors, save_tensors
from locas.stream import ChunkRecord, Reader, ReadSettings
from locas.write import WriteSettings
from tokens import tiny_backbone, words

ModelOf = Callable[..., PreTrainedModel]
POISON = 5  # a token on which the poisoned models' states are not finite
READ = ReadSettings(window=29, chunk=11, write=WriteSettings(lr=0.1))
SETTINGS = RunSettings(init=InitSettings(rank=3, init="paper", tau_scale=8.0), read=READ)
LENGTHS = (23, 31, 11, 41, 7)
SIZE = 2  # groups: (23, 31), (11, 41), (7)


def poisoned(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = tiny_model(name, dtype)

    def poison(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.masked_fill((args[0] == POISON)[..., None], torch.nan)

    model.get_input_embeddings().register_forward_hook(poison)
    return model


def clean_ids(n_tokens: int, seed: int) -> Tensor:
    ids = text(n_tokens, seed)
    return ids.masked_fill(ids == POISON, POISON + 1)


def bad_ids(n_tokens: int, seed: int, at: int) -> Tensor:
    ids = clean_ids(n_tokens, seed)
    ids[at] = POISON
    return ids


def column(chunks: list[list[ChunkRecord | None]], i: int) -> Tensor:
    return torch.cat([record.nll for records in chunks if (record := records[i]) is not None])


# -------------------------------------------------------------------- the reader


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_document_that_fails_is_dropped_and_the_others_are_read_as_if_alone(name: str, steps: int) -> None:
    model = poisoned(name)
    # The longest fails in its third chunk, in which another ends; one fails at once, one is unharmed to its end.
    documents = [clean_ids(36, 1), bad_ids(53, 2, at=25), clean_ids(27, 3), bad_ids(13, 4, at=0)]
    settings = replace(READ, steps=steps)
    bank = fresh(model, name, 4)
    reader = Reader(model, bank, documents, settings, start_id=START, on_failure="drop")
    chunks = list(reader)
    assert reader.done
    assert reader.failed == {1: 22, 3: 0}
    assert [[r is not None for r in records] for records in chunks] == [
        [True, True, True, False],
        [True, True, True, False],
        [True, False, True, False],
        [True, False, False, False],
    ]
    for i in (0, 2):
        alone = fresh(model, name)
        single = list(Reader(model, alone, [documents[i]], settings, start_id=START))
        torch.testing.assert_close(column(chunks, i), column(single, 0), rtol=1e-6, atol=0)  # float32 records
        torch.testing.assert_close(bank.rows[i], alone.rows[0], rtol=1e-12, atol=1e-12)
        assert not torch.equal(bank.rows[i], fresh(model, name).rows[0])
    assert bank.rows.isfinite().all()
    assert reader.writer is not None
    assert reader.writer.scale.tolist() == [1.0, 0.5, 1.0, 0.5]  # one attempt to mend it, then no more writes


def test_with_kept_context_a_document_that_fails_does_not_touch_the_others() -> None:
    model = poisoned("llama")
    settings = replace(READ, reuse=True, window=23)
    for bad in (bad_ids(61, 2, at=25), bad_ids(61, 2, at=0), bad_ids(61, 2, at=60)):
        bank = fresh(model, "llama", 2)
        reader = Reader(model, bank, [clean_ids(59, 1), bad], settings, start_id=START, on_failure="drop")
        assert reader.reuses
        chunks = []
        for records in reader:
            chunks.append(records)
            kept = {name: t for name, t in reader.state().items() if name.startswith("prefix.")}
            assert kept
            assert all(t.isfinite().all() for t in kept.values())  # or a run saved here could not be resumed
        alone = fresh(model, "llama")
        single = list(Reader(model, alone, [clean_ids(59, 1)], settings, start_id=START))
        # Norms are float32 in this family; recomputing one window changes the third digit.
        torch.testing.assert_close(column(chunks, 0), column(single, 0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bank.rows[0], alone.rows[0], rtol=1e-4, atol=1e-5)


def test_reading_ends_when_all_have_failed() -> None:
    model = poisoned("gpt2")
    documents = [bad_ids(36, 1, at=3), bad_ids(53, 2, at=14)]
    reader = Reader(model, fresh(model, "gpt2", 2), documents, READ, start_id=START, on_failure="drop")
    assert [[r is not None for r in records] for records in reader] == [[False, True], [False, False]]
    assert reader.done
    assert reader.failed == {0: 0, 1: 11}
    with pytest.raises(ValueError, match="every document is read to its end"):
        reader.next_chunk()


@pytest.mark.parametrize("learn", [False, True])
def test_documents_are_dropped_without_memory_and_without_learning(learn: bool) -> None:
    model = poisoned("gpt2")
    documents = [clean_ids(36, 1), bad_ids(53, 2, at=25)]
    bank = None if learn else fresh(model, "gpt2", 2)
    reader = Reader(model, bank, documents, READ, start_id=START, learn=learn, on_failure="drop")
    chunks = list(reader)
    assert reader.failed == {1: 22}
    assert [column(chunks, i).numel() for i in (0, 1)] == [36, 22]


def test_a_resumed_reader_remembers_who_failed() -> None:
    model = poisoned("gpt2")
    documents = [clean_ids(47, 1), bad_ids(53, 2, at=14), clean_ids(38, 3)]

    def start(bank: Bank) -> Reader:
        return Reader(model, bank, documents, READ, start_id=START, on_failure="drop")

    whole = fresh(model, "gpt2", 3)
    expected = list(start(whole))
    for chunks in (1, 2, 3):
        reader = start(fresh(model, "gpt2", 3))
        begun = [reader.next_chunk() for _ in range(chunks)]
        bank = fresh(model, "gpt2", 3)
        again = start(bank)
        again.load_state(reader.state())
        rest = list(again)
        assert again.failed == {1: 11}
        for i in range(3):
            assert same_bytes(column(begun + rest, i), column(expected, i))
        assert same_bytes(bank.rows, whole.rows)
    state = reader.state()
    del state["failed"]
    with pytest.raises(ValueError, match="this state holds failed of None"):
        start(fresh(model, "gpt2", 3)).load_state(state)


def test_unknown_ways_to_fail(model_of: ModelOf) -> None:
    model = model_of("gpt2")
    with pytest.raises(ValueError, match="on_failure 'ignore' is not one of raise, drop"):
        Reader(model, None, [text(5)], READ, on_failure="ignore")  # type: ignore[arg-type]


# -------------------------------------------------------------------- whole runs


def make_text(backbone: Backbone, ids: Tensor, name: str) -> Text:
    string = words(ids)
    encoded, n_bytes = backbone.encode(string)
    return Text(name, encoded, n_bytes, hashlib.sha256(string.encode()).hexdigest())


def five_texts(backbone: Backbone, bad: dict[int, int] | None = None) -> list[Text]:
    """`bad`: {text: token that spoils it}."""
    texts = []
    for i, n in enumerate(LENGTHS):
        ids = clean_ids(n, i) if i not in (bad or {}) else bad_ids(n, i, at=(bad or {})[i])
        texts.append(make_text(backbone, ids, f"in/{i}.txt"))
    return texts


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run_to_end(run: Run) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The finished files, and the figures but for the time that they took."""
    for _ in run:
        pass
    run.finish()
    results = json.loads(json.dumps(run.results()))
    assert results.pop("seconds") >= 0
    return files(run.output), results


@pytest.fixture
def gpt2(model_of: ModelOf) -> Backbone:
    return tiny_backbone(model_of("gpt2", torch.float32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "memories"


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("gpt2", torch.float64, 1e-12), ("gpt2", torch.float32, 2e-4), ("llama", torch.float32, 2e-4)],
)
def test_each_memory_is_that_of_its_text_alone(
    name: str, dtype: torch.dtype, tolerance: float, model_of: ModelOf, folder: Path, tmp_path: Path
) -> None:
    backbone = tiny_backbone(model_of(name, dtype))
    texts = five_texts(backbone)
    run = Run(backbone, texts, folder, SETTINGS, SIZE)
    progress = [(p.document, p.tokens) for p in run]
    assert progress == [(0, 22), (0, 44), (0, 54), (2, 76), (2, 87), (2, 98), (2, 106), (4, 113)]
    run.finish()
    results = run.results()
    assert sorted(files(folder)) == [f"{i}.safetensors" for i in range(5)]
    assert run.failed == {}
    for i, each in enumerate(texts):
        alone = Run(backbone, [each], tmp_path / "alone.safetensors", SETTINGS)
        for _ in alone:
            pass
        alone.finish()
        mine, other = load(folder / f"{i}.safetensors", backbone.model), load(alone.output)
        torch.testing.assert_close(mine.bank.rows, other.bank.rows, rtol=tolerance, atol=tolerance)
        assert mine.manifest() == other.manifest()
        (figures,) = alone.results()["documents"]
        nll = figures.pop("nll")
        found = results["documents"][i]
        assert found["nll"] == pytest.approx(nll, rel=1e-6)
        assert found.keys() == {*figures, "nll", "memory"}
        assert {k: found[k] for k in ("name", "tokens", "bytes")} == {
            k: figures[k] for k in ("name", "tokens", "bytes")
        }
        assert found["memory"] == str(folder / f"{i}.safetensors")
    assert results["tokens"] == sum(LENGTHS) == 113
    assert results["nll"] == pytest.approx(sum(d["nll"] for d in results["documents"]))
    assert results["bytes"] == sum(t.n_bytes for t in texts)
    assert results["memory_parameters"] == mine.n_parameters


def test_a_run_that_is_stopped_anywhere_leaves_the_same_files(backbone: Backbone, tmp_path: Path) -> None:
    texts = five_texts(backbone)
    expected, figures = run_to_end(Run(backbone, texts, tmp_path / "whole", SETTINGS, SIZE))
    for chunks in range(9):
        folder = tmp_path / f"{chunks}"
        run = Run(backbone, texts, folder, SETTINGS, SIZE)
        assert not run.resume()
        steps = iter(run)
        for _ in range(chunks):
            if next(steps, None) is None:
                break
        run.save_state()
        tokens = run.tokens
        run = Run(backbone, texts, folder, SETTINGS, SIZE)
        assert run.resume()
        assert run.tokens == tokens
        again, results = run_to_end(run)
        assert again == expected
        for mine, theirs in zip(results["documents"], figures["documents"], strict=True):
            assert {**mine, "memory": ""} == {**theirs, "memory": ""}
        assert results["nll"] == figures["nll"]


def test_killed_after_a_group_was_saved_and_before_the_state_was(gpt2: Backbone, tmp_path: Path) -> None:
    texts = five_texts(gpt2)
    expected, _ = run_to_end(Run(gpt2, texts, tmp_path / "whole", SETTINGS, SIZE))
    run = Run(gpt2, texts, tmp_path / "m", SETTINGS, SIZE)
    steps = iter(run)
    next(steps)
    run.save_state()
    for _ in range(4):
        next(steps)
    assert (tmp_path / "m" / "0.safetensors").exists()
    assert not (tmp_path / "m" / "2.safetensors").exists()
    run = Run(gpt2, texts, tmp_path / "m", SETTINGS, SIZE)
    assert run.resume()
    assert run.tokens == 22
    assert run_to_end(run)[0] == expected


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_text_that_fails_is_left_out(name: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(poisoned(name, torch.float32))
    good, _ = run_to_end(Run(backbone, five_texts(backbone), tmp_path / "good", SETTINGS, SIZE))
    # One in its second chunk beside a longer one, one in the first, from which its memory is made, and one alone.
    texts = five_texts(backbone, bad={0: 13, 3: 0, 4: 2})
    run = Run(backbone, texts, tmp_path / "some", SETTINGS, SIZE)
    found, results = run_to_end(run)
    assert run.failed == {0: 11, 3: 0, 4: 0}
    assert list(found) == ["1.safetensors", "2.safetensors"]
    assert run.tokens == run.total_tokens == 113
    for path in found:
        mine, other = (load(tmp_path / which / path).bank.rows for which in ("some", "good"))
        torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-4)
    assert list(good) == [f"{i}.safetensors" for i in range(5)]
    assert [d["name"] for d in results["documents"]] == ["in/1.txt", "in/2.txt"]
    assert results["tokens"] == LENGTHS[1] + LENGTHS[2]
    assert results["bytes"] == texts[1].n_bytes + texts[2].n_bytes
    assert [f["name"] for f in results["failed"]] == ["in/0.txt", "in/3.txt", "in/4.txt"]
    assert results["failed"][0]["error"].startswith("the loss on tokens 11..22 is not finite, and not because")
    assert results["failed"][2]["error"].startswith("the loss on tokens 0..7 is not finite")
    for chunks in range(1, 6):
        folder = tmp_path / f"{chunks}"
        run = Run(backbone, texts, folder, SETTINGS, SIZE)
        steps = iter(run)
        for _ in range(chunks):
            next(steps, None)
        run.save_state()
        run = Run(backbone, texts, folder, SETTINGS, SIZE)
        assert run.resume()
        assert run_to_end(run)[0] == found
        assert run.failed == {0: 11, 3: 0, 4: 0}


def test_other_texts_settings_and_sizes_are_other_runs(gpt2: Backbone, folder: Path) -> None:
    texts = five_texts(gpt2)
    keys = {
        Run(gpt2, texts, folder, SETTINGS, 2).key,
        Run(gpt2, texts, folder, SETTINGS, 3).key,
        Run(gpt2, texts[::-1], folder, SETTINGS, 2).key,
        Run(gpt2, texts, folder, replace(SETTINGS, layers="0"), 2).key,
    }
    assert len(keys) == 4
    assert Run(gpt2, texts, folder, SETTINGS, 2).key in keys


# -------------------------------------------------------------------- states that do not fit


def stopped(backbone: Backbone, folder: Path, chunks: int = 4) -> Run:
    """A run whose first group is done."""
    run = Run(backbone, five_texts(backbone), folder, SETTINGS, SIZE)
    steps = iter(run)
    for _ in range(chunks):
        next(steps)
    run.save_state()
    return run


POSITION = "reader.position"


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest, _: manifest.pop("first"),
        lambda manifest, _: manifest.pop("written"),
        lambda manifest, _: manifest.update(key="0" * 64),
        lambda manifest, _: manifest.update(first=1),
        lambda manifest, _: manifest.update(first=6),
        lambda manifest, _: manifest.update(first=-2),
        lambda manifest, _: manifest.update(first=True),
        lambda manifest, _: manifest.update(seconds="soon"),
        lambda manifest, _: manifest.update(undone=[]),
        lambda manifest, _: manifest.update(failed=[1]),
        lambda manifest, _: manifest.update(failed={"x": 1}),
        lambda manifest, _: manifest.update(failed={"0": 0}),
        lambda manifest, _: manifest.update(failed={"4": 0}),
        lambda manifest, _: manifest.update(written={}),
        lambda manifest, _: manifest["written"].update({"0": "0" * 64}),
        lambda _, tensors: tensors.pop("losses.3"),
        lambda _, tensors: tensors.update({"losses.1": torch.zeros(7)}),
        lambda _, tensors: tensors.pop("reader.rows"),
        lambda _, tensors: tensors.pop("reader.failed"),
        lambda _, tensors: tensors.update({"reader.rows": tensors["reader.rows"][:1]}),
        lambda _, tensors: tensors.pop("reader.writer.moment.0"),
        lambda _, tensors: tensors.pop(POSITION),
        lambda _, tensors: tensors.update({POSITION: torch.tensor(10**9)}),
        lambda _, tensors: tensors.update({POSITION: torch.tensor(-11)}),
        lambda _, tensors: tensors.update({POSITION: torch.tensor([1, 2])}),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(
    change: Callable[[dict[str, Any], dict[str, Any]], object], gpt2: Backbone, folder: Path
) -> None:
    run = stopped(gpt2, folder)
    tensors, manifest = load_tensors(run.state_path, kind=MemoryEach.kind, may_be_nan=("losses.",))
    change(manifest, tensors)
    save_tensors(run.state_path, tensors, manifest)
    before = files(folder)
    fresh_run = Run(gpt2, five_texts(gpt2), folder, SETTINGS, SIZE)
    with pytest.raises(ValueError, match=f"{run.state_path.name}.*move it away to start afresh"):
        fresh_run.resume()
    assert (fresh_run.first, fresh_run.tokens, fresh_run.seconds, fresh_run.undone) == (0, 0, 0.0, 0)
    assert isinstance(fresh_run.memories, MemoryEach)
    assert fresh_run.failed == fresh_run.memories.written == {}
    assert all(losses.isnan().all() for losses in fresh_run.losses)
    assert files(folder) == before


@pytest.mark.parametrize("change", ["removed", "other"])
def test_a_memory_that_changed_since_is_not_passed_off_as_this_runs(change: str, gpt2: Backbone, folder: Path) -> None:
    stopped(gpt2, folder)
    if change == "removed":
        (folder / "1.safetensors").unlink()
    else:
        run_to_end(Run(gpt2, five_texts(gpt2)[:2], folder, replace(SETTINGS, layers="0"), SIZE))
    with pytest.raises(ValueError, match=r"[01]\.safetensors, which it has written, was changed or removed since"):
        Run(gpt2, five_texts(gpt2), folder, SETTINGS, SIZE).resume()


def test_damaged_states_are_refused(gpt2: Backbone, folder: Path) -> None:
    path = stopped(gpt2, folder).state_path
    raw = path.read_bytes()
    fresh_run = Run(gpt2, five_texts(gpt2), folder, SETTINGS, SIZE)
    for damaged in (raw[:-1], raw[: len(raw) // 2], raw[:-9] + bytes([raw[-9] ^ 16]) + raw[-8:], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=path.name):
            fresh_run.resume()


# -------------------------------------------------------------------- names and errors


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.txt", "b.txt"], ["a", "b"]),
        (["a.txt", "in/a.txt", "a.md"], ["a", "a-2", "a-3"]),
        (["a-2.txt", "a.txt", "A.txt"], ["a-2", "a", "A-3"]),
        (["<stdin>", ".txt", "v1.2.txt", 'x:"y?.txt'], ["stdin", "txt", "v1.2", "xy"]),
        (["...", "???.txt"], ["text", "text-2"]),
        (["ä" * 150 + ".txt", "ä" * 151 + ".txt"], ["ä" * 100, "ä" * 100 + "-2"]),
    ],
)
def test_names(paths: list[str], names: list[str]) -> None:
    assert unique_names(paths) == names


def test_errors(gpt2: Backbone, tmp_path: Path) -> None:
    texts, output = five_texts(gpt2), tmp_path / "m"
    empty = replace(texts[0], ids=torch.tensor([], dtype=torch.int64))
    activation = replace(SETTINGS, init=InitSettings(rank=8, variant="mlp", init="activation"))
    for given, settings, size, message in (
        (texts, SETTINGS, 0, "a batch has 1 text or more side by side; got 0"),
        (texts, replace(SETTINGS, start_from="m"), 2, "every text gets a fresh memory; leave --memory"),
        (texts, replace(SETTINGS, compare=True), 2, "use `locas score TEXT --memory FILE` afterwards"),
        ([], SETTINGS, 2, "there is no text to read"),
        ([*texts, empty], SETTINGS, 2, r"in/0\.txt has no tokens; leave it out"),
        (texts, replace(SETTINGS, init_tokens=0), 2, "init_tokens must be 1 or more; got 0"),
        (texts, activation, 2, "rank 8 needs as many tokens, and the text has 7"),  # the last text's, found at once
    ):
        with pytest.raises(ValueError, match=message):
            Run(gpt2, given, output, settings, size)
    assert list(tmp_path.iterdir()) == []


def test_files_in_the_way(gpt2: Backbone, tmp_path: Path) -> None:
    texts, output = five_texts(gpt2), tmp_path / "m"
    output.write_text("a text that was named by mistake")
    with pytest.raises(ValueError, match="is a file; a batch of memories goes into a folder"):
        Run(gpt2, texts, output, SETTINGS, SIZE)
    output.unlink()
    output.mkdir()
    (output / "3.safetensors").write_text("something else altogether")
    with pytest.raises(ValueError, match=r"3\.safetensors is not a memory and would be overwritten"):
        Run(gpt2, texts, output, SETTINGS, SIZE)
    with pytest.raises(OSError, match="the folder /proc/self cannot be written"):
        Run(gpt2, texts, "/proc/self", SETTINGS, SIZE)
    (output / "3.safetensors").unlink()
    first, _ = run_to_end(Run(gpt2, texts, output, SETTINGS, SIZE))
    assert run_to_end(Run(gpt2, texts, output, SETTINGS, SIZE))[0] == first  # memories may be replaced
