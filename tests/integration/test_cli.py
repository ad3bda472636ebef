"""The command line: in processes of its own where that is the point, in this one where it is not."""

import io
import json
import math
import random
import re
import shlex
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import locas.cli
from locas.backbone import load_backbone
from locas.memory import load, read
from locas.store import load_tensors
from locas.stream import ReadSettings
from processes import SMALL, Forks, Locas, Main, command, environment, in_new_python, sentences

pytestmark = pytest.mark.integration

SHARED = Path(__file__).parents[2].parent / "shared"
SIZES = ("--window", "128", "--chunk", "64", "--rank", "8")
KEYS = {"tokens", "bytes", "nll", "perplexity", "bits_per_byte", "memory_parameters", "backbone_parameters", "seconds"}


@pytest.fixture(scope="module")
def whole(tale: Path, tmp_path_factory: pytest.TempPathFactory, locas: Locas) -> tuple[Path, dict[str, Any]]:
    """(the memory file of an undisturbed run over the tale, what it printed)."""
    output = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    done = locas("memorize", tale, "-o", output, *SIZES, "--json", "--compare")
    assert list(output.parent.iterdir()) == [output]
    return output, json.loads(done.stdout)


def check_figures(figures: dict[str, Any]) -> None:
    assert figures.keys() >= KEYS
    assert figures["perplexity"] == pytest.approx(math.exp(figures["nll"] / figures["tokens"]), rel=1e-12)
    assert figures["bits_per_byte"] == pytest.approx(figures["nll"] / math.log(2) / figures["bytes"], rel=1e-12)
    assert figures["seconds"] > 0
    for key in ("tokens", "bytes", "nll"):
        assert figures[key] == pytest.approx(sum(d[key] for d in figures["documents"]))


# -------------------------------------------------------------------- memorize and score


def test_the_figures_that_memorize_prints(whole: tuple[Path, dict[str, Any]], tale: Path) -> None:
    output, results = whole
    check_figures(results)
    check_figures(results["baseline"])
    assert 1300 < results["tokens"] < 1700
    assert results["tokens"] == results["baseline"]["tokens"]
    assert results["bytes"] == results["baseline"]["bytes"] == len(tale.read_bytes())
    assert results["memory_parameters"] == 3 * 8 * 192 * 6
    assert results["baseline"]["memory_parameters"] == 0
    assert results["backbone_parameters"] == results["baseline"]["backbone_parameters"] == 4_230_336
    assert results["nll"] < results["baseline"]["nll"]  # it repeats itself, so a memory helps
    assert results["memory"] == str(output)
    assert [d["name"] for d in results["documents"]] == ["tale.txt"]


def test_the_same_command_gives_the_same_bytes_in_a_new_python(
    whole: tuple[Path, dict[str, Any]], tale: Path, tmp_path: Path
) -> None:
    done = in_new_python("memorize", tale, "-o", tmp_path / "m.safetensors", *SIZES)
    assert (tmp_path / "m.safetensors").read_bytes() == whole[0].read_bytes()
    assert "with memory" in done.stdout
    assert f"{whole[1]['perplexity']:.2f}" in done.stdout
    assert "without memory" not in done.stdout
    assert "ppl" in done.stderr


def test_a_new_process_scores_with_the_memory_as_this_one_does(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, locas: Locas
) -> None:
    text = sentences(60, seed=1)
    (tmp_path / "more.txt").write_text(text)
    arguments = ("--window", "128", "--chunk", "64", "--json")
    results = json.loads(locas("score", tmp_path / "more.txt", "--memory", whole[0], *arguments).stdout)
    check_figures(results)
    check_figures(results["baseline"])
    backbone = load_backbone(device="cpu")
    ids, n_bytes = backbone.encode(text)
    assert (results["tokens"], results["bytes"]) == (ids.numel(), n_bytes)
    settings = ReadSettings(window=128, chunk=64, start_in_every_window=backbone.start_in_every_window)
    for memory, found in ((load(whole[0], backbone.model), results), (None, results["baseline"])):
        records = read(backbone.model, memory, ids, settings, start_id=backbone.start_id, learn=False)
        assert found["nll"] == pytest.approx(float(torch.cat([r.nll for r in records]).double().sum()), rel=1e-6)
    assert results["nll"] < results["baseline"]["nll"]


def test_reading_from_standard_input(tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(sentences(5).encode())))
    status, out, _ = main("memorize", "-", "-o", tmp_path / "m.safetensors", *SMALL, "--json")
    assert status == 0
    assert [d["name"] for d in json.loads(out)["documents"]] == ["<stdin>"]
    assert json.loads(out)["tokens"] == 40
    assert load(tmp_path / "m.safetensors").provenance.documents[0].tokens == 40


def test_reading_a_folder(tmp_path: Path, main: Main) -> None:
    folder = tmp_path / "texts"
    (folder / "in").mkdir(parents=True)
    for i, name in enumerate(["b.txt", "a.txt", "in/c.txt"]):
        (folder / name).write_text(sentences(5, seed=i))
    output = folder / "m.safetensors"
    for _ in range(2):  # the memory that then lies there is not taken for a text
        status, out, _ = main("memorize", folder, "-o", output, *SMALL, "--json", "--compare")
        assert status == 0
        results = json.loads(out)
        check_figures(results)
        check_figures(results["baseline"])
        assert [d["name"] for d in results["documents"]] == ["a.txt", "b.txt", "in/c.txt"]


def test_a_name_that_is_not_utf8(tmp_path: Path, main: Main, tale: Path) -> None:
    name = b"tale-\xff.txt".decode("utf-8", "surrogateescape")
    try:
        (tmp_path / name).write_bytes(tale.read_bytes())
    except OSError:
        pytest.skip("this file system has only UTF-8 names")
    output = tmp_path / "m.safetensors"
    status, out, err = main("memorize", tmp_path / name, "-o", output, *SMALL, "--json", "--save-every", "0")
    assert status == 0, err
    assert json.loads(out)["documents"][0]["name"] == name
    assert load(output).provenance.documents[0].name == name
    assert main("info", output, "--json")[0] == 0


def test_going_on_with_a_memory(tmp_path: Path, main: Main, tale: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    assert main("memorize", tale, "-o", first, *SMALL)[0] == 0
    assert main("memorize", tale, "-o", second, *SMALL, "--memory", first)[0] == 0
    assert [d.tokens for d in load(second).provenance.documents] == [40, 40]


def test_resume_where_nothing_was_stopped(tmp_path: Path, main: Main, tale: Path) -> None:
    one, other = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    assert main("memorize", tale, "-o", one, *SMALL)[0] == 0
    status, _, err = main("memorize", tale, "-o", other, *SMALL, "--resume")
    assert status == 0
    assert "no stopped run of these settings here: starting afresh" in err
    assert one.read_bytes() == other.read_bytes()


def test_a_stopped_run_of_other_settings_is_kept(tmp_path: Path, main: Main, tale: Path) -> None:
    output = tmp_path / "m[1].safetensors"
    other = tmp_path / "m[1].safetensors.01234567.partial"
    other.write_bytes(b"of another run")
    status, _, err = main("memorize", tale, "-o", output, *SMALL, "--resume")
    assert status == 0
    assert f"a stopped run of other settings is kept in {other}\n" in err
    assert other.read_bytes() == b"of another run"


# -------------------------------------------------------------------- stopping


def test_ctrl_c_says_how_to_go_on(whole: tuple[Path, dict[str, Any]], tale: Path, tmp_path: Path, forks: Forks) -> None:
    output = tmp_path / "my memory.safetensors"
    process = forks.start("memorize", tale, "-o", output, *SIZES, "--json", "--compare", "--save-every", "1000")
    process.alive_until(lambda: "tokens" in process.err.read_text())
    process.send_signal(signal.SIGINT)
    out, err = process.finish()
    assert process.returncode == 130
    stopped = json.loads(out)
    assert stopped["stopped"] is True
    assert 0 < stopped["tokens"] < stopped["total_tokens"] == whole[1]["tokens"]
    assert "nothing is lost. Go on with:" in err
    assert not output.exists()
    how = shlex.split(err.strip().splitlines()[-1])
    assert how[0] == "locas"
    assert how[-1] == "--resume"
    done = forks.run(*how[1:])
    assert f"going on at token {stopped['tokens']:,} of" in done.stderr
    assert output.read_bytes() == whole[0].read_bytes()
    results = json.loads(done.stdout)
    for mine, theirs in ((results, whole[1]), (results["baseline"], whole[1]["baseline"])):
        assert {k: mine[k] for k in KEYS - {"seconds"}} == {k: theirs[k] for k in KEYS - {"seconds"}}
    assert list(tmp_path.iterdir()) == [output]


def test_killed_at_any_moment(whole: tuple[Path, dict[str, Any]], tale: Path, tmp_path: Path, forks: Forks) -> None:
    output = tmp_path / "m.safetensors"
    arguments = ("memorize", tale, "-o", output, *SIZES, "--save-every", "0", "--resume")
    moments = random.Random(0)

    def states() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.partial")}

    for _ in range(3):
        before = states()
        process = forks.start(*arguments)
        process.alive_until(lambda before=before: states() != before)
        time.sleep(moments.uniform(0, 0.1))  # all three together well before the last of its 24 chunks
        process.kill()
        found = [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.partial")]
        assert found
        for path in found:
            kind = "locas-run" if path.suffix == ".partial" else "locas-memory"
            load_tensors(path, kind=kind, may_be_nan=("losses.",))
    done = forks.run(*arguments)
    assert "going on at token" in done.stderr
    assert output.read_bytes() == whole[0].read_bytes()
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == [output.name]


def test_a_second_ctrl_c_breaks_off(tale: Path, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, with what the last state holds."""

    def twice(self: object) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("locas.stream.Reader.next_chunk", twice)
    before = signal.getsignal(signal.SIGINT)
    status, _, err = main("memorize", tale, "-o", tmp_path / "m.safetensors", *SMALL)
    assert status == 130
    assert "stopping after this chunk (once more to break off at once)" in err
    assert signal.getsignal(signal.SIGINT) is before
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("memorize", "{}/nothing.txt", "-o", "{}/m"), "There is no file or folder"),
        (("memorize", "{}/empty.txt", "-o", "{}/m"), "is empty"),
        (("memorize", "{}/blank.txt", "-o", "{}/m"), "only white space"),
        (("memorize", "{}/damaged.safetensors", "-o", "{}/m"), "is not text"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--window", "1"), "a window needs at least 2 tokens; got 1"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--window", "4096"), "a window of 4096 tokens is longer than the 2048"),
        (
            ("memorize", "{}/t.txt", "-o", "{}/m", "--window", "32", "--chunk", "32"),
            "a chunk of 32 tokens does not fit",
        ),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--chunk", "0"), "a chunk needs at least 1 token"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--rank", "0"), "the rank must be 1 or more; got 0"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--rank", "705"), "rank"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--lr", "-1"), "lr must be a positive number"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--layers", "6"), "which has layers 0..5"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--layers", "some"), "are not understood"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--max-tokens", "0"), "--max-tokens must be 1 or more; got 0"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--save-every", "-1"), "--save-every is a number of seconds"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--preset", "best"), "--preset 'best' is not one of default, paper"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--init-tokens", "0"), "init_tokens must be 1 or more"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--gutenberg"), "Gutenberg"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--device", "gpu"), "'gpu' is not a device"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--model", "{}/nothing"), "could not be loaded"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--memory", "{}/nothing"), "there is no file"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--memory", "{}/damaged.safetensors"), "damaged"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--memory", "{}/other.safetensors"), "with the backbone 'another'"),
        (
            ("memorize", "{}/t.txt", "-o", "{}/m", "--memory", "{}/other.safetensors", "--rank", "3", "--layers", "1"),
            "--rank, --layers and --memory do not go together",
        ),
        (
            ("memorize", "{}/t.txt", "-o", "{}/m", "--memory", "{}/other.safetensors", "--grow", "2", "--rank", "3"),
            "--rank and --memory do not go together",
        ),
        (("memorize", "{}/t.txt", "-o", "{}/nowhere/m"), "does not exist; create it"),
        (("memorize", "{}/t.txt", "-o", "{}"), "is a folder; give the name of the memory file"),
        (("memorize", "{}/t.txt", "-o", "/proc/self/m"), "the folder /proc/self cannot be written"),
        (("memorize", "{}/t.txt", "-o", "{}/t.txt"), "would be overwritten"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--window", "long"), "--window"),
        (("memorize", "{}/t.txt"), "--output"),
        (("memorize", "{}/t.txt", "-o", "{}/m", "--wimdow", "32"), "--wimdow"),
        (("score", "{}/nothing.txt"), "There is no file or folder"),
        (("score", "{}/t.txt", "--memory", "{}/other.safetensors"), "with the backbone 'another'"),
        (("score", "{}/t.txt", "--memory", "{}/t.txt"), "is not a readable safetensors file"),
        (("score", "{}/t.txt", "--window", "1"), "a window needs at least 2 tokens"),
        (("score", "{}/t.txt", "--max-tokens", "-5"), "--max-tokens must be 1 or more"),
        (("info", "{}/nothing"), "there is no file"),
        (("info", "{}/damaged.safetensors"), "damaged"),
        (("generate", " "), "the prompt is empty"),
        (("generate", "Call me", "--max-new-tokens", "0"), "--max-new-tokens must be 1 or more"),
        (("generate", "Call me", "--max-new-tokens", "2100"), "leaves no room for the prompt"),
        (("generate", "Call me", "--top-p", "0"), "--top-p in"),
        (("generate", "Call me", "--memory", "{}/other.safetensors"), "with the backbone 'another'"),
        (("chat", "--learn"), "--learn needs a file to write into: add --memory FILE"),
        (("chat", "--memory", "{}/nothing"), "there is no file"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_errors(arguments: tuple[str, ...], message: str, bench: Path, main: Main) -> None:
    files = {p: p.read_bytes() for p in bench.iterdir()}
    given = [a.replace("{}", str(bench)) for a in arguments]
    status, out, err = main(*given)
    assert status == 2
    assert out == ""
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert "tyro" not in err
    if "helptext" not in err:  # what the parser of arguments finds, it draws
        assert err.startswith("error: ")
        assert len([line for line in err.splitlines() if line.strip()]) == 1
    if arguments[0] != "chat":
        status, out, _ = main(*given, "--json")
        assert status == 2
        assert json.loads(out).keys() == {"error"}
        assert message in " ".join(json.loads(out)["error"].split())
    assert {p: p.read_bytes() for p in bench.iterdir()} == files


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a damaged memory and one of another backbone."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "t.txt").write_text(sentences(5))
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n")
    backbone = load_backbone(device="cpu")
    memory = locas.create(backbone.model, backbone.encode(sentences(2))[0], rank=2, name="tiny-glu")
    memory.save(folder / "damaged.safetensors")
    raw = bytearray((folder / "damaged.safetensors").read_bytes())
    raw[-5] ^= 1
    (folder / "damaged.safetensors").write_bytes(raw)
    memory.provenance = replace(memory.provenance, backbone="another", backbone_fingerprint="0" * 64)
    memory.save(folder / "other.safetensors")
    return folder


def test_nobody_reads_the_output_any_more() -> None:
    process = subprocess.Popen(command("--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert (process.wait(60), said) == (141, "")


def test_a_traceback_for_those_who_ask(bench: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAS_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main("info", bench / "nothing")


# -------------------------------------------------------------------- info, generate, chat


def test_info(whole: tuple[Path, dict[str, Any]], main: Main) -> None:
    output, results = whole
    status, out, _ = main("info", output)
    assert status == 0
    for part in ("Locas-GLU, silu, format 1", "tiny-glu", f"{results['tokens']:,} tokens", "tale.txt", "rule=muon"):
        assert part in out
    status, out, _ = main("info", output, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["parameters"] == results["memory_parameters"]
    assert found["file_bytes"] == output.stat().st_size
    assert found["ranks"] == {str(i): 8 for i in range(6)}
    assert found["documents"][0]["tokens"] == results["tokens"]
    assert found["mean_row_norms"].keys() == found["ranks"].keys()
    assert found["settings"]["read"]["window"] == 128


def test_strength_is_between_the_backbone_and_all_that_was_learnt(
    whole: tuple[Path, dict[str, Any]], tale: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = ("score", tale, "--memory", whole[0], "--json", "--strength")
    none, half, one = (json.loads(main(*score, strength)[1]) for strength in (0, 0.5, 1))
    assert none["nll"] == none["baseline"]["nll"]
    assert one["nll"] < half["nll"] < none["nll"]
    said = {}
    for strength in (0, 1):
        monkeypatch.setattr("sys.stdin", io.StringIO("Once more.\n"))
        said["chat", strength] = main("chat", "--memory", whole[0], "--temperature", "0", "--strength", strength)[1]
        generate = ("generate", "Once", "--memory", whole[0], "--temperature", "0", "--compare", "--json")
        said["generate", strength] = json.loads(main(*generate, "--strength", strength)[1])
    assert said["chat", 0] != said["chat", 1]
    assert said["generate", 0]["text"] == said["generate", 0]["baseline"]["text"] != said["generate", 1]["text"]


# -------------------------------------------------------------------- checkpoints that others trained


def test_checkpoints_that_others_trained(tmp_path: Path, main: Main, locas: Locas) -> None:
    models = [SHARED / "models" / "foreign" / name for name in ("stories260k", "tiny1m")]
    stories = SHARED / "data" / "stories" / "tinystories_1000.json"
    for path in (*models, stories):
        if not path.exists():
            pytest.skip(f"{path} is not here; it comes with the project's shared folder")
    told = [s for s in json.loads(stories.read_text()) if s.isascii()]
    (tmp_path / "read.txt").write_text("\n".join(told[:3]))
    (tmp_path / "score.txt").write_text(told[3])
    for model in models:
        memory = tmp_path / f"{model.name}.safetensors"
        sizes = ("--window", "128", "--chunk", "64", "--model", model, "--json")
        status, out, err = main("memorize", tmp_path / "read.txt", "-o", memory, *sizes, "--rank", "8", "--compare")
        assert status == 0, err
        check_figures(json.loads(out))
        assert json.loads(out)["baseline"]["perplexity"] < 20  # it reads what it was trained on
        assert load(memory).provenance.settings["read"]["start_in_every_window"] is True
        score = ("score", tmp_path / "score.txt", "--memory", memory, *sizes)
        here, there = json.loads(main(*score)[1]), json.loads(locas(*score).stdout)
        assert here["nll"] != here["baseline"]["nll"]
        for mine, theirs in ((here, there), (here["baseline"], there["baseline"])):
            assert {k: mine[k] for k in KEYS - {"seconds"}} == pytest.approx(
                {k: theirs[k] for k in KEYS - {"seconds"}}, rel=1e-6
            )
        status, _, err = main("score", tmp_path / "score.txt", "--memory", memory)
        assert status == 2
        assert "this memory was made for" in err or "load the backbone that it was made with" in err


def test_help_shows_one_sentence_a_command_and_the_examples_of_each(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, listed, _ = main("--help")
    commands = re.findall(r"• (\w+) +(\S.*)", listed)
    assert {"memorize", "score", "merge", "eval"} < {name for name, _ in commands}
    assert not [text for _, text in commands if "locas memorize" in text]
    for name, _ in commands:
        _, text, _ = main(name, "--help")
        assert "(default: )" not in text
        assert name in ("eval", "demo") or re.search(rf"^    locas {name} ", text, flags=re.M), text
    assert "learnt.\n\n" in main("score", "--help")[1]
