"""Loading backbones, and how many bytes of a text its tokens cover."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from helpers import same_bytes
from locas.backbone import DEFAULT_BACKBONE, Backbone, built_in, load_backbone, start_token, tokenizer_hash
from locas.sites import find_sites, fingerprint
from tokens import tiny_backbone, word_tokenizer

ModelOf = Callable[..., PreTrainedModel]
BACKBONES = Path(__file__).parents[2] / "src" / "locas" / "backbones"
FOREIGN = Path(__file__).parents[2].parent / "shared" / "models" / "foreign"
plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1, max_size=40)
relaxed = settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module")
def tiny_glu() -> Backbone:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.socket.connect", no_network)
        return load_backbone(dtype="float32", device="cpu")


def no_network(*_: object) -> None:
    raise AssertionError("the network was used")


@pytest.fixture
def folder(model_of: ModelOf, tmp_path: Path) -> Path:
    """A tiny checkpoint with its tokenizer."""
    model_of("llama", torch.float32).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# -------------------------------------------------------------------- encoding


def test_bytes_of_a_whole_text_and_of_its_beginning(model_of: ModelOf) -> None:
    backbone = tiny_backbone(model_of("llama"))
    ids, n_bytes = backbone.encode("w3  w10 w96\n")
    assert (ids.tolist(), ids.dtype, n_bytes) == ([3, 10, 96], torch.int64, 12)
    assert [backbone.encode("w3  w10 w96\n", n)[1] for n in (1, 2, 3, 4)] == [2, 7, 12, 12]
    assert backbone.encode("w3  w10 w96\n", 2)[0].tolist() == [3, 10]


def test_bytes_of_characters_that_have_several(tiny_glu: Backbone) -> None:
    text = "naïve 🐋 – κύων"
    assert tiny_glu.encode(text)[1] == len(text.encode()) == 24
    ids, _ = tiny_glu.encode(text)
    for n in range(1, ids.numel() + 1):
        kept, n_bytes = tiny_glu.encode(text, n)
        assert kept.tolist() == ids[:n].tolist()
        assert text.encode()[:n_bytes].decode()  # ends between two characters


@given(text=plain_text, n=st.integers(1, 50))
@example(text="🐋🐋🐋", n=1)
@example(text="é" * 9, n=5)
@relaxed
def test_bytes_grow_with_the_tokens_up_to_the_whole_text(tiny_glu: Backbone, text: str, n: int) -> None:
    ids, whole = tiny_glu.encode(text)
    assert whole == len(text.encode())
    kept, n_bytes = tiny_glu.encode(text, n)
    assert kept.tolist() == ids[:n].tolist()
    assert text.encode()[:n_bytes].decode("utf-8", "strict") is not None
    assert n_bytes <= whole
    if n < ids.numel():
        assert n_bytes <= tiny_glu.encode(text, n + 1)[1]
        # A token may end inside of a character, which then counts as read.
        decoded = tiny_glu.tokenizer.decode(kept).rstrip("\ufffd")
        assert 0 <= n_bytes - len(decoded.encode()) <= 4
    else:
        assert n_bytes == whole


def test_no_special_token_is_added(tiny_glu: Backbone, model_of: ModelOf) -> None:
    assert 1 not in tiny_backbone(model_of("llama")).encode("w5 w7")[0].tolist()
    assert tiny_glu.start_id not in tiny_glu.encode("a b c")[0].tolist()


@pytest.mark.parametrize("n", [None, 1])
def test_nothing_to_encode(n: int | None, model_of: ModelOf) -> None:
    backbone = tiny_backbone(model_of("llama"))
    with pytest.raises(ValueError, match="the text has no tokens"):
        backbone.encode("", n)
    with pytest.raises(ValueError, match="the text has no tokens"):
        backbone.encode(" \n", n)


@pytest.mark.parametrize("n", [0, -1])
def test_max_tokens_below_one(n: int, model_of: ModelOf) -> None:
    with pytest.raises(ValueError, match=f"max_tokens must be 1 or more; got {n}"):
        tiny_backbone(model_of("llama")).encode("w5 w7 w9", n)


class Slow:
    """A tokenizer without offsets, as transformers' Python ones are."""

    is_fast = False
    bos_token_id, eos_token_id = None, 2

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 97 for c in text]}

    def decode(self, ids: torch.Tensor) -> str:
        return "é" * ids.numel()

    def get_vocab(self) -> dict[str, int]:
        return {"a": 3, "padding": 5}


def test_a_tokenizer_without_offsets(model_of: ModelOf) -> None:
    backbone = Backbone("slow", model_of("llama"), Slow(), 2, False, "")
    assert backbone.encode("éééé", 3)[1] == 6
    assert backbone.encode("éééé")[1] == 8
    assert start_token(Slow()) == (2, False)


# -------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({}, (1, True)),
        ({"adds_bos": False}, (1, False)),
        ({"bos": False}, (2, False)),
        ({"bos": False, "eos": False}, (None, False)),
    ],
)
def test_start_tokens(made: dict[str, bool], expected: tuple[int | None, bool]) -> None:
    assert start_token(word_tokenizer(**made)) == expected


def test_a_tokenizers_hash_does_not_depend_on_what_was_done_with_it() -> None:
    tokenizer = word_tokenizer()
    fresh = tokenizer_hash(tokenizer)
    assert len(fresh) == 64
    tokenizer("w3 w4 w5 w6", truncation=True, max_length=3)
    assert tokenizer_hash(tokenizer) == fresh
    tokenizer(["w3", "w4 w5"], padding=True)
    assert tokenizer_hash(tokenizer) == fresh
    tokenizer(["w3", "w4 w5"], padding="max_length", max_length=7, truncation=True)
    assert tokenizer_hash(tokenizer) == fresh == tokenizer_hash(word_tokenizer())


def test_other_tokenizers_have_other_hashes() -> None:
    added = word_tokenizer()
    added.add_tokens(["whale"])
    hashes = [tokenizer_hash(t) for t in (word_tokenizer(), word_tokenizer(adds_bos=False), added)]
    assert len(set(hashes)) == 3


def test_words_of_a_slow_tokenizer_are_not_mistaken_for_its_state() -> None:
    class Other(Slow):
        def get_vocab(self) -> dict[str, int]:
            return {"a": 3, "padding": 7}

    assert tokenizer_hash(Slow()) != tokenizer_hash(Other())


# -------------------------------------------------------------------- loading


def test_the_built_in_backbone(tiny_glu: Backbone) -> None:
    assert DEFAULT_BACKBONE == tiny_glu.name == "tiny-glu"
    assert tiny_glu.n_parameters == 4_230_336
    assert not tiny_glu.model.training
    assert tiny_glu.start_id == tiny_glu.tokenizer.bos_token_id == 0
    assert not tiny_glu.start_in_every_window
    assert next(tiny_glu.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", built_in())
def test_every_file_of_a_built_in_backbone_has_its_checksum(name: str) -> None:
    folder = BACKBONES / name
    sums = {file: digest for digest, file in map(str.split, (folder / "SHA256SUMS").read_text().splitlines())}
    assert {path.name for path in folder.iterdir()} == {*sums, "SHA256SUMS"}
    for file, digest in sums.items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest, file
    assert (folder / "model.safetensors").stat().st_size <= 64_000_000


def test_the_twins_differ_by_their_ffn() -> None:
    assert built_in() == ["tiny-glu", "tiny-mlp"]
    twins = [load_backbone(name, device="cpu") for name in built_in()]
    assert [twin.model.config.model_type for twin in twins] == ["qwen3", "apertus"]
    assert [find_sites(twin.model)[0].gated for twin in twins] == [True, False]
    assert twins[0].tokenizer_sha256 == twins[1].tokenizer_sha256
    assert {twin.model.config.max_position_embeddings for twin in twins} == {2048}
    assert twins[0].n_parameters == twins[1].n_parameters
    histories = [json.loads((BACKBONES / name / "training.json").read_text()) for name in built_in()]
    for same in ("tokens", "step", "n_steps", "settings", "data"):
        assert histories[0][same] == histories[1][same]
    assert histories[0]["step"] == histories[0]["n_steps"]  # trained to the end
    found = [
        json.loads((BACKBONES / name / "evaluation.json").read_text())["mean_bits_per_byte"] for name in built_in()
    ]
    for form, one in found[0].items():  # on the development books
        assert one == pytest.approx(found[1][form], rel=0.02), form


@pytest.mark.parametrize("name", built_in())
def test_a_model_card_tells_of_its_weights(name: str) -> None:
    evaluation = json.loads((BACKBONES / name / "evaluation.json").read_text())
    assert (
        evaluation["model_sha256"] == hashlib.sha256((BACKBONES / name / "model.safetensors").read_bytes()).hexdigest()
    )
    card = (BACKBONES / name / "README.md").read_text()
    assert f"{load_backbone(name, device='cpu').n_parameters / 1e6:.2f}M parameters" in card
    for mean in evaluation["mean_bits_per_byte"].values():
        assert f"{mean:.3f}" in card
    assert [sample["seed"] for sample in evaluation["samples"]] == [0, 1, 2]  # the first ones drawn


def test_precisions_of_one_checkpoint_have_one_fingerprint(tiny_glu: Backbone) -> None:
    half = load_backbone("tiny-glu", dtype="bfloat16", device="cpu")
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert fingerprint(half.model) == fingerprint(tiny_glu.model)
    assert half.tokenizer_sha256 == tiny_glu.tokenizer_sha256


def test_a_folder(folder: Path, model_of: ModelOf) -> None:
    backbone = load_backbone(str(folder), device="cpu")
    model = model_of("llama", torch.float32)
    assert all(same_bytes(tensor, model.state_dict()[name]) for name, tensor in backbone.model.state_dict().items())
    assert fingerprint(backbone.model) == fingerprint(model)
    assert (backbone.name, backbone.start_id, backbone.start_in_every_window) == (str(folder), 1, True)
    assert backbone.tokenizer_sha256 == tokenizer_hash(word_tokenizer())
    assert backbone.encode("w3 w4")[0].tolist() == [3, 4]


def test_a_folder_goes_before_a_built_in_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(tmp_path / "tiny-glu")
    monkeypatch.chdir(tmp_path)
    assert load_backbone("tiny-glu", device="cpu").n_parameters < 100_000


def spoil(name: str, how: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        how(folder / name)

    change.__name__ = f"{name}"
    return change


def set_config(**more: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    return change


BROKEN = {
    "empty folder": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "no weights": spoil("model.safetensors", Path.unlink),
    "no config": spoil("config.json", Path.unlink),
    "no tokenizer": lambda folder: [p.unlink() for p in folder.glob("tokenizer*")],
    "weights cut short": spoil("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-100])),
    "weights of nothing": spoil("model.safetensors", lambda p: p.write_bytes(b"")),
    "weights are text": spoil("model.safetensors", lambda p: p.write_text("no weights at all, but a text")),
    "config is no JSON": spoil("config.json", lambda p: p.write_text("{")),
    "config is a list": spoil("config.json", lambda p: p.write_text("[]")),
    "unknown family": set_config(model_type="whale", architectures=["WhaleForCausalLM"]),
    "other sizes": set_config(hidden_size=26),
    "more layers": set_config(num_hidden_layers=4),
    "tokenizer is no JSON": spoil("tokenizer.json", lambda p: p.write_text("{")),
    "tokenizer of another kind": spoil("tokenizer.json", lambda p: p.write_text('{"model": 3}')),
}


@pytest.mark.parametrize("how", BROKEN.values(), ids=BROKEN.keys())
def test_broken_folders(how: Callable[[Path], object], folder: Path) -> None:
    how(folder)
    with pytest.raises(ValueError, match=r"could not be loaded: \S.*Give a folder with config\.json") as caught:
        load_backbone(str(folder), device="cpu")
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could not be loaded: .*built-in backbones: tiny-glu, tiny-mlp"):
        load_backbone(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["no-one/no-model", "gpt2", "a/b/c", "", "~", "no one"])
def test_a_hub_name_without_a_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", no_network)
    began = time.monotonic()
    if name:
        with pytest.raises(ValueError, match=r"could not be loaded: \S.*built-in backbones: tiny-glu, tiny-mlp"):
            load_backbone(name)
    else:
        assert load_backbone(name, device="cpu").name == "tiny-glu"
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "cuda:1", "", "meta", "mps", "xpu"])
def test_devices_that_are_not_there(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"is not a device|there is no \S+ device here"):
        load_backbone(device=device)


def test_a_dtype_that_is_none() -> None:
    with pytest.raises(ValueError, match="dtype 'int8' is not one of auto, float32, bfloat16, float16, float64"):
        load_backbone(dtype="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["stories260k", "tiny1m"])
def test_checkpoints_that_others_trained(name: str) -> None:
    if not (FOREIGN / name).is_dir():
        pytest.skip(f"{FOREIGN / name} is not here; it comes with the project's shared folder")
    backbone = load_backbone(str(FOREIGN / name), device="cpu")
    assert (backbone.start_id, backbone.start_in_every_window) == (1, True)
    text = "Once upon a time, Lily found a needle."
    ids, n_bytes = backbone.encode(text)
    assert n_bytes == len(text)
    assert [backbone.encode(text, n)[1] for n in range(1, ids.numel() + 1)] == sorted(
        backbone.encode(text, n)[1] for n in range(1, ids.numel() + 1)
    )
