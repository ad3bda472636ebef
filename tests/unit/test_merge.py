"""Merging: the checkpoint that comes out computes what the attached memories did, and everything comes back."""

import functools
import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import locas.checkpoint
import locas.merge
from families import D_FF, GATED, MLP, MOE, MULTIMODAL, tiny_model
from helpers import fill, memory_for, same_bytes, text
from locas.attach import attached
from locas.bank import Bank
from locas.cli import main
from locas.memory import Memory, Provenance
from locas.merge import MANIFEST, MEMORIES, merge
from locas.sites import FAMILIES, Family, find_family, find_sites, fingerprint, stored_names
from locas.unmerge import read_manifest, unmerge

MERGEABLE = [name for name in GATED + MLP if name != "bloom"] + MULTIMODAL
UNEQUAL = {0: 3, 2: 5}  # layer 1 has none
ALIGN = 7  # 37 + 5 slots are 42 already, and no power of two

SavedOf = Callable[..., tuple[PreTrainedModel, Path]]


@pytest.fixture(scope="module")
def saved_of(tmp_path_factory: pytest.TempPathFactory) -> SavedOf:
    """(model, folder) of a tiny model as save_pretrained leaves it; made once, never changed."""

    @functools.cache
    def save(name: str, dtype: torch.dtype = torch.float64, shard: str = "1GB") -> tuple[PreTrainedModel, Path]:
        model, folder = tiny_model(name, dtype), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, max_shard_size=shard)
        model = stock(folder, dtype)  # GPT-J's positions are not stored, and come out otherwise than in tiny_model
        (folder / "tokenizer.json").write_text('{"stands": "for a tokenizer"}')
        (folder / "LICENSE").write_bytes(b"a licence\r\n")
        (folder / "pytorch_model.bin").write_bytes(b"the same weights in another container")
        return model, folder

    return save


def keep(bank: Bank, model: nn.Module, path: Path, backbone: str | Path = "elsewhere") -> Path:
    """A memory file of this bank."""
    Memory(bank, Provenance(str(backbone), fingerprint(model))).save(path)
    return path


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def stock(folder: Path, dtype: Any = torch.float64) -> PreTrainedModel:
    """What transformers makes of a folder, all of whose tensors it must use."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def came_back(source: Path, output: Path, memories: list[Path]) -> None:
    """Everything but weights in other containers is in `output`, byte for byte, and the memories are."""
    wanted = {name: digest for name, digest in files_of(source).items() if not name.endswith(".bin")}
    wanted |= {f"{MEMORIES}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in memories}
    assert files_of(output) == wanted


# -------------------------------------------------------------------- every family


@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_is_attached_and_unmerge_gives_everything_back(saved_of: SavedOf, tmp_path: Path, name: str) -> None:
    model, source = saved_of(name)
    before = files_of(source)
    bank = memory_for(model, layers=UNEQUAL)
    file = keep(bank, model, tmp_path / "m.safetensors", source)
    manifest = merge([file], tmp_path / "merged", align=ALIGN)
    assert manifest["width"] == {"key": find_family(model).width, "original": D_FF, "merged": 42, "align": ALIGN}
    ids = text(2 * 11).view(2, 11)
    merged = stock(tmp_path / "merged")
    assert {site.d_ff for site in find_sites(merged).values()} == {42}
    plain = logits_of(model, ids)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 7, "do_sample": False}
    with attached(model, bank):
        # One more summand order and no other difference: float64 rounding.
        torch.testing.assert_close(logits_of(merged, ids), logits_of(model, ids), rtol=1e-12, atol=1e-12)
        assert torch.equal(merged.generate(ids, **options), model.generate(ids, **options))  # type: ignore[operator]
    assert (logits_of(merged, ids) - plain).abs().max() > 1e-3
    unmerge(tmp_path / "merged", tmp_path / "back")
    came_back(source, tmp_path / "back", [file])
    assert files_of(source) == before


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_several_memories_lie_side_by_side(saved_of: SavedOf, tmp_path: Path, name: str) -> None:
    model, source = saved_of(name)
    banks = [memory_for(model, layers=layers, seed=i) for i, layers in enumerate((UNEQUAL, {0: 2, 1: 11}, {2: 1}))]
    files = [keep(bank, model, tmp_path / f"{i}.safetensors", source) for i, bank in enumerate(banks)]
    manifest = merge(files, tmp_path / "merged", align=1)
    assert manifest["width"]["merged"] == D_FF + 11
    slots = [about["slots"] for about in manifest["memories"]]
    assert slots == [{"0": [0, 3], "2": [0, 5]}, {"0": [3, 5], "1": [0, 11]}, {"2": [5, 6]}]
    ids = text(13)[None]
    with attached(model, banks[0]), attached(model, banks[1]), attached(model, banks[2]):
        wanted = logits_of(model, ids)
    torch.testing.assert_close(logits_of(stock(tmp_path / "merged"), ids), wanted, rtol=1e-12, atol=1e-12)
    unmerge(tmp_path / "merged", tmp_path / "back")
    came_back(source, tmp_path / "back", files)


def test_two_files_of_one_name_come_back_numbered(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("qwen2")
    files = []
    for i, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        files.append(keep(memory_for(model, seed=i), model, tmp_path / folder / "m.safetensors"))
    merge(files, tmp_path / "merged", model=str(source))
    unmerge(tmp_path / "merged", tmp_path / "back")
    for i, file in enumerate(files):
        assert (tmp_path / "back" / MEMORIES / f"{i}-m.safetensors").read_bytes() == file.read_bytes()


# -------------------------------------------------------------------- layouts and precisions


@pytest.mark.parametrize("name", ["qwen3", "glm", "gpt2"])
def test_rows_are_where_the_formula_says(saved_of: SavedOf, tmp_path: Path, name: str) -> None:
    model, source = saved_of(name)
    bank = memory_for(model, layers=UNEQUAL)
    merge([keep(bank, model, tmp_path / "m.safetensors", source)], tmp_path / "merged", align=64)
    merged = stock(tmp_path / "merged")
    for layer, site in find_sites(merged).items():
        old, slots = find_sites(model)[layer], bank.slots(layer) if layer in UNEQUAL else None
        tau = bank.tau[0, bank.layers.index(layer)] if layer in UNEQUAL else 0.0
        for part, rows in (("up_rows", "k"), ("gate_rows", "g"), ("down_rows", "v")):
            if part == "gate_rows" and not site.gated:
                continue
            new = getattr(site, part)()
            filled = torch.zeros(0, site.d_model) if slots is None else getattr(slots, rows)[0]
            filled = filled * tau if part == "down_rows" else filled
            zeros = torch.zeros(64 - D_FF - len(filled), site.d_model)
            assert same_bytes(new, torch.cat([getattr(old, part)(), filled, zeros.double()]))


def test_a_bfloat16_checkpoint_stays_one_and_only_the_rows_are_rounded(saved_of: SavedOf, tmp_path: Path) -> None:
    _, source = saved_of("qwen3", torch.bfloat16)
    model = stock(source)  # its weights in float64
    bank = memory_for(model, layers=UNEQUAL).to(dtype=torch.float32)
    file = keep(bank, model, tmp_path / "m.safetensors", source)
    merge([file], tmp_path / "merged")
    assert {t.dtype for t in tensors_of(tmp_path / "merged").values()} == {torch.bfloat16}
    rounded = bank.to(dtype=torch.float64)
    for layer in bank.layers:
        rounded.slots(layer).v[0].copy_(rounded.slots(layer).v[0] * rounded.tau[0, bank.layers.index(layer)])
    rounded.tau.fill_(1.0)
    rounded.rows.copy_(rounded.rows.bfloat16())
    ids = text(13)[None]
    with attached(model, rounded):
        wanted = logits_of(model, ids)
    torch.testing.assert_close(logits_of(stock(tmp_path / "merged"), ids), wanted, rtol=1e-12, atol=1e-12)
    unmerge(tmp_path / "merged", tmp_path / "back")
    came_back(source, tmp_path / "back", [file])


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float64")])
def test_a_wider_dtype_on_request(saved_of: SavedOf, tmp_path: Path, stored: str, dtype: Any) -> None:
    _, source = saved_of("llama", getattr(torch, stored))
    model = stock(source)
    bank = memory_for(model, layers=UNEQUAL).to(dtype=torch.float32)
    bank.tau.fill_(0.5)  # so that tau V is a float32 number
    file = keep(bank, model, tmp_path / "m.safetensors", source)
    manifest = merge([file], tmp_path / "merged", dtype=dtype)
    assert manifest["dtype"] == dtype
    assert {t.dtype for t in tensors_of(tmp_path / "merged").values()} == {getattr(torch, dtype)}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == getattr(torch, dtype)
    ids = text(13)[None]
    with attached(model, bank.to(dtype=torch.float64)):
        wanted = logits_of(model, ids)
    torch.testing.assert_close(logits_of(stock(tmp_path / "merged"), ids), wanted, rtol=1e-12, atol=1e-12)
    unmerge(tmp_path / "merged", tmp_path / "back")
    came_back(source, tmp_path / "back", [file])


def test_integers_between_floats_stay_and_lie_aligned(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("gpt2", torch.float32)
    shutil.copytree(source, tmp_path / "source")
    odd = {"odd": torch.ones(3), "table": torch.arange(5), "flag": torch.tensor([True]), "scalar": torch.tensor(2.5)}
    save_file(tensors_of(source) | odd, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    file = keep(memory_for(model), model, tmp_path / "m.safetensors")
    merge([file], tmp_path / "merged", model=str(tmp_path / "source"), dtype="float64")
    found = tensors_of(tmp_path / "merged")
    assert all(torch.equal(found[name], t.to(found[name].dtype)) for name, t in odd.items())
    assert (found["table"].dtype, found["flag"].dtype, found["odd"].dtype) == (torch.int64, torch.bool, torch.float64)
    unmerge(tmp_path / "merged", tmp_path / "back")
    came_back(tmp_path / "source", tmp_path / "back", [file])


def test_shards_are_mirrored(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("llama", torch.float64, "20KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    bank = memory_for(model, layers=UNEQUAL)
    file = keep(bank, model, tmp_path / "m.safetensors", source)
    seen: list[tuple[int, int]] = []
    merge([file], tmp_path / "merged", on_progress=lambda done, total: seen.append((done, total)))
    merged = tmp_path / "merged"
    assert {p.name for p in source.glob("model*")} == {p.name for p in merged.glob("model*")}
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    old_index = json.loads((source / "model.safetensors.index.json").read_text())
    tensors = tensors_of(merged)
    assert index["weight_map"] == old_index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in tensors.values())
    assert seen[-1] == (index["metadata"]["total_size"],) * 2
    assert len(seen) == len(tensors)
    ids = text(13)[None]
    with attached(model, bank):
        wanted = logits_of(model, ids)
    torch.testing.assert_close(logits_of(stock(merged), ids), wanted, rtol=1e-12, atol=1e-12)
    unmerge(merged, tmp_path / "back")
    came_back(source, tmp_path / "back", [file])


def test_old_names_without_their_beginning(saved_of: SavedOf, tmp_path: Path) -> None:
    """GPT-2 on the hub stores "h.0.mlp.c_fc.weight"."""
    model, source = saved_of("gpt2")
    shutil.copytree(source, tmp_path / "source")
    short = {name.removeprefix("transformer."): t for name, t in tensors_of(source).items()}
    save_file(short, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    bank = memory_for(model, layers=UNEQUAL)
    merge([keep(bank, model, tmp_path / "m.safetensors")], tmp_path / "merged", model=str(tmp_path / "source"))
    ids = text(13)[None]
    with attached(model, bank):
        wanted = logits_of(model, ids)
    torch.testing.assert_close(logits_of(stock(tmp_path / "merged"), ids), wanted, rtol=1e-12, atol=1e-12)


def test_equal_merges_give_equal_bytes(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("gemma")
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    merge([file], tmp_path / "one")
    merge([str(file)], str(tmp_path / "two"))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_memory_of_a_backbone_loaded_in_another_dtype_fits(saved_of: SavedOf, tmp_path: Path) -> None:
    _, source = saved_of("olmo2")
    prints = set()
    for dtype in (torch.float64, torch.float32, torch.float16):
        model = stock(source, dtype)
        prints.add(fingerprint(model))
        file = keep(memory_for(model), model, tmp_path / f"{dtype}.safetensors", source)
        merge([file], tmp_path / str(dtype))
    assert len(prints) > 1, "rounding twice changes no sampled weight of this seed: choose another"


# -------------------------------------------------------------------- refusals


def refuses(error: type[Exception], pattern: str, folder: Path, *args: Any, **options: Any) -> None:
    """Merging fails with this message and leaves the folder as it was."""
    before = files_of(folder), sorted(folder.iterdir())
    with pytest.raises(error, match=pattern):
        merge(*args, **options)
    assert (files_of(folder), sorted(folder.iterdir())) == before


@pytest.mark.parametrize(
    ("name", "reason"), [("bloom", "no setting for the FFN's width"), *((name, "mixture of experts") for name in MOE)]
)
def test_families_that_cannot_be_widened(saved_of: SavedOf, tmp_path: Path, name: str, reason: str) -> None:
    model, source = saved_of(name)
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    refuses(ValueError, rf"{reason}.*--memory FILE", tmp_path, [file], tmp_path / "merged")


@pytest.mark.parametrize(
    ("name", "variant", "activation", "reason"),
    [
        ("llama", "mlp", "silu", "Locas-MLP memory, but this backbone's FFN has a gate: .*--variant glu"),
        ("opt", "glu", "relu", "Locas-GLU memory, but this backbone's FFN has no gate: .*--variant mlp"),
        ("gpt2", "mlp", "relu", "is relu, but the backbone's FFN has gelu_new.*--activation auto"),
    ],
)
def test_memories_that_an_ffn_cannot_express(
    saved_of: SavedOf, tmp_path: Path, name: str, variant: Any, activation: str, reason: str
) -> None:
    model, source = saved_of(name)
    width = find_sites(model)[0].d_model
    file = keep(fill(Bank(variant, activation, width, {1: 3})), model, tmp_path / "m.safetensors", source)
    refuses(ValueError, reason, tmp_path, [file], tmp_path / "merged")


def test_the_wrong_backbone(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("llama")
    good = keep(memory_for(model), model, tmp_path / "good.safetensors", source)
    other = keep(memory_for(model), tiny_model("llama", seed=1), tmp_path / "other.safetensors", source)
    args = [good, other], tmp_path / "merged"
    refuses(ValueError, r"other\.safetensors was made with the backbone .* are others .*--model", tmp_path, *args)
    wide = keep(fill(Bank("glu", "silu", 23, {0: 1})), model, tmp_path / "wide.safetensors", source)
    refuses(ValueError, "width 23 .* has width 22", tmp_path, [wide], tmp_path / "merged")
    deep = keep(fill(Bank("glu", "silu", 22, {7: 1})), model, tmp_path / "deep.safetensors", source)
    refuses(ValueError, r"layers \[7\].*layers 0\.\.2", tmp_path, [deep], tmp_path / "merged")


def test_wrong_arguments(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("llama")
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    output = tmp_path / "merged"
    refuses(ValueError, "no memory to merge", tmp_path, [], output)
    refuses(ValueError, "align must be 1 or more; got 0", tmp_path, [file], output, align=0)
    refuses(ValueError, "'float8' is not one of stored, float32, float64", tmp_path, [file], output, dtype="float8")
    refuses(ValueError, "stored as F64, and --dtype may only widen", tmp_path, [file], output, dtype="float32")
    refuses(FileNotFoundError, "there is no file", tmp_path, [tmp_path / "none.safetensors"], output)
    refuses(FileNotFoundError, "folder .* does not exist", tmp_path, [file], tmp_path / "no" / "merged")
    refuses(ValueError, "inside the checkpoint", tmp_path, [file], source / "merged")
    refuses(ValueError, r"'no/such model' was not found.*--model", tmp_path, [file], output, model="no/such model")
    refuses(FileExistsError, "exists already", tmp_path, [file], file)
    output.mkdir()
    (output / "thesis.tex").write_text("the only copy")
    refuses(FileExistsError, "exists already", tmp_path, [file], output)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ("quantised", ValueError, "is quantised.*--memory FILE"),
        ("fp8", ValueError, "stored as F8_E4M3: a quantised FFN"),
        ("adapter", ValueError, "adapter"),
        ("bin", FileNotFoundError, "no safetensors weights.*save_pretrained"),
        ("no config", FileNotFoundError, "no config.json"),
        ("cut", ValueError, "cut short"),
        ("lacks one", ValueError, "should hold .*up_proj.* no such tensor"),
        ("shape", ValueError, r"should hold .*\(37, 22\), and holds \(36, 22\)"),
        ("twice", ValueError, "two tensors for one FFN matrix"),
        ("type", ValueError, "transformers makes no causal language model"),
    ],
)
def test_checkpoints_that_do_not_fit(
    saved_of: SavedOf, tmp_path: Path, change: str, error: type[Exception], reason: str
) -> None:
    model, good = saved_of("llama")
    source = tmp_path / "source"
    shutil.copytree(good, source)
    weights, config, name = source / "model.safetensors", source / "config.json", "model.layers.1.mlp.up_proj.weight"
    settings, tensors = json.loads(config.read_text()), tensors_of(source)
    if change == "quantised":
        config.write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}}))
    elif change == "adapter":
        (source / "adapter_config.json").write_text("{}")
    elif change == "bin":
        weights.unlink()
    elif change == "no config":
        config.unlink()
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif change == "type":
        config.write_text(json.dumps(settings | {"model_type": "no such"}))
    else:
        if change == "lacks one":
            del tensors[name]
        elif change == "shape":
            tensors[name] = tensors[name][:36].clone()
        elif change == "twice":
            tensors[f"vision.{name}"] = tensors[name].clone()
        else:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        save_file(tensors, weights, {"format": "pt"})
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    refuses(error, reason, tmp_path, [file], tmp_path / "merged")


@pytest.mark.parametrize(
    ("key", "reason"),
    [("hidden_size", "also sets the size of|is not the width"), ("head_dim", "is not the width of this family's FFN")],
)
def test_a_family_described_with_the_wrong_key(
    saved_of: SavedOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, reason: str
) -> None:
    model, source = saved_of("llama")
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    family = find_family(model)
    wrong = Family(("llama",), family.layers, "mlp", "mlp", family.up, family.down, family.gate, width=key)
    monkeypatch.setattr("locas.sites.FAMILIES", [*FAMILIES, wrong])
    refuses(ValueError, reason, tmp_path, [file], tmp_path / "merged")


def test_numbers_too_large_for_the_checkpoint(saved_of: SavedOf, tmp_path: Path) -> None:
    _, source = saved_of("llama", torch.float16)
    model = stock(source)
    bank = memory_for(model, layers=UNEQUAL)
    bank.tau.fill_(1e6)
    file = keep(bank, model, tmp_path / "m.safetensors", source)
    refuses(ValueError, "too large for F16.*--dtype float32", tmp_path, [file], tmp_path / "merged")
    merge([file], tmp_path / "merged", dtype="float32")


def test_a_merged_checkpoint_is_not_merged_again(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("llama")
    first = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    merge([first], tmp_path / "merged")
    merged = stock(tmp_path / "merged")
    bank = memory_for(merged, layers=UNEQUAL, seed=1)
    second = keep(bank, merged, tmp_path / "n.safetensors", tmp_path / "merged")
    refuses(ValueError, "merged checkpoint already", tmp_path, [second], tmp_path / "twice")
    (tmp_path / "merged" / MANIFEST).unlink()
    merge([second], tmp_path / "twice")
    ids = text(13)[None]
    with attached(merged, bank):
        wanted = logits_of(merged, ids)
    torch.testing.assert_close(logits_of(stock(tmp_path / "twice"), ids), wanted, rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------- nothing half done


def test_an_error_on_the_way_leaves_nothing(saved_of: SavedOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = saved_of("llama")
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([file], tmp_path / "merged", on_progress=stop)
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 7))  # type: ignore[attr-defined]
    refuses(
        OSError, r"would take .* GiB, and .* has 0\.00 GiB free.*Nothing was written", tmp_path, [file], tmp_path / "m"
    )


def test_the_rest_of_a_killed_run_is_replaced(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("llama")
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    stale = tmp_path / ".merged.partial"
    (stale / "sub").mkdir(parents=True)
    (stale / "sub" / "old").write_text("half")
    (stale / "model.safetensors").write_text("half")
    (tmp_path / "merged").mkdir()  # an empty folder may be there already
    merge([file], tmp_path / "merged")
    assert not stale.exists()
    unmerge(tmp_path / "merged", tmp_path / "back")
    came_back(source, tmp_path / "back", [file])


def test_two_runs_do_not_write_one_folder(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("llama")
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    with locas.checkpoint.new_folder(tmp_path / "merged") as folder:
        (folder / "mine").write_text("safe")
        with pytest.raises(OSError, match="another process is writing"):
            merge([file], tmp_path / "merged")
    assert (tmp_path / "merged" / "mine").read_text() == "safe"


# -------------------------------------------------------------------- unmerge


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: t.clone() for name, t in tensors_of(folder).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def merged_once(saved_of: SavedOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, source = saved_of("phi3")
    folder = tmp_path_factory.mktemp("merged_once")
    merge([keep(memory_for(model, layers=UNEQUAL), model, folder / "m.safetensors", source)], folder / "merged")
    return folder / "merged"


NAME = "model.layers.1.mlp.gate_up_proj.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t[NAME][0, 0].add_(1e-9), "is not what was merged"),
        (lambda t: t[NAME][-1, -1].add_(1.0), "is not what was merged"),  # a new slot, not an old weight
        (lambda t: t["model.norm.weight"].neg_(), "is not what was merged"),
        (lambda t: t.update({NAME: t[NAME][:-1].clone()}), "is not what was merged"),
        (lambda t: t.update({NAME: t[NAME].flatten()}), "is not what was merged"),
        (lambda t: t.pop(NAME), "came or went"),
        (lambda t: t.update(new=torch.ones(1)), "came or went"),
    ],
)
def test_a_changed_checkpoint_is_not_unmerged(
    merged_once: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], reason: str
) -> None:
    shutil.copytree(merged_once, tmp_path / "merged")
    rewrite(tmp_path / "merged", change)
    with pytest.raises(ValueError, match=reason):
        unmerge(tmp_path / "merged", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_rewritten_but_equal_weights_are_unmerged(merged_once: Path, saved_of: SavedOf, tmp_path: Path) -> None:
    """Another order of tensors in the file changes nothing that counts."""
    shutil.copytree(merged_once, tmp_path / "merged")
    rewrite(tmp_path / "merged", lambda tensors: None)
    unmerge(tmp_path / "merged", tmp_path / "back")
    came_back(saved_of("phi3")[1], tmp_path / "back", [merged_once.parent / "m.safetensors"])


def test_a_changed_memory_or_manifest_is_not_unmerged(merged_once: Path, tmp_path: Path) -> None:
    def refused(pattern: str, change: Callable[[dict[str, Any]], Any] | None = None) -> None:
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        shutil.copytree(merged_once, tmp_path / "merged")
        path = tmp_path / "merged" / MANIFEST
        if change is None:
            with (tmp_path / "merged" / MEMORIES / "0.safetensors").open("ab") as file:
                file.write(b" ")
        else:
            manifest = json.loads(path.read_text())
            change(manifest)
            path.write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=pattern):
            unmerge(tmp_path / "merged", tmp_path / "back")
        assert [path.name for path in tmp_path.iterdir()] == ["merged"]

    refused("not the memory file that was merged")
    refused("format .*99", lambda m: m.update(version=99))
    refused("tensors' is missing", lambda m: m.pop("tensors"))
    refused("should be the name of a file", lambda m: m["files"].update({"../evil": ""}))
    refused("should be the name of a file", lambda m: m["memories"][0].update(name="../evil"))
    refused("memory 0 should be", lambda m: m["memories"][0].update(file="/etc/passwd"))
    refused("disagree", lambda m: m["tensors"].pop(NAME))
    refused("disagree", lambda m: m["files"].update({"tokenizer.json": ""}))
    refused("config.json is missing", lambda m: m["files"].pop("config.json"))
    refused("is not 1 x 36 wide", lambda m: m["width"].update(original=36))
    refused("does not describe", lambda m: m["width"].update(original="37"))
    refused("does not describe", lambda m: m["tensors"][NAME].update(axis=9))
    refused("is not what was merged", lambda m: m["width"].update(merged=10**9))
    refused("does not give its original", lambda m: m["tensors"][NAME].update(sha256="0" * 64))
    (tmp_path / "merged" / MANIFEST).write_text("[" * 10**6)
    with pytest.raises(ValueError, match="does not describe a merge"):
        read_manifest(tmp_path / "merged")
    with pytest.raises(ValueError, match="not a checkpoint that `locas merge` wrote"):
        unmerge(tmp_path, tmp_path / "back")


# -------------------------------------------------------------------- names and headers


def test_names_in_a_checkpoint() -> None:
    llama, gpt2, gemma = (next(f for f in FAMILIES if name in f.model_types) for name in ("llama", "gpt2", "gemma3"))
    names = [
        "model.layers.11.mlp.up_proj.weight",
        "model.layers.2.mlp.down_proj.bias",
        "model.xlayers.3.mlp.up_proj.weight",
    ]
    assert stored_names(llama, [*names, "model.layers.1.self_attn.q_proj.weight"]) == {
        (11, "up.weight"): names[0],
        (2, "down.bias"): names[1],
    }
    assert stored_names(gpt2, ["h.0.mlp.c_fc.bias", "h.0.mlp.c_fc.weight_scale"]) == {
        (0, "up.bias"): "h.0.mlp.c_fc.bias"
    }
    vision = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    language = "language_model.model.layers.0.mlp.gate_proj.weight"
    assert stored_names(gemma, [vision, language]) == {(0, "gate.weight"): language}


def test_a_written_shard_is_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(2, 7).bfloat16(), "c": torch.tensor(7), "e": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    raw = (tmp_path / "theirs.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entries = locas.checkpoint.entries_of(raw[8 : 8 + length].decode())
    header = locas.checkpoint.header_of(entries, {"format": "pt"})
    locas.checkpoint.write_shard(tmp_path / "ours.safetensors", header, (tensors[e.name] for e in entries))
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(same_bytes(file.get_tensor(name), t) for name, t in tensors.items())
    assert len(header) % 8 == 0


# -------------------------------------------------------------------- the command line


def test_command_line(saved_of: SavedOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, source = saved_of("llama")
    file = keep(memory_for(model, layers=UNEQUAL), model, tmp_path / "m.safetensors", source)
    merged, back = str(tmp_path / "merged"), str(tmp_path / "back")

    def run(*args: str, status: int = 0) -> str:
        capsys.readouterr()
        assert main(args) == status
        return capsys.readouterr().out

    result = json.loads(run("merge", str(file), "-o", merged, "--align", "64", "--json"))
    assert result["width"] == {"key": "intermediate_size", "original": 37, "merged": 64, "align": 64}
    assert result["memories"] == ["m.safetensors"]
    assert result["bytes"] == sum(path.stat().st_size for path in Path(merged).rglob("*") if path.is_file())
    assert re.search(r"exists already", json.loads(run("merge", str(file), "-o", merged, "--json", status=2))["error"])
    info = json.loads(run("info", merged, "--json"))
    assert info["memories"][0]["manifest"]["ranks"] == {"0": 3, "2": 5}
    assert info.keys() & {"tensors", "shards", "files"} == set()
    assert re.search(r"37 -> 64.*\n.*\n.*m\.safetensors: rank 3-5 on 2 layers", run("info", merged))
    assert "it is not a checkpoint that" in json.loads(run("info", str(source), "--json", status=2))["error"]
    result = json.loads(run("unmerge", merged, "-o", back, "--json"))
    assert result["memories"] == [f"{back}/{MEMORIES}/m.safetensors"]
    came_back(source, Path(back), [file])
    shutil.rmtree(merged)
    shutil.rmtree(back)
    assert "37 -> 256" in run("merge", str(file), "-o", merged, "--model", str(source), "--dtype", "float64")
    assert "byte for byte" in run("unmerge", merged, "-o", back)
