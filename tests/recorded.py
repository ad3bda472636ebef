"""CUDA graphs without CUDA: what a capture records is the same operations on the same memory, here replayed on the CPU.

As on a GPU, a capture leaves everything as it was and computes nothing that can be used before the first replay; what
asks for a number meanwhile fails; a replay runs no Python of what was captured, and tensors bear no trace of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from locas import graphs

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")


class RecordedGraph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, fresh in self.operations:
                made = tree_flatten(function(*args, **kwargs))[0]
                for i, own in fresh:
                    own.copy_(made[i])


class Recording(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph, host: list[Tensor]) -> None:
        super().__init__()
        self._operations, self._host = graph.operations, {_address(t) for t in host}
        self._own: dict[int, Tensor] = {}  # of what the capture made, by the address; it stays, so addresses are unique
        self._before: dict[int, tuple[Tensor, Any]] = {}  # what was there, as it was

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda t: t.data, (args, kwargs or {}))
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        # Without a device it would be made on the host, but for what is made of what is on the device.
        made_there = (not given and kwargs.get("device") is None) or function.overloadpacket.__name__ == "lift_fresh"
        on_host = made_there or (bool(given) and all(_address(t) in self._host for t in given))
        if not on_host and any(t.ndim and _address(t) in self._host for t in given):
            raise RuntimeError(f"expected all tensors to be on the same device: {function}")
        if not on_host and _waits(function, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        if function._schema.is_mutable:
            for t in given:
                if _address(t) not in self._own:
                    self._before.setdefault(_address(t), (t, t.untyped_storage().clone()))
        out = function(*args, **kwargs)
        known = set() if made_there else {_address(t) for t in given}
        fresh = [
            (i, t.data)
            for i, t in enumerate(tree_flatten(out)[0])
            if isinstance(t, Tensor) and _address(t) not in known
        ]
        self._own |= {_address(t): t for _, t in fresh}
        if on_host:
            self._host |= {_address(t) for _, t in fresh} - {0}  # nothing is copied where there is nothing
            return out
        self._operations.append((function, args, kwargs, fresh))
        return out

    def is_on_host(self, t: Tensor) -> bool:
        return _address(t) in self._host

    def end(self) -> None:
        for t, before in self._before.values():
            t.untyped_storage().copy_(before)
        for address, t in self._own.items():
            if address not in self._host and t.is_floating_point():
                t.fill_(torch.nan)


class Copying(TorchFunctionMode):
    """Refuses copies between host and device, which on a CPU are none."""

    def __init__(self, host: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self._is_on_host = host

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device", next((a for a in args[1:] if isinstance(a, torch.device | str)), None))
        moved = function is Tensor.to and device is not None and self._is_on_host(args[0])
        made = function in (torch.tensor, torch.as_tensor) and device is not None and args[0] != []
        if moved or made or function in (Tensor.cpu, Tensor.tolist, Tensor.numpy):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function.__name__}")
        return function(*args, **kwargs)


def _waits(function: Any, args: Any) -> bool:
    """Whether a GPU's host waits for a result."""
    name = function.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):
        return any(i is not None and i.dtype == torch.bool for i in args[1])
    return name in WAITING or (name == "repeat_interleave" and function._overloadname == "Tensor")


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


@pytest.fixture
def recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """`locas.graphs` captures on the CPU. Put tensors into the list that would lie on the host."""
    capturing = False
    host: list[Tensor] = []

    @contextmanager
    def graph(own: RecordedGraph, pool: object) -> Iterator[None]:
        nonlocal capturing
        capturing, recording = True, Recording(own, host)
        try:
            with Copying(recording.is_on_host), recording:
                yield
        finally:
            capturing = False
            recording.end()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(graphs, "_state", lambda _: None)
    monkeypatch.setattr(graphs, "_put_back", lambda _: None)
    for asked in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, asked, lambda: capturing)
    return host
