"""The context before a chunk: recomputed for every chunk, or kept from chunk to chunk.

Recomputing is exact: each chunk sees precisely its window, read with the memory as it now is. Keeping saves that pass:
the keys and values that a chunk left behind serve as the next chunk's context,

    exact:  [start] x x x x x | chunk        kept:  [sinks] k k k k k | chunk

They were made with the memory as it was then, and by tokens that saw context of their own, as in Transformer-XL
(arXiv:1901.02860). The document's first few tokens, the attention sinks without which a sliding context falls apart
(arXiv:2309.17453), stand right before the oldest kept token, so that the distances between positions never exceed the
window; they are read for several chunks ahead in one batch, since each chunk finds them at another place. Positions
count on from chunk to chunk; every `refresh` chunks the window is recomputed and they start from 0 again.

This needs a backbone that knows positions by their distances only (rotary embeddings, ALiBi), which
`forward.positions_are_relative` finds out by trying. `prefix_for` chooses between the two ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from locas.forward import call, decoder, device_of, positions_are_relative, read_prefix
from locas.read_settings import ReadSettings
from locas.window import Layout

_AHEAD = 16  # chunks for which the sinks are read at once


def prefix_for(
    model: nn.Module, documents: Sequence[Tensor], layout: Layout, settings: ReadSettings
) -> KeptPrefix | RecomputedPrefix:
    """How these documents' context is to be read: kept where that is asked for and possible, else recomputed.

    Warns where the backbone's positions do not allow it.
    """
    limit = layout.window_tokens - layout.chunk_tokens - 1
    if not settings.reuse or limit < 1:
        return RecomputedPrefix(model)
    if not positions_are_relative(model, settings.refresh * layout.chunk_tokens + layout.window_tokens):
        warnings.warn(
            f"{type(model).__name__} knows positions by their numbers, not by their distances, so its context "
            "cannot be kept from chunk to chunk: every window is recomputed",
            stacklevel=3,
        )
        return RecomputedPrefix(model)
    device = device_of(model)
    lead = torch.tensor([] if layout.start_id is None else [layout.start_id], dtype=torch.int64, device=device)
    sinks = min(settings.sinks, limit // 2)
    first = [torch.cat([lead, document[:sinks].to(device)])[:sinks] for document in documents]
    longest = max(document.numel() for document in documents) + lead.numel()
    return KeptPrefix(model, first, limit, layout.chunk_tokens, settings.refresh, longest)


class RecomputedPrefix:
    """Reads every window's context anew, and remembers nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def given(self, rows: list[int], prefix: Tensor, n_inputs: int, ready: Callable[[], object]) -> list[Tensor]:
        """See `KeptPrefix.given`."""
        return [prefix]

    def context(self, prefix: Tensor) -> dict[str, Any]:
        """See `KeptPrefix.context`."""
        return read_prefix(self.model, prefix)

    def left(self, context: dict[str, Any]) -> list[Tensor]:
        """None."""
        return []

    def open(self, left: Sequence[Tensor]) -> None:
        """Nothing."""

    def keep(self) -> None:
        """Nothing."""

    def drop(self, rows: Collection[int]) -> None:
        """Nothing."""

    def forget(self) -> None:
        """Nothing."""

    def tensors(self) -> list[Tensor]:
        """None."""
        return []

    def state(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing."""


@dataclass
class _Kept:
    """What stays from chunk to chunk.

    keys, values: by layer, [row, kv_heads, tokens, head_dim], the beginning of a tensor with room for the next chunk's;
    where `cut`, with room for the sinks before them, in the place of tokens that are dropped. rows: the document of
    each. stop: one past the last token's position. reads: chunks since the window was last recomputed. cut: whether
    older tokens were dropped, so that sinks are needed. sinks: keys and values by layer, [row, chunks ahead, kv_heads,
    sinks, head_dim].
    """

    keys: list[Tensor]
    values: list[Tensor]
    rows: list[int]
    stop: int
    reads: int
    cut: bool
    sinks: list[Tensor]


class KeptPrefix:
    """What one reader keeps of its documents' context.

    Args:
        model: a causal language model in evaluation mode whose positions are relative.
        first: for each document its first `sinks` tokens, start token included.
        limit: tokens of context before a chunk, sinks included.
        chunk: tokens of a chunk.
        refresh: recompute the window after so many chunks.
        longest: tokens of the longest document, start token included.
    """

    def __init__(
        self, model: nn.Module, first: list[Tensor], limit: int, chunk: int, refresh: int, longest: int
    ) -> None:
        self.model, self.first, self.limit, self.chunk, self.refresh = model, first, limit, chunk, refresh
        self.sinks = max(ids.numel() for ids in first)
        self.room = min(limit + chunk, longest)
        self._kept: _Kept | None = None
        self._reading: _Kept | None = None  # what will be kept of the chunk that is being read
        self._left: Sequence[Tensor] = ()
        self._layers = 0  # of the context that is given, where sinks are

    def given(self, rows: list[int], prefix: Tensor, n_inputs: int, ready: Callable[[], object]) -> list[Tensor]:
        """The tensors that `context` makes a chunk's context of: positions; by layer keys and values; of the sinks
        likewise, or nothing.

        Args:
            rows: the documents that are read.
            prefix: [row, seq] the tokens of the window before the chunk, in case it is recomputed.
            n_inputs: tokens of the chunk.
            ready: called before the model is.
        """
        kept = self._kept
        states: list[Tensor] = []
        sinks: list[Tensor] = []
        if kept is None or kept.reads >= self.refresh:
            if prefix.shape[1]:
                past = self._cache()
                ready()
                with torch.no_grad():
                    call(decoder(self.model), prefix, past_key_values=past, use_cache=True)
                states = _states(past)
            first, reads, cut = prefix.shape[1], 0, False
        else:
            if kept.cut and self.sinks and kept.sinks:
                sinks = [_pick(t, kept.rows, rows) for t in kept.sinks]
            elif kept.cut and self.sinks:
                ready()
                sinks = self._read_sinks(rows, kept)
            states = [_pick(t, kept.rows, rows) for pair in zip(kept.keys, kept.values, strict=True) for t in pair]
            first, reads, cut = kept.stop, kept.reads, kept.cut
        now, later = [t[:, 0] for t in sinks], [t[:, 1:] for t in sinks if t.shape[1] > 1]
        tokens = n_inputs + (states[0].shape[-2] if states else 0)
        cut = cut or tokens > self.limit
        self._reading = _Kept([], [], rows, first + n_inputs, reads + 1, cut, later)
        self._layers = len(now)
        positions = torch.arange(first, first + n_inputs, device=prefix.device).repeat(len(rows), 1)
        return [positions, *states, *now]

    def context(self, positions: Tensor, *states: Tensor) -> dict[str, Any]:
        """What the call with a chunk's tokens needs besides them; sinks are written over what is to be dropped."""
        sinks, states = (states[-self._layers :], states[: -self._layers]) if self._layers else ((), states)
        for state, sink in zip(states, sinks, strict=False):
            state[:, :, : self.sinks] = sink
        return {"past_key_values": self._cache(states), "use_cache": True, "position_ids": positions}

    def _cache(self, states: Sequence[Tensor] = ()) -> DynamicCache:
        past = DynamicCache()
        past.layers = [_Layer(self.room, k, v) for k, v in zip(states[::2], states[1::2], strict=True)]
        past.layer_class_to_replicate = partial(_Layer, self.room)  # the model adds layers where there are none yet
        return past

    def left(self, context: dict[str, Any]) -> list[Tensor]:
        """What may be kept of a context that a chunk was read behind: by layer keys and values."""
        return _states(context["past_key_values"])

    def open(self, left: Sequence[Tensor]) -> None:
        """Holds what `left` returned until `keep` keeps it. What is replayed may leave it in the same place each time:
        it reads what is there before it writes."""
        self._left = left

    def _read_sinks(self, rows: list[int], kept: _Kept) -> list[Tensor]:
        """Keys and values of the sinks, layer by layer, where the next chunks will look for them."""
        ids = torch.stack([self.first[row] for row in rows])
        begin = kept.stop - kept.keys[0].shape[-2]
        ahead = min(_AHEAD, self.refresh - kept.reads)
        steps = torch.arange(ahead, device=ids.device) * self.chunk
        positions = begin + steps[:, None] + torch.arange(ids.shape[1], device=ids.device)
        past = DynamicCache()
        with torch.no_grad():
            call(
                decoder(self.model),
                ids.repeat_interleave(ahead, dim=0),
                past_key_values=past,
                use_cache=True,
                position_ids=positions.repeat(len(rows), 1),
            )
        return [t.unflatten(0, (len(rows), ahead)) for t in _states(past)]

    def keep(self) -> None:
        """Keeps what the last call left in its cache, for the next chunk."""
        reading, left = self._reading, self._left
        self._reading, self._left = None, ()
        if reading is None or not left:
            return
        if left[0].shape[-2] > self.limit:  # the last tokens to the front, one layer after another
            left = [t[:, :, : self.limit].copy_(t[:, :, -self.limit :].clone()) for t in left]
        self._kept = replace(reading, keys=list(left[::2]), values=list(left[1::2]))

    def drop(self, rows: Collection[int]) -> None:
        """Lets these documents' context go: of one that failed it is not finite, and would not be loaded again."""
        kept = self._kept
        left = [] if kept is None else [row for row in kept.rows if row not in rows]
        if kept is None or not left:
            self._kept = None
        elif left != kept.rows:
            parts = (kept.keys, kept.values, kept.sinks)
            keys, values, sinks = ([_pick(t, kept.rows, left) for t in part] for part in parts)
            self._kept = replace(kept, keys=keys, values=values, sinks=sinks, rows=left)

    def forget(self) -> None:
        """Recomputes the window at the next chunk."""
        self._kept = self._reading = None
        self._left = ()

    def tensors(self) -> list[Tensor]:
        """What is kept, as it lies: their storages have room for a chunk besides."""
        kept = self._kept
        return [] if kept is None else [*kept.keys, *kept.values, *kept.sinks]

    # ---------------------------------------------------------------- resuming

    def state(self) -> dict[str, Tensor]:
        """What the next chunk's context depends on; empty where it will be recomputed."""
        kept = self._kept
        if kept is None:
            return {}
        parts = (("key", kept.keys), ("value", kept.values), ("sink", kept.sinks))
        # The next chunk writes into what is kept. Of one head alone the strides would be copied, and no room with them.
        copied = torch.contiguous_format
        state = {f"{name}.{i}": t.clone(memory_format=copied) for name, ts in parts for i, t in enumerate(ts)}
        numbers = torch.tensor([kept.stop, kept.reads, int(kept.cut), *kept.rows])
        return state | {"numbers": numbers}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` returned. A model that is spread over devices recomputes the window instead.

        Raises:
            ValueError: it does not hang together; nothing was changed.
        """
        if not state or len({parameter.device for parameter in self.model.parameters()}) > 1:
            self.forget()
            return
        device = self.first[0].device
        keys, values, sinks = (
            [state[name].to(device, copy=True) for name in sorted(state, key=_number) if name.startswith(part)]
            for part in ("key.", "value.", "sink.")
        )
        numbers = state["numbers"].tolist() if "numbers" in state else []
        stop, reads, cut, *rows = numbers if len(numbers) > 2 else [0, 0, 0]
        shapes = {(t.ndim, t.shape[0], t.shape[-2]) for t in (*keys, *values)}
        shapes_of_sinks = {(t.ndim, t.shape[0], t.shape[-2]) for t in sinks}
        if (
            len(state) != len(keys) + len(values) + len(sinks) + 1
            or len(keys) != len(values)
            or len(sinks) not in (0, 2 * len(keys))
            or not rows
            or not all(0 <= row < len(self.first) for row in rows)
            or shapes != {(4, len(rows), keys[0].shape[-2])}
            or not shapes_of_sinks <= {(5, len(rows), self.sinks)}
        ):
            raise ValueError(
                "this state's kept context does not fit its documents; move the state away to start afresh"
            )
        self._kept = _Kept(keys, values, rows, stop, reads, bool(cut), sinks)


class _Append(torch.autograd.Function):
    """A chunk's keys or values written behind the context's, which take no gradients, where there is room for them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, room: Tensor, context: int) -> Tensor:
        ctx.context, stop = context, context + own.shape[-2]
        room[:, :, context:stop] = own
        return room[:, :, :stop]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[:, :, ctx.context :], None, None


class _Layer(DynamicLayer):
    """A cache layer with room for so many tokens, behind which the next ones are written: a context that is kept from
    chunk to chunk is never there twice."""

    def __init__(self, room: int, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        self.room = room
        if keys is not None and values is not None:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values  # not copied

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        there = self.get_seq_length()
        keys, values = (
            _Append.apply(own, _with_room(context, there, own, self.room), there)
            for context, own in ((self.keys, key_states), (self.values, value_states))
        )
        self.keys, self.values = keys.detach(), values.detach()  # what their gradients need may go
        return keys, values


def _with_room(context: Tensor, there: int, own: Tensor, tokens: int) -> Tensor:
    """[row, kv_heads, tokens, head_dim] a tensor that begins with the context, of so many tokens, and has room for a
    chunk's own keys or values behind it: the very one that the context is the beginning of, or a new one, of `tokens`
    tokens or as many as are needed."""
    rows, heads, more, width = own.shape
    has = context.stride(1) // width if there and context.stride()[2:] == (width, 1) else 0
    if has >= there + more and context.stride(0) == heads * context.stride(1):
        return context.as_strided((rows, heads, has, width), context.stride())
    room = own.new_empty(rows, heads, max(there + more, tokens), width)
    if there:
        room[:, :, :there] = context
    return room


def _states(past: Any) -> list[Tensor]:
    """Keys and values of a cache, by layer."""
    return [t for layer in past.layers for t in (layer.keys, layer.values)]


def _pick(tensor: Tensor, kept: list[int], rows: list[int]) -> Tensor:
    """Of a tensor with a row for each document of `kept`, those of `rows`; where all are wanted, no copy."""
    if rows == kept:
        return tensor
    return tensor.index_select(0, torch.tensor([kept.index(row) for row in rows], device=tensor.device))


def _number(name: str) -> int:
    """Names end in ".2", ".10": by number, not by letters."""
    return int(name.rpartition(".")[2]) if "." in name else 0
