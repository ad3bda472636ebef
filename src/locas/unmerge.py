"""Un-merging: the checkpoint that a merged one was made from, byte for byte, and its memories as files.

    unmerge("merged", "original")

Only `locas_merge.json` is asked what was where: no knowledge of model families is needed, and no model is built.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locas._version import __version__
from locas.checkpoint import (
    CONFIG,
    DTYPES,
    INDEX,
    SUMS,
    Checkpoint,
    Entry,
    check_output,
    check_plain_name,
    copy_file,
    entries_of,
    new_folder,
    open_checkpoint,
    write_shard,
    write_text,
)
from locas.merge import FORMAT, FORMAT_VERSION, MANIFEST, MEMORIES, OnProgress, Progress, check_sha256, sha256_of
from locas.merge_card import CARD


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """`locas_merge.json` of a merged checkpoint.

    Raises:
        ValueError: there is none, it is damaged, or of a newer format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it is not a checkpoint that `locas merge` wrote")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        found = manifest["format"], manifest["version"]
        if found == (FORMAT, FORMAT_VERSION):
            _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} does not describe a merge: {what}") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"{path} has format {found}; this locas ({__version__}) reads {(FORMAT, FORMAT_VERSION)}")
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """What un-merging relies on: names that stay in the folder, and tensors that the headers know."""
    for name in [*manifest["shards"], *manifest["files"], *(about["name"] for about in manifest["memories"])]:
        check_plain_name(name)
    for i, about in enumerate(manifest["memories"]):
        if about["file"] != f"{MEMORIES}/{i}.safetensors":
            raise ValueError(f"memory {i} should be {MEMORIES}/{i}.safetensors, not {about['file']!r}")
    headers = [entries_of(header) for header in manifest["shards"].values()]
    names = [entry.name for entries in headers for entry in entries]
    if sorted(names) != sorted(manifest["tensors"]) or not manifest["files"].keys() <= {CONFIG, INDEX, SUMS, CARD}:
        raise ValueError("the headers of its shards and its list of tensors disagree")
    if not all(isinstance(text, str) for text in manifest["files"].values()) or CONFIG not in manifest["files"]:
        raise ValueError(f"the original {CONFIG} is missing")
    width = manifest["width"]["original"]
    for entry in (entry for entries in headers for entry in entries):
        about = manifest["tensors"][entry.name]
        if "axis" in about and entry.shape[about["axis"]] != about["blocks"] * width:
            raise ValueError(f"{entry.name!r} was {entry.shape}, which is not {about['blocks']} x {width} wide")


def unmerge(folder: str | Path, output: str | Path, *, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Writes the checkpoint that a merged one was made from, and its memories as files in `locas_memories`.

    Weights, index, config, card and a list of hashes are byte for byte what they were, which is checked; tokenizer and
    other files are copied as they are now.

    Args:
        folder: what `merge` wrote.
        output: the folder to make.
        on_progress: called after every tensor.

    Returns:
        The manifest of the merged checkpoint.

    Raises:
        ValueError: the folder is no merged checkpoint, or was changed since; nothing was written.
        OSError: as for `merge`.
    """
    manifest, output = read_manifest(folder), Path(output)
    merged = open_checkpoint(folder)
    strangers = merged.entries.keys() ^ manifest["tensors"].keys()
    if strangers:
        raise ValueError(f"{folder} was changed since it was merged: {min(strangers)!r} came or went")
    headers = {name: entries_of(header) for name, header in manifest["shards"].items()}
    n_bytes = sum(entry.n_bytes for entries in headers.values() for entry in entries)
    extra = sum((merged.folder / about["file"]).stat().st_size for about in manifest["memories"])
    check_output(output, merged.folder, n_bytes + extra)
    progress = Progress(n_bytes, on_progress)
    with new_folder(output) as new:
        (new / MEMORIES).mkdir()
        for about, name in zip(manifest["memories"], memory_names(manifest), strict=True):
            copy_file(merged.folder / about["file"], new / MEMORIES / name)
            check_sha256(new / MEMORIES / name, about["sha256"])
        for name, entries in headers.items():
            write_shard(new / name, manifest["shards"][name], _originals(merged, manifest, entries, progress))
        for name, text in manifest["files"].items():
            write_text(new / name, text)
        ours = {MANIFEST, *manifest["files"]} | ({CARD} if manifest.get("card") else set())
        for path in merged.other_files():
            if path.name not in ours:
                copy_file(merged.folder / path, new / path)
    return manifest


def memory_names(manifest: dict[str, Any]) -> list[str]:
    """What the memory files are called after un-merging: as before, numbered where two had one name."""
    names = [about["name"] for about in manifest["memories"]]
    return names if len(set(names)) == len(names) else [f"{i}-{name}" for i, name in enumerate(names)]


def _originals(
    merged: Checkpoint, manifest: dict[str, Any], entries: tuple[Entry, ...], progress: Progress
) -> Iterator[Tensor]:
    """The original tensors, cut out of the merged ones and checked."""
    for entry in entries:
        about, tensor = manifest["tensors"][entry.name], merged.tensor(entry.name)
        shape, width = list(entry.shape), manifest["width"]
        if "axis" in about:
            shape[about["axis"]] = about["blocks"] * width["merged"]
        if [*tensor.shape] != shape or sha256_of(tensor) != about.get("merged_sha256", about["sha256"]):
            raise ValueError(
                f"{entry.name!r} in {merged.folder} is not what was merged: it was trained, edited or damaged since, "
                "and un-merging gives back originals only. Nothing was written."
            )
        if "axis" in about:
            axis, size = about["axis"], width["original"]
            cuts = [tensor.narrow(axis, i * width["merged"], size) for i in range(about["blocks"])]
            tensor = cuts[0] if len(cuts) == 1 else torch.cat(cuts, axis)
        tensor = tensor.to(DTYPES[entry.dtype]) if entry.dtype in DTYPES else tensor
        if sha256_of(tensor) != about["sha256"]:
            raise ValueError(f"{MANIFEST} was changed: {entry.name!r} does not give its original. Nothing was written.")
        yield tensor
        progress.add(entry.n_bytes)
