"""Memories of every kind beside tiny models, and short readings with them."""

from typing import Any

import torch
from torch import Tensor, nn

from helpers import START, text
from locas.bank import Bank
from locas.initialise import InitSettings, create_bank
from locas.stream import ChunkRecord, Reader, ReadSettings
from locas.write import WriteSettings

READ = ReadSettings(window=13, chunk=5, write=WriteSettings(lr=0.1))


def make(model: nn.Module, variant: Any, strategy: Any, layers: list[int], size: int = 1) -> Bank:
    settings = InitSettings(3, variant, strategy, tau_scale=4.0)
    return Bank.stack([create_bank(model, text(11, 9), settings, layers=layers, start_id=START)] * size)


def batch(*lengths: int) -> Tensor:
    return torch.stack([text(n, 20 + i) for i, n in enumerate(lengths)])


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def read(model: nn.Module, bank: Bank | None, *documents: Tensor, learn: bool = True) -> list[list[ChunkRecord | None]]:
    return list(Reader(model, bank, documents, READ, start_id=START, learn=learn))


def scores(chunks: list[list[ChunkRecord | None]], row: int = 0) -> Tensor:
    return torch.cat([r[row].nll for r in chunks if r[row] is not None])  # type: ignore[union-attr]
