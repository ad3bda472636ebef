"""A merged checkpoint's card says what it is, and the backbone's comes back."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoints import SavedOf, keep
from helpers import memory_for
from locas.merge import merge
from locas.merge_card import card
from locas.unmerge import unmerge

MANIFEST: dict[str, Any] = {
    "library": "0.1",
    "backbone": "an-owner/a-model",
    "backbone_fingerprint": "0123456789abcdef",
    "width": {"key": "intermediate_size", "original": 704, "merged": 1024, "align": 256},
    "dtype": None,
    "memories": [
        {
            "name": f"{name}.safetensors",
            "manifest": {"ranks": {"0": 5, "3": 7}, "documents": [{"name": "secret.txt", "tokens": 1200}]},
        }
        for name in "ab"
    ],
}


def test_what_was_merged_stands_before_the_backbones_words_and_its_front_matter_stays() -> None:
    old = "---\nlicense: apache-2.0\ntags:\n- text\n---\n\n# A model\nIts words.\n"
    found = card(MANIFEST, old)
    assert found.startswith(
        "---\nlicense: apache-2.0\ntags:\n- text\nbase_model: an-owner/a-model\nlibrary_name: transformers\n---\n"
        "# a-model with 2 memories merged into it\n"
    )
    assert "`intermediate_size` 704 -> 1,024. Nothing else was changed, and" in found
    assert "* `a.safetensors`: 12 slots on 2 layers, 1,200 tokens read\n* `b.safe" in found
    assert found.endswith("What follows is the backbone's own card.\n\n# A model\nIts words.\n")
    assert "secret" not in found
    assert "Nothing else was changed but the dtype, to float32, and" in card(MANIFEST | {"dtype": "float32"}, old)


@pytest.mark.parametrize("old", [None, "", "---\nbase_model: theirs\nlibrary_name: peft\n---\n"])
def test_a_backbone_without_words_of_its_own(old: str | None) -> None:
    found = card(MANIFEST | {"backbone": "/a/folder"}, old)
    about = "base_model: theirs\nlibrary_name: peft\n" if old else "library_name: transformers\n"
    assert found.startswith(f"---\n{about}---\n# folder with 2 memories merged into it\n")
    assert found.endswith("* `b.safetensors`: 12 slots on 2 layers, 1,200 tokens read\n")


@pytest.mark.parametrize("old", [None, b"---\r\nlicense: mit\r\n---\r\nIts words.\r\n"])
def test_the_card_is_written_and_unmerging_gives_the_old_one_back(
    old: bytes | None, saved_of: SavedOf, tmp_path: Path
) -> None:
    model, source = saved_of("qwen2")
    backbone = shutil.copytree(source, tmp_path / "backbone")
    (backbone / "README.md").unlink(missing_ok=True)
    if old is not None:
        (backbone / "README.md").write_bytes(old)
    merge([keep(memory_for(model), model, tmp_path / "m.safetensors", backbone)], tmp_path / "merged")
    found = (tmp_path / "merged" / "README.md").read_text()
    assert "# backbone with a memory merged into it" in found
    assert (found.count("license: mit"), found.count("Its words.")) == ((0, 0) if old is None else (1, 1))
    unmerge(tmp_path / "merged", tmp_path / "back")
    back = tmp_path / "back" / "README.md"
    assert (back.read_bytes() if back.exists() else None) == old
