"""A run that is stopped anywhere and goes on leaves the file and the figures of one that was not."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from families import tiny_model
from helpers import same_bytes, text
from locas.backbone import Backbone
from locas.initialise import InitSettings
from locas.memory import load
from locas.metrics import Score
from locas.run import STATE_FORMAT, Run, RunSettings, Text, figures, parse_layers, sum_scores
from locas.store import load_tensors, save_tensors
from locas.stream import Reader, ReadSettings
from locas.write import WriteSettings
from tokens import tiny_backbone, word_tokenizer, words

ModelOf = Callable[..., PreTrainedModel]
SETTINGS = RunSettings(
    init=InitSettings(rank=3, tau_scale=8.0), read=ReadSettings(window=29, chunk=11, write=WriteSettings(lr=0.1))
)
LENGTHS = (23, 31, 11)
N_CHUNKS = 3 + 3 + 1


def make_text(backbone: Backbone, n_tokens: int, seed: int) -> Text:
    string = words(text(n_tokens, seed=seed))
    ids, n_bytes = backbone.encode(string)
    return Text(f"{seed}.txt", ids, n_bytes, hashlib.sha256(string.encode()).hexdigest())


def three_texts(backbone: Backbone) -> list[Text]:
    return [make_text(backbone, n, seed) for seed, n in enumerate(LENGTHS)]


def run_to_end(run: Run) -> tuple[bytes, dict[str, Any]]:
    """The finished file, and the figures but for the time that they took."""
    for _ in run:
        pass
    run.finish()
    results = json.loads(json.dumps(run.results()))
    assert results.pop("seconds") >= 0
    if "baseline" in results:
        assert results["baseline"].pop("seconds") >= 0
    return run.output.read_bytes(), results


@pytest.fixture(params=["llama", "gpt2"])
def backbone(request: pytest.FixtureRequest, model_of: ModelOf) -> Backbone:
    """Locas-GLU with top-k, and Locas-MLP whose empty slots are filled while reading."""
    return tiny_backbone(model_of(request.param, torch.float32))


@pytest.fixture
def llama(model_of: ModelOf) -> Backbone:
    return tiny_backbone(model_of("llama", torch.float32))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "m.safetensors"


# -------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("compare", [False, True])
def test_a_run_reads_all_texts_and_notes_them(compare: bool, backbone: Backbone, output: Path) -> None:
    texts = three_texts(backbone)
    run = Run(backbone, texts, output, replace(SETTINGS, compare=compare))
    progress = list(run)
    assert len(progress) == N_CHUNKS
    assert [p.document for p in progress] == [0] * 3 + [1] * 3 + [2]
    assert [p.tokens for p in progress] == [11, 22, 23, 34, 45, 54, 65]
    assert run.total_tokens == 65
    assert all(one.tokens < other.tokens for one, other in pairwise(progress))
    assert all((p.baseline is not None) == compare for p in progress)
    assert not output.exists()
    run.finish()
    memory = load(output, backbone.model)
    assert [(d.name, d.tokens, d.text_sha256) for d in memory.provenance.documents] == [
        (t.name, t.ids.numel(), t.sha256) for t in texts
    ]
    assert memory.provenance.tokenizer_sha256 == backbone.tokenizer_sha256
    assert memory.provenance.backbone == "tiny"
    assert memory.provenance.settings["read"]["window"] == 29
    assert memory.provenance.settings["read"]["start_in_every_window"] is True  # resolved, not None
    assert same_bytes(memory.bank.rows, run.memory.bank.rows)
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("compare", [False, True])
def test_the_figures_are_those_of_the_reader(compare: bool, backbone: Backbone, output: Path) -> None:
    texts = three_texts(backbone)
    run = Run(backbone, texts, output, replace(SETTINGS, compare=compare))
    bank = run.memory.bank.clone()
    _, results = run_to_end(run)
    settings = replace(SETTINGS.read, start_in_every_window=True)
    total = 0.0
    for i, each in enumerate(texts):
        records = Reader(backbone.model, bank, [each.ids], settings, start_id=1)
        nll = float(torch.cat([r.nll for (r,) in records if r]).double().sum())
        assert results["documents"][i]["nll"] == pytest.approx(nll, rel=1e-12)
        assert results["documents"][i] == {"name": each.name} | {
            k: v for k, v in figures(Score(each.ids.numel(), each.n_bytes, nll), 0, 0, 0).items() if k in BRIEF
        }
        total += nll
    assert results["nll"] == pytest.approx(total, rel=1e-12)
    assert results["tokens"] == 65
    assert results["bytes"] == sum(t.n_bytes for t in texts)
    assert results["memory_parameters"] == bank.n_parameters
    assert results["backbone_parameters"] == sum(p.numel() for p in backbone.model.parameters())
    assert ("baseline" in results) == compare
    if compare:
        plain = 0.0
        for each in texts:
            records = Reader(backbone.model, None, [each.ids], settings, start_id=1)
            plain += float(torch.cat([r.nll for (r,) in records if r]).double().sum())
        assert results["baseline"]["nll"] == pytest.approx(plain, rel=1e-12)
        assert results["baseline"]["memory_parameters"] == 0
        assert results["baseline"].keys() == results.keys() - {"baseline"}


BRIEF = ("tokens", "bytes", "nll", "perplexity", "bits_per_byte")


def test_comparing_changes_nothing(backbone: Backbone, output: Path) -> None:
    data, results = run_to_end(Run(backbone, three_texts(backbone), output, SETTINGS))
    compared = run_to_end(Run(backbone, three_texts(backbone), output, replace(SETTINGS, compare=True)))
    assert compared[0] == data
    assert {k: v for k, v in compared[1].items() if k != "baseline"} == results


def test_sum_of_scores() -> None:
    assert sum_scores([Score(1, 2, 3.0), Score(5, 7, 11.0)]) == Score(6, 9, 14.0)
    assert sum_scores([]) == Score(0, 0, 0.0)


# -------------------------------------------------------------------- stopping and going on


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
    tensors, manifest = load_tensors(run.state_path, kind=STATE_FORMAT, may_be_nan=("losses.",))
    change(manifest, tensors)
    save_tensors(run.state_path, tensors, manifest)
    fresh = Run(llama, three_texts(llama), output, SETTINGS)
    rows, tau = fresh.memory.bank.rows.clone(), fresh.memory.bank.tau.clone()
    with pytest.raises(ValueError, match=f"{run.state_path.name}.*move it away to start afresh"):
        fresh.resume()
    assert (fresh.document, fresh.tokens, fresh.seconds, fresh.undone) == (0, 0, 0.0, 0)
    assert fresh.memory.provenance.documents == ()
    assert same_bytes(fresh.memory.bank.rows, rows)
    assert same_bytes(fresh.memory.bank.tau, tau)
    assert all(losses.isnan().all() for losses in fresh.losses)


# -------------------------------------------------------------------- going on with a memory


def test_going_on_with_a_memory(llama: Backbone, output: Path, tmp_path: Path) -> None:
    first, second, third = three_texts(llama)
    run_to_end(Run(llama, [first], tmp_path / "first.safetensors", replace(SETTINGS, layers="0,2")))
    begun = (tmp_path / "first.safetensors").read_bytes()
    settings = replace(SETTINGS, start_from=str(tmp_path / "first.safetensors"), init=InitSettings(rank=7))
    expected = run_to_end(Run(llama, [second, third], output, settings))
    memory = load(output, llama.model)
    assert [d.name for d in memory.provenance.documents] == ["0.txt", "1.txt", "2.txt"]
    assert memory.bank.ranks == {0: 3, 2: 3}
    assert memory.provenance.settings["init"]["rank"] == 3
    assert (tmp_path / "first.safetensors").read_bytes() == begun
    for chunks in (1, 3, 4):
        run = Run(llama, [second, third], output, settings)
        steps = iter(run)
        for _ in range(chunks):
            next(steps)
        run.save_state()
        run = Run(llama, [second, third], output, settings)
        assert run.resume()
        assert run_to_end(run) == expected
    fresh = run_to_end(Run(llama, [second, third], tmp_path / "fresh.safetensors", replace(SETTINGS, layers="0,2")))
    assert fresh[1]["nll"] != expected[1]["nll"]


def test_another_memory_under_the_same_name_is_another_run(llama: Backbone, output: Path, tmp_path: Path) -> None:
    first, second, third = three_texts(llama)
    begin = tmp_path / "first.safetensors"
    keys = set()
    for each in (first, third):
        run_to_end(Run(llama, [each], begin, SETTINGS))
        keys.add(Run(llama, [second], output, replace(SETTINGS, start_from=str(begin))).key)
    assert len(keys) == 2


def test_a_memory_of_another_tokenizer_or_backbone_is_refused(llama: Backbone, output: Path, tmp_path: Path) -> None:
    begin = tmp_path / "first.safetensors"
    run_to_end(Run(llama, three_texts(llama)[:1], begin, SETTINGS))
    settings = replace(SETTINGS, start_from=str(begin))
    other = tiny_backbone(llama.model, word_tokenizer(adds_bos=False))
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        Run(other, three_texts(llama), output, settings)
    other = tiny_backbone(tiny_model("llama", torch.float32, seed=1))
    with pytest.raises(ValueError, match="load the backbone that it was made with"):
        Run(other, three_texts(llama), output, settings)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Run(llama, three_texts(llama), output, replace(SETTINGS, start_from=str(tmp_path / "no")))


# -------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("tokenizer", "asked", "used"),
    [({}, None, True), ({"adds_bos": False}, None, False), ({"adds_bos": False}, True, True), ({}, False, False)],
)
def test_the_start_token_goes_before_every_window_as_the_tokenizer_does(
    tokenizer: dict[str, bool], asked: bool | None, used: bool, llama: Backbone, output: Path
) -> None:
    backbone = tiny_backbone(llama.model, word_tokenizer(**tokenizer))
    read = replace(SETTINGS.read, start_in_every_window=asked)
    run = Run(backbone, three_texts(backbone), output, replace(SETTINGS, read=read))
    assert run.settings.read.start_in_every_window is used
    run_to_end(run)
    assert load(output).provenance.settings["read"]["start_in_every_window"] is used
    assert int(run.losses[0].isnan().sum()) == 0  # the start token makes the first token predictable


def test_without_a_start_token_the_first_token_is_not_scored(llama: Backbone, output: Path) -> None:
    backbone = tiny_backbone(llama.model, word_tokenizer(bos=False, eos=False))
    assert backbone.start_id is None
    _, results = run_to_end(Run(backbone, three_texts(backbone), output, replace(SETTINGS, compare=True)))
    assert results["tokens"] == results["baseline"]["tokens"] == 65 - 3
    assert results["bytes"] == sum(t.n_bytes for t in three_texts(backbone))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all", None),
        ("upper-half", [3, 4, 5, 6]),
        ("0", [0]),
        ("6", [6]),
        ("3,4,5", [3, 4, 5]),
        ("2-5", [2, 3, 4, 5]),
        ("0,3-5", [0, 3, 4, 5]),
        ("5,0,5,4-5", [0, 4, 5]),
        (" 1 , 2 ", [1, 2]),
        ("2-2", [2]),
    ],
)
def test_layers(given: str, expected: list[int] | None) -> None:
    assert parse_layers(given, 7) == expected


@pytest.mark.parametrize(
    "given", ["", "x", "1,", ",", "1;2", "1-", "-1", "-", "1--2", "1-2-3", "lower-half", "1.5", "5-2", "0,5-2", "ALL"]
)
def test_layers_that_are_not_understood(given: str) -> None:
    with pytest.raises(ValueError, match='are not understood; give "all", "upper-half", or numbers such as 0,3-5'):
        parse_layers(given, 7)


@pytest.mark.parametrize("given", ["7", "0,7", "3-7", "0-99999999999999"])
def test_layers_that_the_model_does_not_have(given: str) -> None:
    with pytest.raises(ValueError, match=r"do not fit this backbone, which has layers 0\.\.6"):
        parse_layers(given, 7)


def test_outputs_that_cannot_be(llama: Backbone, tmp_path: Path) -> None:
    texts = three_texts(llama)
    with pytest.raises(
        FileNotFoundError, match=r"the folder .*nowhere does not exist; create it, or choose another -o"
    ):
        Run(llama, texts, tmp_path / "nowhere" / "m.safetensors", SETTINGS)
    with pytest.raises(ValueError, match=r"is a folder; give the name of the memory file, e\.g\. .*/m\.safetensors"):
        Run(llama, texts, tmp_path, SETTINGS)
    with pytest.raises(OSError, match=r"the folder /proc/self cannot be written .*choose another -o"):
        Run(llama, texts, "/proc/self/m.safetensors", SETTINGS)
    with pytest.raises(ValueError, match="there is no text to read"):
        Run(llama, [], tmp_path / "m.safetensors", SETTINGS)
    with pytest.raises(ValueError, match="init_tokens must be 1 or more; got 0"):
        Run(llama, texts, tmp_path / "m.safetensors", replace(SETTINGS, init_tokens=0))
    assert list(tmp_path.iterdir()) == []


def test_init_tokens_choose_the_basis(llama: Backbone, output: Path) -> None:
    texts = three_texts(llama)
    chunk, same, more = (
        Run(llama, texts, output, replace(SETTINGS, init_tokens=n)).memory.bank.rows for n in (None, 11, 23)
    )
    assert same_bytes(chunk, same)
    assert not torch.equal(chunk, more)


def test_an_output_that_is_something_else_is_not_overwritten(llama: Backbone, output: Path) -> None:
    for content in ("a text that was named by mistake", "short", "12345678["):
        output.write_text(content)
        with pytest.raises(ValueError, match="is not a memory and would be overwritten; delete it, or choose another"):
            Run(llama, three_texts(llama), output, SETTINGS)
        assert output.read_text() == content
    output.write_text("")
    run_to_end(Run(llama, three_texts(llama), output, SETTINGS))
    run_to_end(Run(llama, three_texts(llama), output, SETTINGS))
