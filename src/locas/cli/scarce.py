"""What the command line says where memory runs out: which of the command's own flags need less of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch

# Flag: what to do about it, and with which of its values that is possible. A command is told of the flags that it has.
_WHILE_WORKING: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "recompute_ffn": ("--recompute-ffn", lambda on: not on),
    "attention_gradient": ("--attention-gradient values", lambda kind: kind == "full"),
    "chunk": ("a shorter --chunk", lambda _: True),
    "window": ("a shorter --window", lambda _: True),
    "batch": ("a smaller --batch", lambda size: size is not None and size > 1),
    "layers": ("a memory in fewer layers (--layers upper-half)", lambda layers: layers == "all"),
    "sample_tokens": ("fewer --sample-tokens", lambda _: True),
    "tokens": ("fewer --tokens", lambda _: True),
    "max_new_tokens": ("fewer --max-new-tokens", lambda _: True),
}

_TO_LEARN = ("recompute_ffn", "attention_gradient", "chunk", "window")


def advice(error: BaseException, command: object) -> str:
    """One sentence for an error that `locas.backbone.is_out_of_memory` knows: what ran out, and which flags help.

    Args:
        error: it; its notes say if the backbone was being loaded, where shorter windows do not help.
        command: the command that ran, whose fields are its flags; None: there was none yet.
    """
    on_gpu = isinstance(error, torch.OutOfMemoryError) or "cuda" in str(error).lower()
    flags, loading = _flags(command), bool(getattr(error, "__notes__", None))
    if flags.get("learn") is False:  # how to write would be refused
        flags = {name: value for name, value in flags.items() if name not in _TO_LEARN}
    if flags.get("memory"):  # it has its layers
        flags.pop("layers", None)
    known = {} if loading else _WHILE_WORKING
    ways = [way for name, (way, helps) in known.items() if name in flags and helps(flags[name])]
    dtype = flags.get("dtype")
    if dtype in ("float32", "float64") or (dtype == "auto" and not on_gpu):
        ways.append("--dtype bfloat16")
    if on_gpu and "device" in flags:
        ways.append("--device cpu")
    if flags.get("model") is not None:
        ways.append("a smaller --model")
    if "backbones" in flags:
        ways.append("fewer layers (--backbones NAME:N)")
    where = "the GPU's memory" if on_gpu else "this machine's memory"
    asked = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), flags=re.I)
    said = f"{where} is not enough{' to load the backbone' if loading else ''}"
    if asked:
        size = f"{int(asked[1]) / 2**20:,.1f} MiB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
        said += f" ({size} more were asked for)"
    if not ways:
        return f"{said}; end other programs that use it, or use less text"
    return f"{said}; try {' or '.join([', '.join(ways[:-1]), ways[-1]] if ways[1:] else ways)}"


def _flags(settings: object) -> dict[str, Any]:
    """The values of a command's fields, and of the settings in them, by name."""
    found: dict[str, Any] = {}
    for field in fields(settings) if is_dataclass(settings) else ():
        value = getattr(settings, field.name)
        found |= _flags(value) if is_dataclass(value) else {field.name: value}
    return found
