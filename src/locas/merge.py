"""Merging: memories become part of a checkpoint, by widening its FFNs; `unmerge.py` takes them out again.

    merge(["book.safetensors"], "merged")     # an ordinary checkpoint: transformers loads it without locas

Per layer (arXiv:2602.05085; method.md sec. 8), W_up' = [W_up; K], W_gate' = [W_gate; G], W_down' = [W_down, tau V^T],
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
* `files`: the original text of config.json and, where there is one, of the index
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from locas._version import __version__
from locas.backbone import DEFAULT_BACKBONE
from locas.checkpoint import (
    CONFIG,
    DTYPES,
    INDEX,
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
    resized,
    write_shard,
    write_text,
)
from locas.memory import Memory, load
from locas.sites import Family, Site, canonical_activation, find_family, find_sites, fingerprint, stored_names

FORMAT = "locas-merge"
FORMAT_VERSION = 1
MANIFEST = "locas_merge.json"
MEMORIES = "locas_memories"
ATTACH_INSTEAD = "Without merging, the memory works as a file: locas generate, chat and score take --memory FILE"

MergeDtype = Literal["stored", "float32", "float64"]
OnProgress = Callable[[int, int], None]  # bytes written, of how many


@dataclass(frozen=True)
class Widening:
    """How one tensor grows.

    Attributes:
        layer: of the site.
        axis: along which the slots lie.
        parts: what lies along it, block after block, each as wide as the FFN: ("gate", "up") in a fused matrix.
        bias: whether the new slots are zero whatever the memory says.
    """

    layer: int
    axis: int
    parts: tuple[str, ...]
    bias: bool


@dataclass(frozen=True)
class Plan:
    """What a merge will do.

    Attributes:
        key: of the FFN's width in config.json.
        original: width of the backbone's FFNs.
        merged: width afterwards.
        widenings: by tensor name.
        first_slots: for each memory, {layer: where its slots begin among the new ones}.
        dtype: of everything afterwards; None: as stored.
    """

    key: str
    original: int
    merged: int
    widenings: dict[str, Widening]
    first_slots: list[dict[int, int]]
    dtype: torch.dtype | None


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
    _check_source(source)
    skeleton = _skeleton(source.config)
    plan = _plan(source, skeleton, files, loaded, align, None if dtype == "stored" else getattr(torch, dtype))
    _check_fingerprints(source, skeleton, files, loaded)
    sizes = [_new_entry(entry, plan).n_bytes for entry in source.entries.values()]
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
            copy_file(source.folder / path, folder / path)
        write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return manifest


def _check_source(source: Checkpoint) -> None:
    folder = source.folder
    if (folder / MANIFEST).exists():
        raise ValueError(
            f"{folder} is a merged checkpoint already: merge all memories at once into its original "
            f"(locas unmerge {folder} gives it back). Memories that were made with the merged one need it as a "
            f"backbone of its own: a copy without {MANIFEST} can be merged, but loses the way back to the first"
        )
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} has an adapter (adapter_config.json) on top; merge that into the weights first")
    if "quantization_config" in source.config:
        raise ValueError(
            f"{folder} is quantised: new rows do not fit into packed weights. Merge into the unquantised checkpoint "
            f"and quantise the result. {ATTACH_INSTEAD}"
        )


def _skeleton(config: dict[str, Any]) -> nn.Module:
    """The model of a config, without weights."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    except (ValueError, KeyError, TypeError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"transformers makes no causal language model of this config: {first}") from error


def _plan(
    source: Checkpoint,
    skeleton: nn.Module,
    files: list[Path],
    memories: list[Memory],
    align: int,
    dtype: torch.dtype | None,
) -> Plan:
    family, sites = find_family(skeleton), find_sites(skeleton)
    model_type = source.config.get("model_type")
    if any(site.experts is not None for site in sites.values()):
        raise ValueError(
            f"{model_type} is a mixture of experts: a memory sits beside the whole expert block, and there is no FFN "
            f"in it that could be widened for every token. {ATTACH_INSTEAD}"
        )
    if family.width is None:
        raise ValueError(
            f"{model_type} has no setting for the FFN's width (its code fixes it), so that nobody could load a widened "
            f"checkpoint. {ATTACH_INSTEAD}"
        )
    widths = {site.d_ff for site in sites.values()}
    if len(widths) != 1:
        raise ValueError(f"the FFNs of this backbone differ in width ({sorted(widths)}), which one setting cannot say")
    for path, memory in zip(files, memories, strict=True):
        _check_kind(path, memory, sites)
    first_slots: list[dict[int, int]] = []
    used = dict.fromkeys(sites, 0)
    for memory in memories:
        first_slots.append({layer: used[layer] for layer in memory.bank.layers})
        for layer, rank in memory.bank.ranks.items():
            used[layer] += rank
    original = widths.pop()
    merged = -(-(original + max(used.values())) // align) * align
    plan = Plan(family.width, original, merged, _widenings(source, family, sites), first_slots, dtype)
    _check_dtypes(source, plan)
    _check_shapes(source, skeleton, family, plan)
    return plan


def _check_kind(path: Path, memory: Memory, sites: dict[int, Site]) -> None:
    """Raises ValueError unless the memory computes what an FFN of these sites computes."""
    bank, site = memory.bank, sites[0]
    missing = sorted(set(bank.layers) - set(sites))
    if missing or bank.d_model != site.d_model:
        raise ValueError(
            f"{path} has width {bank.d_model} and layers {list(bank.layers)}, but the backbone has width "
            f"{site.d_model} and layers 0..{len(sites) - 1}; name the backbone that it was made with by --model"
        )
    own = "glu" if site.gated else "mlp"
    if bank.variant != own:
        raise ValueError(
            f"{path} is a Locas-{bank.variant.upper()} memory, but this backbone's FFN has "
            f"{'a' if site.gated else 'no'} gate: make the memory with --variant {own} (or auto). {ATTACH_INSTEAD}"
        )
    if canonical_activation(bank.activation) != canonical_activation(site.activation):
        raise ValueError(
            f"the activation of {path} is {bank.activation}, but the backbone's FFN has {site.activation}: one FFN "
            f"has one activation. Make the memory with --activation auto. {ATTACH_INSTEAD}"
        )


def _widenings(source: Checkpoint, family: Family, sites: dict[int, Site]) -> dict[str, Widening]:
    names = stored_names(family, source.entries)
    fused = family.gate == family.up
    widenings = {}
    for (layer, part), name in names.items():
        matrix, _, kind = part.partition(".")
        if layer not in sites or part == "down.bias":
            continue
        parts = ("gate", "up") if fused and matrix == "up" else (matrix,)
        axis = 0 if kind == "bias" or (matrix == "down") == family.conv1d else 1
        widenings[name] = Widening(layer, axis, parts, kind == "bias")
    return widenings


def _check_dtypes(source: Checkpoint, plan: Plan) -> None:
    for name in plan.widenings:
        if source.entries[name].dtype not in DTYPES:
            raise ValueError(
                f"{name!r} is stored as {source.entries[name].dtype}: a quantised FFN cannot be widened. Merge into "
                f"the unquantised checkpoint and quantise the result. {ATTACH_INSTEAD}"
            )
    if plan.dtype is None:
        return
    for entry in source.entries.values():
        if entry.dtype in DTYPES and DTYPES[entry.dtype].itemsize > plan.dtype.itemsize:
            raise ValueError(
                f"{entry.name!r} is stored as {entry.dtype}, and --dtype may only widen, so that un-merging stays "
                "exact; leave --dtype out, or choose float64"
            )


def _check_shapes(source: Checkpoint, skeleton: nn.Module, family: Family, plan: Plan) -> None:
    """Raises ValueError unless what the new config asks for is exactly what will be written."""

    def ffn(model: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    config = source.config
    _set_width(config, plan)
    old, new = ffn(skeleton), ffn(_skeleton(config))
    stored = stored_names(family, source.entries)
    wanted = stored_names(family, old)
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    for key, name in wanted.items():
        entry = source.entries.get(stored.get(key, ""))
        if entry is None or entry.shape != old[name]:
            raise ValueError(
                f"the checkpoint should hold {name!r} of shape {old[name]}, and holds "
                f"{'no such tensor' if entry is None else entry.shape}; write it anew with save_pretrained"
            )
        widened = _new_entry(entry, plan).shape
        if new.get(name) != widened:
            raise ValueError(
                f"a config with {plan.key} = {plan.merged} makes {name!r} {new.get(name)} and not {widened}: "
                f"{plan.key} is not the width of this family's FFN alone. Set Family.width to the right key"
            )
        changed.discard(name)
    if changed:
        raise ValueError(
            f"{plan.key} also sets the size of {min(changed)!r}, so that FFNs alone cannot be widened. {ATTACH_INSTEAD}"
        )


def _check_fingerprints(source: Checkpoint, skeleton: nn.Module, files: list[Path], memories: list[Memory]) -> None:
    """Raises ValueError unless all memories were made with this checkpoint, loaded in whatever dtype."""
    names = stored_names(find_family(skeleton), source.entries)
    found: list[str] = []
    for dtype in (None, torch.float32, torch.float16):  # rounding twice on the way to bfloat16 may differ
        if {memory.provenance.backbone_fingerprint for memory in memories} <= set(found):
            return
        found.append(fingerprint(skeleton, lambda layer, part: source.tensor(names[layer, part]).to(dtype)))  # noqa: B023
    for path, memory in zip(files, memories, strict=True):
        wanted = memory.provenance.backbone_fingerprint
        if wanted not in found:
            raise ValueError(
                f"{path} was made with the backbone {memory.provenance.backbone!r} (fingerprint {wanted[:12]}), but "
                f"the FFN weights in {source.folder} are others ({found[0][:12]}); name the checkpoint that it was "
                "made with by --model. Nothing was written."
            )


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
    files_text = {CONFIG: source.config_text} | ({INDEX: source.index_text} if source.index_text is not None else {})
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
        "files": files_text,
    }


# -------------------------------------------------------------------- tensors


def _new_entry(entry: Entry, plan: Plan) -> Entry:
    """How the header will describe a tensor."""
    shape, widening = list(entry.shape), plan.widenings.get(entry.name)
    if widening is not None:
        shape[widening.axis] = len(widening.parts) * plan.merged
    return resized(entry, tuple(shape), plan.dtype if entry.dtype in DTYPES else None)


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
    entries = [_new_entry(entry, plan) for entry in shard.entries]
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


def _set_width(config: dict[str, Any], plan: Plan) -> None:
    text = config.get("text_config")
    (text if isinstance(text, dict) else config)[plan.key] = plan.merged


def _new_config(source: Checkpoint, plan: Plan) -> str:
    config = source.config
    _set_width(config, plan)
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
    old, new = source.entries, {name: _new_entry(entry, plan) for name, entry in source.entries.items()}
    metadata = index.get("metadata") or {}
    if "total_size" in metadata:
        metadata["total_size"] = sum(entry.n_bytes for entry in new.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] += sum(_numel(new[name]) - _numel(old[name]) for name in old)
    return json.dumps(index | {"metadata": metadata}, indent=2, sort_keys=True) + "\n"


def _numel(entry: Entry) -> int:
    return torch.Size(entry.shape).numel()
