"""How much memory a piece of work needs at its peak, on CUDA and on CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def peak_bytes(work: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """The result of `work`, and how many bytes of tensors it held at most, beyond those that were there before.

    CUDA: the allocator's count. CPU: every allocation of torch, as its profiler records them, which slows the work.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with no_log_lines(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        result = work()
    kineto = profiler.profiler
    assert kineto is not None
    held = peak = 0
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak


@contextmanager
def no_log_lines() -> Iterator[None]:
    """The profiler writes to standard error from C++, among other things for each tensor that is older than it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, storage that they share counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
