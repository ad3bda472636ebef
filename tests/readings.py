"""What tests of the reader share: how they read, a chunk learnt behind its context, and records compared."""

from typing import Any

import torch
from torch import Tensor, nn

from helpers import text
from locas.attach import attached
from locas.attention import AttentionGradient
from locas.bank import Bank
from locas.forward import chunk_nll, find_head, frozen, read_prefix
from locas.stream import ChunkRecord, ReadSettings
from locas.write import Rule, WriteSettings

# (family, memory): a gated family, one with step-wise slots, one without an FFN module.
KINDS = ["qwen2", "gpt2", "opt"]
READ = ReadSettings(window=17, chunk=7, write=WriteSettings(lr=0.1, damping=0.1, damping_every=2))
CHUNK, PREFIX = 11, 31  # longer than the sliding windows of the tiny models, so that those have masks of two kinds


def reading(rule: Rule = "muon", steps: int = 1, **more: Any) -> ReadSettings:
    write = WriteSettings(rule, lr=0.05, damping=0.1, damping_every=2)
    return ReadSettings(window=17, chunk=7, steps=steps, write=write, **more)


def learn(
    model: nn.Module, bank: Bank, gradient: AttentionGradient = "full", recompute_ffn: bool = False
) -> tuple[Tensor, Tensor]:
    """The losses of a chunk behind a prefix, and the memory's gradient."""
    ids = torch.stack([text(PREFIX + CHUNK + 1, seed) for seed in (1, 2)])
    head = find_head(model)
    with frozen(model), attached(model, bank, [0, 0]):
        bank.requires_grad_()
        prefix = read_prefix(model, ids[:, :PREFIX])
        nll = chunk_nll(model, ids[:, PREFIX:-1], ids[:, PREFIX + 1 :], prefix, head, gradient, recompute_ffn)
        nll.sum().backward(inputs=bank.leaves())
        assert bank.grad is not None
        grad = bank.grad
        bank.requires_grad_(False)
    return nll.detach(), grad


def same_record(one: ChunkRecord | None, other: ChunkRecord | None, tolerance: float = 0.0) -> None:
    """All fields but the time."""
    if one is None or other is None:
        assert one is other
        return
    assert (one.start, one.stop, one.filled, one.undone) == (other.start, other.stop, other.filled, other.undone)
    assert one.step_scale == other.step_scale
    for name in ("nll", "grad_norm", "row_norm"):
        a, b = (torch.as_tensor(getattr(r, name)) for r in (one, other))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
