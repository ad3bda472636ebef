"""The card (README.md) of a merged checkpoint: what was merged into what, before the backbone's own words.

The backbone's front matter (licence, languages, ...) holds for the merged checkpoint too and stays as it is; where it
names no base model and the backbone has a hub name, that is added. The original text goes into the manifest, so that
un-merging gives it back.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

CARD = "README.md"
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|\Z)", re.S)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def card(manifest: dict[str, Any], original: str | None) -> str:
    """The merged checkpoint's card.

    Args:
        manifest: of the merge, see `locas.merge`.
        original: the backbone's card; None: it has none.
    """
    found = _FRONT_MATTER.match(original or "")
    about, words = (found[1], (original or "")[found.end() :]) if found else ("", original or "")
    name, width = manifest["backbone"], manifest["width"]
    if not re.search(r"^base_model\s*:", about, flags=re.M) and _HUB_NAME.fullmatch(name) and not Path(name).exists():
        about += f"base_model: {name}\n"
    if not re.search(r"^library_name\s*:", about, flags=re.M):
        about += "library_name: transformers\n"
    memories = "\n".join(_memory(memory) for memory in manifest["memories"])
    return f"""---
{about}---
# {Path(name).name} with {_count(manifest["memories"])} merged into it
Written by locas {manifest["library"]} ([arXiv:2602.05085](https://arxiv.org/abs/2602.05085)) from the backbone
`{name}` (fingerprint `{manifest["backbone_fingerprint"][:12]}`). Its FFNs are wider by the memories' slots:
`{width["key"]}` {width["original"]:,} -> {width["merged"]:,}. Nothing else was changed{_in(manifest["dtype"])}, and
locas is not needed to load it. `locas unmerge` gives back the backbone, byte for byte, and the memory files:

{memories}
""" + (f"\nWhat follows is the backbone's own card.\n\n{words.lstrip()}" if words.strip() else "")


def _memory(about: dict[str, Any]) -> str:
    """A line for a memory: its size, and how much it has read. Not of which texts: cards are published."""
    manifest = about["manifest"]
    ranks, tokens = manifest["ranks"], sum(document["tokens"] for document in manifest["documents"])
    return f"* `{about['name']}`: {sum(ranks.values()):,} slots on {len(ranks)} layers, {tokens:,} tokens read"


def _count(memories: list[Any]) -> str:
    return "a memory" if len(memories) == 1 else f"{len(memories)} memories"


def _in(dtype: str | None) -> str:
    return "" if dtype is None else f" but the dtype, to {dtype}"
