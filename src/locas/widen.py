"""A loaded model's FFNs made wider in place; `locas.merge` does the same to checkpoints on disk, shard by shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from locas.sites import Site, find_family, find_sites


def matrices(site: Site, width: int) -> list[tuple[str, nn.Module, tuple[str, ...], int]]:
    """(name, module, its blocks, the axis of the slots) of a site's matrices, a fused one once."""
    first, last = (1, 0) if site.conv1d else (0, 1)
    matrices: list[tuple[str, nn.Module, tuple[str, ...], int]] = [("down", site.down, ("down",), last)]
    if site.gate is site.up:
        return [*matrices, ("up", site.up, ("gate", "up"), first)]
    if site.gate is not None:
        matrices.append(("gate", site.gate, ("gate",), first))
    return [*matrices, ("up", site.up, ("up",), first)]


def longer(old: Tensor, axis: int, width: int, more: int, rows: list[Tensor | None] | None) -> Tensor:
    """`old` with `more` slots behind every block of `width` along an axis: the rows, then zeros."""
    pieces = []
    for i, block in enumerate(old.detach().split(width, dim=axis)):
        shape = list(block.shape)
        shape[axis] = more
        new = block.new_zeros(shape)
        given = rows[i] if rows is not None else None
        if given is not None:
            given = given.to(new)
            if not bool(given.isfinite().all()):
                raise ValueError(f"the memory holds numbers too large for {new.dtype}; nothing was merged")
            new.narrow(axis, 0, len(given)).copy_(given if axis == 0 else given.T)
        pieces += [block, new]
    return torch.cat(pieces, dim=axis)


def put(model: Any, width: int, tensors: dict[tuple[int, str], Tensor]) -> None:
    """Exchanges the FFNs' tensors, and says the new width wherever transformers keeps it."""
    sites = find_sites(model)
    for (layer, part), tensor in tensors.items():
        matrix, _, kind = part.partition(".")
        module: Any = getattr(sites[layer], matrix)
        setattr(module, kind, nn.Parameter(tensor, requires_grad=False))
        if kind == "weight":
            rows, columns = tensor.shape if not sites[layer].conv1d else tensor.shape[::-1]
            for name, size in (("out_features", rows), ("in_features", columns), ("nf", rows), ("nx", columns)):
                if hasattr(module, name):
                    setattr(module, name, size)
    for site in sites.values():
        if isinstance(getattr(site.exit, "intermediate_size", None), int):
            site.exit.intermediate_size = width  # type: ignore[assignment]
    config = getattr(model.config, "text_config", model.config)
    setattr(config, str(find_family(model).width), width)


__all__ = ["longer", "matrices", "put"]
