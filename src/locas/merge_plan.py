"""What a merge will do: which tensors grow and by how much, and everything that may stand in the way.

Nothing is written here, and no weights are read but those that fingerprints are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from locas.checkpoint import DTYPES, Checkpoint, Entry, resized
from locas.memory import Memory
from locas.sites import Family, Site, canonical_activation, find_family, find_sites, fingerprint, stored_names

MANIFEST = "locas_merge.json"
ATTACH_INSTEAD = "Without merging, the memory works as a file: locas generate, chat and score take --memory FILE"


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


def make_plan(
    source: Checkpoint,
    files: Sequence[Path],
    memories: Sequence[Memory],
    align: int,
    dtype: torch.dtype | None,
) -> Plan:
    """How these memories go into this checkpoint.

    Args:
        source: the backbone's checkpoint.
        files: of the memories, for messages.
        memories: in the order in which their slots will lie.
        align: the new FFN width is a multiple of this.
        dtype: of everything afterwards; None: as stored.

    Raises:
        ValueError: a memory of another backbone or kind, or a backbone that cannot be widened.
    """
    _check_source(source)
    model = skeleton(source.config)
    plan = _plan(source, model, files, memories, align, dtype)
    _check_fingerprints(source, model, files, memories)
    return plan


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


def skeleton(config: dict[str, Any]) -> nn.Module:
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
    model: nn.Module,
    files: Sequence[Path],
    memories: Sequence[Memory],
    align: int,
    dtype: torch.dtype | None,
) -> Plan:
    family, sites = find_family(model), find_sites(model)
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
    _check_shapes(source, model, family, plan)
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


def _check_shapes(source: Checkpoint, model: nn.Module, family: Family, plan: Plan) -> None:
    """Raises ValueError unless what the new config asks for is exactly what will be written."""

    def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    config = source.config
    set_width(config, plan)
    old, new = shapes(model), shapes(skeleton(config))
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
        widened = new_entry(entry, plan).shape
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


def _check_fingerprints(
    source: Checkpoint, model: nn.Module, files: Sequence[Path], memories: Sequence[Memory]
) -> None:
    """Raises ValueError unless all memories were made with this checkpoint, loaded in whatever dtype."""
    names = stored_names(find_family(model), source.entries)
    found: list[str] = []
    for dtype in (None, torch.float32, torch.float16):  # rounding twice on the way to bfloat16 may differ
        if {memory.provenance.backbone_fingerprint for memory in memories} <= set(found):
            return
        found.append(fingerprint(model, lambda layer, part: source.tensor(names[layer, part]).to(dtype)))  # noqa: B023
    for path, memory in zip(files, memories, strict=True):
        wanted = memory.provenance.backbone_fingerprint
        if wanted not in found:
            raise ValueError(
                f"{path} was made with the backbone {memory.provenance.backbone!r} (fingerprint {wanted[:12]}), but "
                f"the FFN weights in {source.folder} are others ({found[0][:12]}); name the checkpoint that it was "
                "made with by --model. Nothing was written."
            )


def new_entry(entry: Entry, plan: Plan) -> Entry:
    """How the header will describe a tensor."""
    shape, widening = list(entry.shape), plan.widenings.get(entry.name)
    if widening is not None:
        shape[widening.axis] = len(widening.parts) * plan.merged
    return resized(entry, tuple(shape), plan.dtype if entry.dtype in DTYPES else None)


def set_width(config: dict[str, Any], plan: Plan) -> None:
    text = config.get("text_config")
    (text if isinstance(text, dict) else config)[plan.key] = plan.merged
