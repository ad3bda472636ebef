"""Small memories to write into, gradients and curvature for them, and what a writer holds."""

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import fill, same_bytes
from locas.bank import Bank, Variant
from locas.write import Rule, Writer

D_MODEL = 7
RANKS = {0: 3, 2: 3, 3: 5, 5: 11}
RULES: list[Rule] = ["muon", "adamw"]
CONSTANT: dict[str, Any] = {"floor": 1.0}  # the same step throughout
both = pytest.mark.parametrize("rule", RULES)


def make(
    size: int = 1,
    dtype: torch.dtype = torch.float64,
    ranks: dict[int, int] = RANKS,
    seed: int = 0,
    variant: Variant = "glu",
) -> Bank:
    return fill(Bank(variant, "silu", D_MODEL, ranks, size=size, dtype=dtype), seed)


def gradient(bank: Bank, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return (scale * torch.randn(bank.rows.shape, generator=generator, dtype=torch.float64)).to(bank.rows.dtype)


def live(writer: Writer) -> dict[str, Tensor]:
    moments = {f"moment.{i}": moment for i, moment in enumerate(writer.moments)}
    named = {"rows": writer.bank.rows, "counts": writer.counts, "scale": writer.scale, **moments}
    metric = {"curvature": writer.curvature, "inverse": writer.inverse}
    named |= {name: tensor for name, tensor in metric.items() if tensor is not None}
    return named if writer.curvature is None else named | {"seen": writer.seen}


def curvature(bank: Bank, seed: int, tokens: float = 100.0) -> tuple[Tensor, Tensor]:
    """As `Curvature.take` gives it: [bank, d, d] of mean eigenvalue `tokens`; tokens."""
    generator = torch.Generator().manual_seed(2000 + seed)
    x = torch.randn(bank.size, 2 * bank.d_model, bank.d_model, generator=generator, dtype=torch.float64)
    moments = x.mT @ (x * torch.linspace(3, 0.1, bank.d_model, dtype=torch.float64))
    moments = (moments + moments.mT) / 2 + 40 * torch.eye(bank.d_model, dtype=torch.float64)
    moments *= tokens / moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return moments.to(bank.rows.dtype), torch.full((bank.size,), tokens, dtype=torch.float64)


def copies(writer: Writer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in live(writer).items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], memory: Any = slice(None)) -> None:
    for name, tensor in one.items():
        assert same_bytes(tensor[memory], other[name][memory]), name


def flags(*on: int) -> Tensor:
    return torch.tensor(on, dtype=torch.bool)
