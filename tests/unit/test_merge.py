"""Merging: the checkpoint that comes out computes what the attached memories did, and everything comes back."""

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import locas.checkpoint
import locas.merge
from checkpoints import UNEQUAL, SavedOf, came_back, files_of, keep, stock, tensors_of
from families import D_FF, GATED, MLP, MULTIMODAL
from helpers import logits_of, memory_for, same_bytes, text
from locas.attach import attached
from locas.cli import main
from locas.merge import MEMORIES, merge
from locas.sites import FAMILIES, find_family, find_sites, fingerprint, stored_names
from locas.unmerge import unmerge

MERGEABLE = [name for name in GATED + MLP if name != "bloom"] + MULTIMODAL
ALIGN = 7  # 37 + 5 slots are 42 already, and no power of two


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
