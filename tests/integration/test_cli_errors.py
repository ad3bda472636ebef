"""What the command line says where it cannot go on."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

import locas
from locas.backbone import load_backbone
from locas.grow import freeze
from processes import SMALL, Main, sentences

pytestmark = pytest.mark.integration

ON_A_GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which ..."


def on_a_cpu() -> RuntimeError:
    """What torch itself raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)  # no machine has a pebibyte
    return caught.value


def raising(error: BaseException) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise error

    return refuse


# -------------------------------------------------------------------- memory runs out


@pytest.mark.parametrize(
    ("error", "more", "message"),
    [
        (
            torch.OutOfMemoryError(ON_A_GPU),
            (),
            "the GPU's memory is not enough (20.00 GiB more were asked for); try --recompute-ffn, a shorter "
            "--chunk, a shorter --window, a memory in fewer layers (--layers upper-half) or --device cpu",
        ),
        (
            on_a_cpu(),
            ("--recompute-ffn", "--layers", "0", "--attention-gradient", "full", "--model", "tiny-glu"),
            "this machine's memory is not enough (1,073,741,824.0 MiB more were asked for); try "
            "--attention-gradient values, a shorter --chunk, a shorter --window, --dtype bfloat16 or a smaller --model",
        ),
        (
            MemoryError(),
            ("--batch", "2"),
            "this machine's memory is not enough; try --recompute-ffn, a shorter --chunk, a shorter --window, "
            "a smaller --batch, a memory in fewer layers (--layers upper-half) or --dtype bfloat16",
        ),
    ],
)
def test_memory_runs_out_while_reading(
    error: BaseException, more: tuple[str, ...], message: str,
    tale: Path, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("locas.stream.Reader.next_chunk", raising(error))
    arguments = [a for a in SMALL if a not in ("--device", "cpu")]
    status, out, err = main("memorize", tale, "-o", tmp_path / "m", *arguments, *more, "--json")
    assert (status, err) == (1, f"error: {message}\n")
    assert json.loads(out) == {"error": message}


def test_flags_that_would_be_refused_are_no_advice(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locas.cli.talk._Conversation.answer", raising(MemoryError()))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n"))
    status, _, err = main("chat")
    assert status == 1
    assert err.endswith("error: this machine's memory is not enough; try fewer --max-new-tokens or --dtype bfloat16\n")


def test_memory_runs_out_while_the_backbone_is_loaded(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter windows do not help there."""
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", raising(torch.OutOfMemoryError(ON_A_GPU)))
    status, _, err = main("generate", "It was", "--dtype", "float32", "--device", "auto")
    assert status == 1
    assert err == (
        "error: the GPU's memory is not enough to load the backbone (20.00 GiB more were asked for); "
        "try --dtype bfloat16 or --device cpu\n"
    )
    with pytest.raises(torch.OutOfMemoryError) as caught:
        load_backbone()
    assert caught.value.__notes__[-1].startswith("while the model 'tiny-glu' was loaded in ")


def test_other_errors_of_torch_keep_their_traceback(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locas.cli.talk.continuation", raising(RuntimeError("The size of tensor a (3) must match")))
    with pytest.raises(RuntimeError, match="must match"):
        main("generate", "It was")
    monkeypatch.setattr("locas.cli.talk.continuation", raising(MemoryError()))
    monkeypatch.setenv("LOCAS_TRACEBACK", "1")
    with pytest.raises(MemoryError):
        main("generate", "It was")


# -------------------------------------------------------------------- wrong settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two texts, a memory (m), one of which every slot is frozen (frozen), and a damaged one."""
    folder = tmp_path_factory.mktemp("wrong")
    backbone = load_backbone(device="cpu")
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(sentences(5))
    memory = locas.create(backbone.model, backbone.encode(sentences(2))[0], rank=2, name="tiny-glu")
    memory.save(folder / "m")
    freeze(memory).save(folder / "frozen")
    raw = bytearray((folder / "m").read_bytes())
    raw[-5] ^= 1
    (folder / "damaged").write_bytes(raw)
    return folder


MEMORIZE = ("memorize", "{}/a.txt", "-o", "{}/new")
CHAT = ("chat", "--learn", "--memory", "{}/new")
EVAL = ("{}/a.txt", "-o", "{}/new")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*MEMORIZE, "--freeze"), "only a memory that exists can grow, be frozen or be thawed"),
        ((*MEMORIZE, "--grow", "-1"), "a memory grows by 1 slot or more"),
        ((*MEMORIZE, "--memory", "{}/m", "--freeze"), "every slot of {}/m is frozen: nothing can be learnt"),
        ((*MEMORIZE, "--memory", "{}/frozen"), "every slot of {}/frozen is frozen: nothing can be learnt"),
        ((*MEMORIZE, "--memory", "{}/m", "--cycle", "1"), "is for Locas-MLP"),
        ((*MEMORIZE, "--variant", "glu", "--cycle", "8"), "is for Locas-MLP"),
        ((*MEMORIZE, "--rank", "8", "--cycle", "8"), "compressing 8 slots (the memory's capacity) to 8 leaves no room"),
        ((*MEMORIZE, "--init-tokens", "0"), "init_tokens must be 1 or more; got 0"),
        ((*MEMORIZE, "--layers", "5-3"), "layers '5-3' are not understood"),
        ((*MEMORIZE, "--batch", "0"), "a batch has 1 text or more side by side; got 0"),
        ((*MEMORIZE, "--window", "32", "--chunk", "32"), "a chunk of 32 tokens does not fit into a window of 32"),
        (("memorize", "{}/a.txt", "-o", "{}/b.txt", "--batch", "2"), "b.txt is a file; -o names a folder"),
        (("score", "{}/a.txt", "--window", "32", "--chunk", "64"), "a chunk of 64 tokens does not fit"),
        (("score", "{}/a.txt", "--memory", "{}/damaged"), "is damaged"),
        (("generate", "It was", "--memory", "{}/nothing"), "there is no file"),
        (("generate", "It was", "--compare"), "--compare shows what a memory changes: add --memory FILE"),
        (("generate", "It was", "--strength", "0.5"), "--strength says how strongly a memory acts: add --memory FILE"),
        (("score", "{}/a.txt", "--memory", "{}/m", "--strength", "nan"), "--strength is a number, 1 as"),
        (("chat", "--strength", "0"), "--strength says how strongly a memory acts: add --memory FILE"),
        (("anchor", "{}/damaged", "-o", "{}/new", "--text", "{}/a.txt"), "is damaged"),
        (("compress", "{}/damaged", "-o", "{}/new", "--text", "{}/a.txt", "--rank", "1"), "is damaged"),
        (("compress", "{}/m", "-o", "{}/new", "--text", "{}/a.txt", "--rank", "0"), "--rank must be 1 or more; got 0"),
        (("compress", "{}/m", "-o", "{}", "--text", "{}/a.txt", "--rank", "1"), "is a folder; give the name of"),
        (("compress", "{}/m", "-o", "{}/no/m", "--text", "{}/a.txt", "--rank", "1"), "does not exist; create it"),
        (("compress", "{}/m", "-o", "{}/b.txt", "--text", "{}/a.txt", "--rank", "1"), "would be overwritten"),
        (("compose", "{}/m", "{}/damaged", "-o", "{}/new", "--fit", "{}/a.txt", "--fit", "{}/b.txt"), "is damaged"),
        (
            ("compose", "{}/m", "-o", "{}/new", "--fit", "{}/a.txt", "--weights", "1,2"),
            "1 memories need as many weights; got 2",
        ),
        (
            ("compose", "{}/m", "-o", "{}/new", "--model", "tiny-glu", "--reflow"),
            "--model, --reflow: composing needs no backbone and no text; add --fit TEXT for each memory, or leave them",
        ),
        (("chat", "--memory", "{}/m", "--rank", "3"), "say nothing without --learn"),
        (("chat", "--chunk", "64"), "say nothing without --learn"),
        (("chat", "--memory", "{}/damaged"), "is damaged"),
        (("eval", "books", *EVAL, "--window", "8", "--chunk", "8"), "a chunk of 8 tokens does not fit"),
        (("eval", "books", "{}/a.txt", "-o", "{}/b.txt"), "{}/b.txt is a file; -o names a folder"),
        (("eval", "books", *EVAL, "--methods", "lorca"), "there is no method 'lorca'"),
        (("eval", "dialogue", "{}/a.txt", "-o", "{}/b.txt/new"), "{}/b.txt is a file; -o names a folder"),
        (("eval", "dialogue", *EVAL, "--window", "8", "--chunk", "8"), "a chunk of 8 tokens does not fit"),
        (("eval", "forgetting", "{}/a.txt", "-o", "{}/b.txt"), "{}/b.txt is a file; -o names a folder"),
        (("eval", "forgetting", *EVAL, "--methods", ""), "--methods '' names no method"),
        (("eval", "forgetting", *EVAL, "--methods", "lorca"), "there is no method 'lorca'"),
        (("eval", "forgetting", *EVAL, "--ranks", "x"), "--ranks 'x' is not understood"),
        (("eval", "forgetting", *EVAL, "--mmlu-limit", "3"), "go with --mmlu DIR"),
        (("bench", "--quick", "--parts", "rank"), "--quick measures reading, generating, memory"),
        (("bench", "-o", "{}/b.txt"), "{}/b.txt is a file; -o names a folder"),
        (("bench", "--methods", "lora"), "there is no method lora; there are truncation"),
        (("bench", "--window", "8", "--chunk", "8"), "a chunk of 8 tokens does not fit"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_wrong_settings_are_found_before_a_backbone_is_loaded(
    arguments: tuple[str, ...], message: str, folder: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("common", "bench"):
        monkeypatch.setattr(f"locas.cli.{place}.load_backbone", raising(AssertionError("a backbone is loaded")))
    files = {p: p.read_bytes() for p in folder.iterdir()}
    status, out, err = main(*(a.replace("{}", str(folder)) for a in arguments))
    assert (status, out) == (2, "")
    assert message.replace("{}", str(folder)) in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert {p: p.read_bytes() for p in folder.iterdir()} == files


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--memory", "{}/no/new"), "does not exist; create it"),
        (("--memory", "{}/a.txt"), "is not a readable safetensors file"),
        (("--memory", "{}"), "is a folder"),
        (("--memory", "{}/frozen"), "every slot of {}/frozen is frozen"),
        (("--rank", "0"), "the rank must be 1 or more; got 0"),
        (("--rank", "705"), "705"),
        (("--window", "64"), "a chunk of 128 tokens does not fit into a window of 64"),
        (("--window", "4096"), "is longer than the 2048"),
    ],
)
def test_chat_finds_what_it_cannot_learn_with_before_the_first_reply(
    more: tuple[str, ...], message: str, folder: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("I like whales.\n"))
    given = [a.replace("{}", str(folder)) for a in (*CHAT, *more)]
    status, out, err = main(*given)
    assert (status, out) == (2, "")
    assert message.replace("{}", str(folder)) in err
    assert err.startswith("error: ")
    assert not (folder / "new").exists()


# -------------------------------------------------------------------- what is said on the way


def test_downloads_have_bars_and_loading_has_none(main: Main) -> None:
    huggingface_hub.utils.disable_progress_bars()
    main("info", "nothing")
    assert not huggingface_hub.utils.are_progress_bars_disabled()
    assert not transformers.logging.is_progress_bar_enabled()


def test_a_folder_with_an_empty_file(tmp_path: Path, main: Main) -> None:
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text(sentences(5))
    status, out, err = main("memorize", folder, "-o", tmp_path / "m.safetensors", *SMALL, "--json")
    assert status == 0
    assert f"skipped {folder / '__init__.py'}: it is empty\n" in err
    assert [d["name"] for d in json.loads(out)["documents"]] == ["a.py"]


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rich they are markup: [vol 1] would vanish, and [/b] raise."""
    (tmp_path / "in [").mkdir()
    names = ("book [vol 1].txt", "in [/b].txt")
    for i, name in enumerate(names):
        (tmp_path / name).write_text(sentences(5, seed=i))
    output = tmp_path / "m [vol 1].safetensors"
    monkeypatch.setattr("locas.cli.common.err._force_terminal", True)
    monkeypatch.setattr("locas.cli.common.out.width", 400)
    status, out, err = main("memorize", tmp_path, "-o", output, *SMALL)
    assert status == 0
    assert str(output) in out
    assert names[1] in err  # at the bar, where it was last drawn
    status, out, _ = main("info", output)
    assert status == 0
    assert all(f"{name}: 40 tokens" in out for name in names)
    status, _, err = main("score", tmp_path / names[0], "--max-tokens", "40", "--window", "32")
    assert status == 0
    assert names[0] in err
    merged, original = tmp_path / "merged [vol 1]", tmp_path / "original [vol 1]"
    for status, out, _ in (main("merge", output, "-o", merged), main("unmerge", merged, "-o", original)):
        assert status == 0
        assert "[vol 1]" in out
    assert f"  {original / 'locas_memories' / output.name}\n" in out
    assert f"memory             {output.name}: rank 2" in main("info", merged)[1]


def test_bars_of_what_takes_minutes(tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, name in enumerate("ab"):
        (tmp_path / f"{name}.txt").write_text(sentences(9, seed=i))
        assert main("memorize", tmp_path / f"{name}.txt", "-o", tmp_path / name, *SMALL)[0] == 0
    parts, text = (tmp_path / "a", tmp_path / "b"), tmp_path / "a.txt"
    commands: dict[tuple[object, ...], tuple[str, ...]] = {
        ("compose", *parts, "--fit", text, "--fit", tmp_path / "b.txt"): ("fitting", "measuring"),
        ("compress", tmp_path / "a", "--text", text, "--rank", "1"): ("compressing", "measuring"),
        ("anchor", tmp_path / "a", "--text", text, "--tokens", "40"): (
            "the backbone writes 50 tokens", "anchoring", "measuring",
        ),
    }  # fmt: skip
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("locas.cli.common.err.is_interactive", True)
    for live in (False, True):
        monkeypatch.setattr("locas.cli.common.err._force_terminal", live)
        monkeypatch.setattr("locas.cli.bars._LINE_EVERY_S", 0.0)
        for command, bars in commands.items():
            status, _, err = main(*command, "-o", tmp_path / "new", "--json")
            assert status == 0
            assert not [what for what in bars if what not in err and (live or what != "anchoring")]
            assert "100%" in err
