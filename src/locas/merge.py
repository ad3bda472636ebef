"""Merging: memories become part of a checkpoint, by widening its FFNs; `unmerge.py` takes them out again.

    merge(["book.safetensors"], "merged")     # an ordinary checkpoint: transformers loads it without locas

Per layer (arXiv:2602.05085), W_up' = [W_up; K], W_gate' = [W_gate; G], W_down' = [W_down, tau V^T],
so that FFN'(A) = FFN(A) + tau V^T (act(G A) * (K A)). A config has one FFN width for all layers: every layer gets as
many new slots, and those that no memory fills are zero and add 0.0. The new width is a multiple of `align`, as serving
engines and quantisers want it.

Exact: the sum itself (several memories lie side by side), the old weights, un-merging, the memory files. Rounded: the
memories' rows, once, to the dtype of the matrices they go into (keys and gates; tau V after the product in float64);
`dtype` makes the whole checkpoint wider where that matters. Sums over more slots may also round differently in the
last bit, as on another machine.

`locas_merge.json` beside the weights has all that un-merging needs:

* `format`, `version`, `library`: "locas-merge", 1, the locas version
* `backbone`, `backbone_fingerprint`: as in a memory file
* `width`: `key` in config.json, `original`, `merged`, `align`
* `dtype`: what everything was widened to, or null
* `memories`: for each its `file` in this folder (the memory file, byte for byte), its former `name`, `sha256`, its own
  `manifest` (ranks and tau are there), and `slots`, {"I": [first, one past the last]} of layer I's new ones
* `tensors`: by name, `sha256` of the original's bytes; where changed, `merged_sha256`; where widened, `axis` and
  `blocks` (2: gate and up in one matrix)
* `shards`: by file name, the original's header as text
* `files`: the original text of config.json and, where there are such, of the index, the list of hashes and the card
* `card`: true; the card (`README.md`) is of the merge (`merge_card.py`)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from locas._version import __version__
from locas.backbone import DEFAULT_BACKBONE
from locas.checkpoint import (
    CONFIG,
    DTYPES,
    INDEX,
    SUMS,
    Checkpoint,
    Entry,
    Shard,
    bytes_of,
    check_output,
    copy_file,
    find_checkpoint,
    header_of,
    new_folder,
    open_checkpoint,
    read_text,
    write_shard,
    write_text,
)
from locas.memory import Memory, load
from locas.merge_card import CARD, card
from locas.merge_plan import MANIFEST, Plan, make_plan, new_entry, set_width

FORMAT = "locas-merge"
FORMAT_VERSION = 1
MEMORIES = "locas_memories"

MergeDtype = Literal["stored", "float32", "float64"]
OnProgress = Callable[[int, int], None]  # bytes written, of how many


# -------------------------------------------------------------------- merge


def merge(
    memories: Sequence[str | Path],
    output: str | Path,
    *,
    model: str | None = None,
    align: int = 256,
    dtype: MergeDtype = "stored",
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint whose FFNs are widened by memories; the source is only read, one tensor at a time.

    Args:
        memories: memory files of one backbone.
        output: the folder to make; it gets its name when everything is in it.
        model: the backbone's checkpoint: a folder, a hub name, a built-in backbone; None: what the first memory names.
        align: the new FFN width is a multiple of this.
        dtype: "float32" or "float64" widens every tensor of the checkpoint, so that the memory keeps its precision.
        on_progress: called after every tensor.

    Returns:
        The manifest, as `locas_merge.json` has it.

    Raises:
        ValueError: a memory of another backbone or kind, a backbone that cannot be widened; nothing was written.
        OSError: the output exists, the disk is full, a file cannot be read or written; nothing is left behind.
    """
    if not memories:
        raise ValueError("there is no memory to merge; name one or several memory files")
    if align < 1:
        raise ValueError(f"align must be 1 or more; got {align}")
    if dtype not in get_args(MergeDtype):
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(get_args(MergeDtype))}")
    files, output = [Path(path) for path in memories], Path(output)
    loaded = [load(path) for path in files]
    name = model or loaded[0].provenance.backbone or DEFAULT_BACKBONE
    source = open_checkpoint(find_checkpoint(name))
    plan = make_plan(source, files, loaded, align, None if dtype == "stored" else getattr(torch, dtype))
    sizes = [new_entry(entry, plan).n_bytes for entry in source.entries.values()]
    check_output(output, source.folder, sum(sizes) + sum(path.stat().st_size for path in files))
    with new_folder(output) as folder:
        manifest = _manifest(source, name, plan, align, files, loaded)
        (folder / MEMORIES).mkdir()
        for path, about in zip(files, manifest["memories"], strict=True):
            copy_file(path, folder / about["file"])
            check_sha256(folder / about["file"], about["sha256"])
        progress = Progress(sum(sizes), on_progress)
        for shard in source.shards:
            _write_merged(folder / shard.path.name, source, shard, plan, loaded, manifest["tensors"], progress)
        write_text(folder / CONFIG, _new_config(source, plan))
        if source.index_text is not None:
            write_text(folder / INDEX, _new_index(source, plan))
        for path in source.other_files():
            if path.name not in (SUMS, CARD):
                copy_file(source.folder / path, folder / path)
        write_text(folder / CARD, card(manifest, manifest["files"].get(CARD)))
        write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return manifest


def _manifest(
    source: Checkpoint, name: str, plan: Plan, align: int, files: list[Path], memories: list[Memory]
) -> dict[str, Any]:
    about = []
    for i, (path, memory) in enumerate(zip(files, memories, strict=True)):
        ranks = memory.bank.ranks
        slots = {str(layer): [first, first + ranks[layer]] for layer, first in plan.first_slots[i].items()}
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        about.append(
            {
                "file": f"{MEMORIES}/{i}.safetensors",
                "name": path.name,
                "sha256": digest,
                "slots": slots,
                "manifest": memory.manifest(),
            }
        )
    sums, texts = source.folder / SUMS, {CONFIG: source.config_text}
    texts |= {INDEX: source.index_text} if source.index_text is not None else {}
    texts |= {path.name: read_text(path) for path in (sums, source.folder / CARD) if path.is_file()}
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "library": __version__,
        "backbone": name,
        "backbone_fingerprint": memories[0].provenance.backbone_fingerprint,
        "width": {"key": plan.key, "original": plan.original, "merged": plan.merged, "align": align},
        "dtype": None if plan.dtype is None else str(plan.dtype).removeprefix("torch."),
        "memories": about,
        "tensors": {},
        "shards": {shard.path.name: shard.header for shard in source.shards},
        "files": texts,
        "card": True,
    }


# -------------------------------------------------------------------- tensors


def _write_merged(
    path: Path,
    source: Checkpoint,
    shard: Shard,
    plan: Plan,
    memories: list[Memory],
    tensors: dict[str, Any],
    progress: Progress,
) -> None:
    """One shard of the merged checkpoint; notes every tensor's hashes in `tensors`."""
    entries = [new_entry(entry, plan) for entry in shard.entries]
    # Wide elements first, as safetensors lays them, so that all are aligned; without a new dtype they are.
    if plan.dtype is not None:
        entries.sort(key=lambda entry: -(entry.n_bytes // max(1, _numel(entry))))

    def rows() -> Iterator[Tensor]:
        for entry in entries:
            tensor = source.tensor(entry.name)
            new = _new_tensor(tensor, entry, plan, memories)
            about: dict[str, Any] = {"sha256": sha256_of(tensor)}
            if new is not tensor:
                about["merged_sha256"] = sha256_of(new)
            if widening := plan.widenings.get(entry.name):
                about |= {"axis": widening.axis, "blocks": len(widening.parts)}
            tensors[entry.name] = about
            yield new
            progress.add(entry.n_bytes)

    write_shard(path, header_of(entries, shard.metadata), rows())


def _new_tensor(tensor: Tensor, entry: Entry, plan: Plan, memories: list[Memory]) -> Tensor:
    """The tensor in its new dtype, and widened: [.., m, ..] to [.., m', ..], block by block."""
    widening = plan.widenings.get(entry.name)
    if widening is None:
        return tensor if plan.dtype is None or entry.dtype not in DTYPES else tensor.to(plan.dtype)
    new = torch.zeros(entry.shape, dtype=DTYPES[entry.dtype])
    for i, part in enumerate(widening.parts):
        start = i * plan.merged
        old = tensor.narrow(widening.axis, i * plan.original, plan.original)
        new.narrow(widening.axis, start, plan.original).copy_(old)
        for memory, first in zip(memories, plan.first_slots, strict=True):
            if widening.bias or widening.layer not in first:
                continue
            rows = slot_rows(memory, widening.layer, part).to(new.dtype)
            if not bool(rows.isfinite().all()):
                raise ValueError(
                    f"layer {widening.layer}: the memory holds numbers too large for {entry.dtype}, the dtype of "
                    f"{entry.name!r}; use --dtype float32. Nothing was written."
                )
            place = new.narrow(widening.axis, start + plan.original + first[widening.layer], len(rows))
            place.copy_(rows if widening.axis == 0 else rows.T)
    return new


def slot_rows(memory: Memory, layer: int, part: str) -> Tensor:
    """What a memory adds to an FFN matrix, one row a slot: [rank, d_model] float64; K, G, or tau V."""
    slots, tau = memory.bank.slots(layer), memory.bank.tau[0, memory.bank.layers.index(layer)]
    rows = {"up": slots.k, "gate": slots.g, "down": slots.v}[part]
    assert rows is not None
    return rows[0].double() * tau.double() if part == "down" else rows[0].double()


def sha256_of(tensor: Tensor) -> str:
    """Of its bytes."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def check_sha256(path: Path, wanted: str) -> None:
    """Raises ValueError unless the memory file at `path` is the one that was merged."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
            raise ValueError(f"{path.name} is not the memory file that was merged; it was changed since")


class Progress:
    """Adds up bytes and passes them on."""

    def __init__(self, total: int, show: OnProgress | None) -> None:
        self.done, self.total, self.show = 0, total, show

    def add(self, n_bytes: int) -> None:
        self.done += n_bytes
        if self.show is not None:
            self.show(self.done, self.total)


# -------------------------------------------------------------------- config and index


def _new_config(source: Checkpoint, plan: Plan) -> str:
    config = source.config
    set_width(config, plan)
    if plan.dtype is not None:
        _set_dtype(config, str(plan.dtype).removeprefix("torch."))
        if not {"dtype", "torch_dtype"} & config.keys():
            config["dtype"] = str(plan.dtype).removeprefix("torch.")
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Here and in the configs of a multimodal model's parts, under whichever name is used."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif key.endswith("_config") and isinstance(value, dict):
            _set_dtype(value, dtype)


def _new_index(source: Checkpoint, plan: Plan) -> str:
    assert source.index_text is not None
    index = json.loads(source.index_text)
    old, new = source.entries, {name: new_entry(entry, plan) for name, entry in source.entries.items()}
    metadata = index.get("metadata") or {}
    if "total_size" in metadata:
        metadata["total_size"] = sum(entry.n_bytes for entry in new.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] += sum(_numel(new[name]) - _numel(old[name]) for name in old)
    return json.dumps(index | {"metadata": metadata}, indent=2, sort_keys=True) + "\n"


def _numel(entry: Entry) -> int:
    return torch.Size(entry.shape).numel()
