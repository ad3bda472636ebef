"""`locas chat` and `locas generate`, in processes of their own where that is the point."""

import io
import json
from pathlib import Path

import pytest

from locas.backbone import load_backbone
from locas.cli.talk import _Listener
from locas.memory import load
from locas.stream import ReadSettings
from processes import Locas, Main

pytestmark = pytest.mark.integration


def test_chat_learns_and_a_new_process_knows(tmp_path: Path, locas: Locas) -> None:
    memory = tmp_path / "me.safetensors"
    arguments = ("--memory", memory, "--rank", "4", "--max-new-tokens", "8", "--temperature", "0")
    talk = "My name is Ishmael, and I live in Nantucket.\nI like whales.\n"
    replies = locas("chat", "--learn", *arguments, stdin=talk).stdout.splitlines()
    assert len(replies) == 2
    found = load(memory)
    assert [d.name for d in found.provenance.documents] == ["<chat>", "<chat>"]
    backbone, said = load_backbone(), talk.splitlines()
    first = f"You: {said[0]}\n"
    (n, _), (both, _) = (
        (ids.numel(), n_bytes) for ids, n_bytes in map(backbone.encode, (first, f"{first}Me: {replies[0]}\n"))
    )
    whole = backbone.encode(f"{first}Me: {replies[0]}\nYou: {said[1]}\n")[0].numel()
    assert [d.tokens for d in found.provenance.documents] == [n, whole - both]  # the replies are not learnt
    assert bool(found.bank.slots(0).v.any())
    before = memory.read_bytes()
    generate = ("generate", "My name is", "--memory", memory, "--compare", "--json", "--max-new-tokens", "5")
    result = json.loads(locas(*generate, "--temperature", "0").stdout)
    assert result.keys() == {"prompt", "text", "baseline"}
    assert result["prompt"] == "My name is"
    assert result["text"]
    assert result["baseline"]["text"]
    assert memory.read_bytes() == before


def test_chat_leaves_other_text_much_as_it_was(tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, prose = tmp_path / "me.safetensors", Path(__file__).parents[2] / "LICENSE"
    talk = "I live in Nantucket, by the sea.\nMy friend Queequeg is from an island.\nHe likes chowder.\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(2 * talk))
    assert main("chat", "--learn", "--memory", memory, "--max-new-tokens", "12")[0] == 0
    score = ("--memory", memory, "--max-tokens", "2000", "--json")
    elsewhere = json.loads(main("score", prose, *score)[1])
    assert 0.99 < elsewhere["perplexity"] / elsewhere["baseline"]["perplexity"] < 1.05
    (tmp_path / "talk.txt").write_text("".join(f"You: {line}\n" for line in talk.splitlines()))
    there = json.loads(main("score", tmp_path / "talk.txt", *score)[1])
    assert there["perplexity"] < 0.9 * there["baseline"]["perplexity"]


def test_steps_go_on_growing_shorter_in_the_next_conversation(tmp_path: Path) -> None:
    backbone, path = load_backbone(), tmp_path / "me.safetensors"
    for n in (1, 2, 3):
        memory = load(path) if path.exists() else None
        listener = _Listener(backbone, memory, str(path), 2, ReadSettings(window=64, chunk=32))
        listener.learn(backbone.encode(f"You: I have {n} whales.\n")[0], 0)
        assert listener._writer is not None
        assert listener._writer["counts"].tolist() == [n]


def test_chat_goes_on_with_its_memory_and_only_learns_where_asked(
    tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "me.safetensors"
    arguments = ("chat", "--memory", memory, "--max-new-tokens", "3")

    def say(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    say("\n")
    assert main(*arguments, "--learn", "--rank", "2")[0] == 0
    assert not memory.exists()  # nothing was said
    for n in (1, 2):
        say("I like whales.")
        assert main(*arguments, "--learn", "--rank", "2")[0] == 0
        assert len(load(memory).provenance.documents) == n
    before = memory.read_bytes()
    say("I like whales.\nI do.\n\nnot heard\n")
    status, out, _ = main(*arguments)
    assert status == 0
    assert len(out.splitlines()) == 2
    assert memory.read_bytes() == before


def test_generate_is_as_random_as_its_seed(main: Main) -> None:
    texts = [
        json.loads(main("generate", "The whale", "--json", "--max-new-tokens", "9", "--seed", seed)[1])["text"]
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
