"""Backbones of well-known shapes with random weights: time and memory do not depend on the weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from locas.backbone import Backbone

_GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 model (config.json of Qwen/Qwen3-...-Base on the hub)."""

    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151_936

    def n_parameters(self, layers: int | None = None) -> int:
        """Numbers in all its weights; input and output matrix are one."""
        attention = 2 * self.d_model * self.head_dim * (self.heads + self.kv_heads) + 2 * self.head_dim
        layer = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
        return self.vocab * self.d_model + (layers or self.layers) * layer + self.d_model

    def learning_numbers(self, window: int, chunk: int, layers: int | None = None, templora: bool = False) -> int:
        """Numbers that learning needs besides the weights, roughly: what autograd keeps of a chunk (in each layer the
        FFN's gate and up, inputs of norms and of the memory, queries, attention's output, keys and values for every
        query head, the mask), the context's keys and values, and a piece of the logits. TempLoRA learns a whole window
        at once, with all of its logits several times over."""
        learnt, scored = (window, 4 * window) if templora else (chunk, 256)
        queries = self.heads * self.head_dim
        token = 2 * self.d_ff + 4 * self.d_model + 4 * queries
        context = 2 * queries + 2 * self.kv_heads * self.head_dim
        return (layers or self.layers) * (learnt * token + window * context) + learnt * window + scored * self.vocab


SHAPES: dict[str, Shape] = {
    "qwen3-0.6b": Shape(d_model=1024, d_ff=3072, layers=28, heads=16),
    "qwen3-1.7b": Shape(d_model=2048, d_ff=6144, layers=28, heads=16),
    "qwen3-4b": Shape(d_model=2560, d_ff=9728, layers=36, heads=32),
}


def random_backbone(
    name: str, *, dtype: torch.dtype, device: torch.device | str, layers: int | None = None
) -> Backbone:
    """A model of one of `SHAPES`, with random weights and no tokenizer.

    Args:
        name: of the shape.
        dtype: of the weights.
        device: where they are made.
        layers: so many in place of the shape's own, for a machine that is too small.

    Raises:
        ValueError: no such shape.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = _shape(name)
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model: Any = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.eval()
    return Backbone(name if layers is None else f"{name}:{layers}", model, None, None, False, "")


def check_room(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    window: int,
    chunk: int,
    layers: int | None = None,
    templora: bool = False,
) -> None:
    """Before a shape is made: whether it fits, and learning with it (with TempLoRA, too).

    Raises:
        ValueError: no such shape, or it takes more memory than the device has free.
    """
    shape, free = _shape(name), free_bytes(torch.device(device))
    weights = shape.n_parameters(layers) * dtype.itemsize
    rest = shape.learning_numbers(window, chunk, layers, templora) * dtype.itemsize
    if free is not None and weights + rest > free:
        tokens, without = (window, ", --methods without templora") if templora else (chunk, "")
        raise ValueError(
            f"{name} in {str(dtype).removeprefix('torch.')} takes about {(weights + rest) / _GIB:.1f} GiB "
            f"({weights / _GIB:.1f} for its weights, the rest to learn {tokens:,} tokens at once), and {device} has "
            f"{free / _GIB:.1f} GiB free; use --dtype bfloat16, a shorter --window{without}, or only some of its "
            f"layers ({name}:{max(1, (layers or shape.layers) // 4)})"
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where that cannot be found out."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if device.type != "cpu":
        return None
    try:
        with Path("/proc/meminfo").open() as file:  # what is free and what can be made free; Linux only
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _shape(name: str) -> Shape:
    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}; there are {', '.join(SHAPES)}")
    return SHAPES[name]


__all__ = ["SHAPES", "Shape", "check_room", "free_bytes", "random_backbone"]
