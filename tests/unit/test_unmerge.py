"""Un-merging gives back originals only: what was changed since is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import UNEQUAL, SavedOf, came_back, keep, tensors_of
from helpers import memory_for
from locas.merge import MANIFEST, MEMORIES, merge
from locas.unmerge import read_manifest, unmerge


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


def test_a_list_of_hashes_is_not_carried_where_it_is_untrue(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("qwen2")
    backbone = shutil.copytree(source, tmp_path / "backbone")
    carried = [p for p in sorted(backbone.iterdir()) if p.suffix != ".bin"]  # weights in other containers are not
    sums = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in carried)
    (backbone / "SHA256SUMS").write_text(sums)
    merge([keep(memory_for(model), model, tmp_path / "m.safetensors", backbone)], tmp_path / "merged")
    assert not (tmp_path / "merged" / "SHA256SUMS").exists()
    unmerge(tmp_path / "merged", tmp_path / "back")
    assert (tmp_path / "back" / "SHA256SUMS").read_text() == sums
    for line in sums.splitlines():
        digest, name = line.split()
        assert hashlib.sha256((tmp_path / "back" / name).read_bytes()).hexdigest() == digest


def test_texts_come_back_with_the_line_ends_that_they_had(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("qwen2")
    backbone = shutil.copytree(source, tmp_path / "backbone")
    (backbone / "SHA256SUMS").write_bytes(b"0  a\r\n1  b\n")
    (backbone / "config.json").write_bytes((backbone / "config.json").read_bytes().replace(b"\n", b"\r\n"))
    merge([keep(memory_for(model), model, tmp_path / "m.safetensors", backbone)], tmp_path / "merged")
    unmerge(tmp_path / "merged", tmp_path / "back")
    for name in ("SHA256SUMS", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (backbone / name).read_bytes()


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
