"""A chunk's passes as CUDA graphs.

A pass over a chunk launches some thousand kernels, one after another, and on all but large backbones a GPU is done with
each before the host has launched the next. What was captured once is launched as one: the same kernels on the same
numbers. Chunks of one shape follow one another in any longer text; those of another shape (the first ones, whose
context is shorter, and the last one) are read as they would be without.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_BEFORE = 1  # chunks of one shape before the next is captured: kernels are loaded and chosen by then

# Of the inputs and of what the stage before it made, what this one makes. Where there is a choice of stages, whichever
# is replayed.
Stage = Callable[[Sequence[Tensor], Any], Any]
Stages = Sequence[Sequence[Stage]]


class Graphs:
    """Captures and replays for one reader.

    Attributes:
        replayed: how often a captured first stage was replayed.

    Args:
        model: which must lie on one device.
        device: that one's number; negative: the current one.
    """

    def __init__(self, model: nn.Module, device: int = -1) -> None:
        self.replayed = 0
        self._modules, self._device = list(model.modules()), device
        self._last: Hashable = ()
        self._seen: dict[Hashable, int] = {}
        self._graph: Graph | None = None
        self._off = False

    def seen_by_others(self) -> bool:
        """Whether someone's hooks are on the model: they would not be called, and what they use might be gone."""
        return any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in self._modules
        )

    def run(
        self, key: Hashable, inputs: Sequence[Tensor], stages: Stages, ready: Callable[[], object] | None
    ) -> Graph | None:
        """Replays the first stage; captures all before, where there is something new to capture.

        Args:
            key: what must be the same, besides the inputs' shapes, for what was captured to be the right thing.
            inputs: tensors on the device.
            stages: what is captured, one after another; none may wait for the device. Each is a choice of stages, of
                which one is replayed; only the last stage may leave a choice.
            ready: called before anything is captured; returns whatever holds tensors that the stages use. None: this is
                no time to capture.

        Returns:
            What was replayed, its result in `made`; None: run it yourself.
        """
        whole = (key, *((t.shape, t.dtype) for t in inputs))
        again, self._last = self._last == whole, whole
        before, self._seen[whole] = self._seen.get(whole, 0), self._seen.get(whole, 0) + 1
        if self._off:
            return None
        if self._graph is None or self._graph.key != whole:
            between = self._graph is not None and not again  # others of another shape
            if ready is None or between or before < _BEFORE:
                return None
            self._graph = None  # its memory first
            alive = ready()
            state = _state(self._device)
            try:
                with torch.cuda.device(self._device):
                    self._graph = Graph(whole, inputs, stages, alive)
            except RuntimeError as error:
                self._off = True
                _put_back(state)
                first = str(error.__cause__ or error.__context__ or error).strip().splitlines()[0]
                warnings.warn(f"this backbone is read without CUDA graphs, kernel by kernel: {first}", stacklevel=4)
                return None
        self._graph.replay(inputs)
        self.replayed += 1
        return self._graph


class Graph:
    """What was captured.

    Attributes:
        key: see `Graphs.run`.
        made: by the stage that was replayed last; its next replay writes over it.
    """

    def __init__(self, key: Hashable, inputs: Sequence[Tensor], stages: Stages, alive: object) -> None:
        self.key, self._alive = key, alive
        self._inputs = list(inputs)  # as they are: what lies in the same place next time need not be copied
        self._stages: list[list[tuple[torch.cuda.CUDAGraph, Any]]] = []
        self.made: Any = None
        pool = None
        for choice in stages:
            captured = []
            for stage in choice:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    made = stage(self._inputs, self.made)
                captured.append((graph, made))
                pool = graph.pool() if pool is None else pool
            self._stages.append(captured)
            self.made = captured[0][1]
        self._next = 0

    def replay(self, inputs: Sequence[Tensor]) -> None:
        """The first stage, of new inputs."""
        pairs = zip(self._inputs, inputs, strict=True)
        moved = [(own, new) for own, new in pairs if own.data_ptr() != new.data_ptr()]
        for dtype in {own.dtype for own, _ in moved}:  # of one dtype they are one kernel
            some = [pair for pair in moved if pair[0].dtype == dtype]
            torch._foreach_copy_([own for own, _ in some], [new for _, new in some])
        self._next = 0
        self.go_on()

    def go_on(self, which: int = 0) -> Any:
        """The next stage, where there is a choice this one; returns what it made."""
        graph, self.made = self._stages[self._next][which]
        graph.replay()
        self._next += 1
        return self.made


def graphs_for(model: nn.Module, device: torch.device) -> Graphs | None:
    """For a model that lies whole on one CUDA device; else None."""
    if device.type != "cuda":
        return None
    whole = all(t.device == device for t in (*model.parameters(), *model.buffers()))
    if not whole or any(hasattr(module, "_hf_hook") for module in model.modules()):
        return None
    return Graphs(model, -1 if device.index is None else device.index)


def _state(device: int) -> tuple[torch.cuda.Stream, torch.Generator, Tensor]:
    index = torch.cuda.current_device() if device < 0 else device
    generator = torch.cuda.default_generators[index]
    return torch.cuda.current_stream(index), generator, generator.get_state()


def _put_back(state: tuple[torch.cuda.Stream, torch.Generator, Tensor]) -> None:
    """A capture that failed may leave its stream the current one, and the generator believing that it goes on: gives
    that a state of its own."""
    stream, generator, numbers = state
    torch.cuda.set_stream(stream)
    torch.cuda.synchronize()
    fresh = torch.Generator(generator.device)
    fresh.set_state(numbers)
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


__all__ = ["Graph", "Graphs", "Stage", "Stages", "graphs_for"]
