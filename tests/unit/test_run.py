"""A run: what it reads, writes and reports, and what it is refused for."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from families import tiny_model
from helpers import same_bytes
from locas.backbone import Backbone
from locas.initialise import InitSettings
from locas.memory import load
from locas.metrics import Score, figures, sum_scores
from locas.run import Run
from locas.run_settings import parse_layers
from locas.stream import Reader
from runs import N_CHUNKS, SETTINGS, run_to_end, three_texts
from tokens import tiny_backbone, word_tokenizer

ModelOf = Callable[..., PreTrainedModel]


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
        assert results["baseline"].keys() == results.keys() - {"baseline", "undone_writes"}


BRIEF = ("tokens", "bytes", "nll", "perplexity", "bits_per_byte")


def test_comparing_changes_nothing(backbone: Backbone, output: Path) -> None:
    data, results = run_to_end(Run(backbone, three_texts(backbone), output, SETTINGS))
    compared = run_to_end(Run(backbone, three_texts(backbone), output, replace(SETTINGS, compare=True)))
    assert compared[0] == data
    assert {k: v for k, v in compared[1].items() if k != "baseline"} == results


def test_sum_of_scores() -> None:
    assert sum_scores([Score(1, 2, 3.0), Score(5, 7, 11.0)]) == Score(6, 9, 14.0)
    assert sum_scores([]) == Score(0, 0, 0.0)


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


def test_a_later_text_without_tokens_is_found_before_anything_is_read(llama: Backbone, output: Path) -> None:
    texts = three_texts(llama)
    texts[2] = replace(texts[2], ids=texts[2].ids[:0])
    with pytest.raises(ValueError, match=rf"{texts[2].name} has no tokens; leave it out"):
        Run(llama, texts, str(output), SETTINGS)
    assert not output.exists()


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


def test_a_plain_run_does_not_drop_the_cycle_silently(backbone: Backbone, output: Path) -> None:
    with pytest.raises(ValueError, match=r"cycle=5 is a locas\.cycle\.CycleRun"):
        Run(backbone, three_texts(backbone), output, replace(SETTINGS, cycle=5))


def test_weights_that_are_no_memory_are_not_overwritten(llama: Backbone, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    save_file({"lm_head.weight": torch.zeros(3, 2)}, weights)
    before = weights.read_bytes()
    with pytest.raises(ValueError, match=r"model.safetensors is not a memory and would be overwritten"):
        Run(llama, three_texts(llama), weights, SETTINGS)
    assert weights.read_bytes() == before
