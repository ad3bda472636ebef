"""What tests of the reader share: how they read, and records compared."""

from typing import Any

import torch

from locas.stream import ChunkRecord, ReadSettings
from locas.write import Rule, WriteSettings

# (family, memory): a gated family, one with step-wise slots, one without an FFN module.
KINDS = ["qwen2", "gpt2", "opt"]
READ = ReadSettings(window=17, chunk=7, write=WriteSettings(lr=0.1))


def reading(rule: Rule = "muon", steps: int = 1, **more: Any) -> ReadSettings:
    return ReadSettings(window=17, chunk=7, steps=steps, write=WriteSettings(rule, lr=0.05), **more)


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
