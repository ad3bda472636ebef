"""What a memory costs as something grows: memories in a batch, documents, their length, the window, the rank.

over_lengths(backbone, BenchSettings(), (10_000, 1_000_000), reuse=True)["1000000"].ratio   # a chunk there, to one here
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from locas.attach import attached
from locas.backbone import Backbone
from locas.bank import Bank
from locas.evaluate.bench import (
    REFERENCE,
    BenchSettings,
    Timing,
    methods_of,
    new_bank,
    random_ids,
    side_by_side,
    some_text,
    timed,
)
from locas.forward import device_of, frozen
from locas.stream import Reader, ReadSettings

# Key of a result: what was timed relative to what, and what the rows' numbers count.
GROWTH = {
    "memories": ("a generated token, each row with a memory of its own, relative to none", "memories"),
    "length": ("a chunk far into a text, context kept, relative to the first", "token that it begins at"),
    "length_exact": ("a chunk far into a text, window recomputed, relative to the first", "token that it begins at"),
    "documents": ("documents side by side, relative to one", "documents"),
    "window": ("read + learn with this window, relative to reading only with it", "tokens of the window"),
    "rank": ("read + learn at this rank, relative to reading only", "rank"),
}
_PROMPT_TOKENS = 33

OnRound = Callable[[], None]


def over_memories(
    backbone: Backbone, settings: BenchSettings, counts: Sequence[int], on_round: OnRound = lambda: None
) -> dict[str, Timing]:
    """Time of generated tokens in batches of n rows, each with a memory of its own, relative to without."""
    ids = some_text(backbone, settings)
    bank = new_bank(backbone, settings, ids)
    generator = torch.Generator().manual_seed(settings.seed)
    bank.rows.add_(torch.randn(bank.rows.shape, generator=generator).to(bank.rows) / bank.d_model)
    return {f"{n}": _generating(backbone, settings, bank, ids, n, on_round) for n in counts}


def _generating(
    backbone: Backbone, settings: BenchSettings, bank: Bank, ids: Tensor, rows: int, on_round: OnRound
) -> Timing:
    own = bank if rows == 1 else Bank.stack([bank] * rows)
    index = None if rows == 1 else list(reversed(range(rows)))

    def with_memory() -> AbstractContextManager[object]:
        return attached(backbone.model, own, index)

    if device_of(backbone.model).type == "cuda":
        work = {
            name: _replayed(backbone, ids, rows, settings.generated, memory)
            for name, memory in (("plain", nullcontext), ("memory", with_memory))
        }
        return side_by_side(work, settings, device_of(backbone.model), on_round)["memory"]
    step, first = (_decoder(backbone, ids, rows, n) for n in (settings.generated, 1))
    plain, memory = [], []
    for number in range(settings.warmup + settings.rounds):
        # Which goes first changes from round to round: the second finds the processor's caches warm.
        took = {}
        for learnt in (True, False) if number % 2 else (False, True):
            with with_memory() if learnt else nullcontext():
                first()  # what a memory needs once, its rows gathered and cast, belongs to no token
                took[learnt] = timed(step, device_of(backbone.model))
        if number >= settings.warmup:
            plain.append(took[False])
            memory.append(took[True])
        on_round()
    return Timing(memory, plain)


def _replayed(
    backbone: Backbone, ids: Tensor, rows: int, tokens: int, memory: Callable[[], AbstractContextManager[object]]
) -> Callable[[], None]:
    """As `_decoder`, without the prompt's time, and each token one CUDA graph over a static cache: as engines, and
    `generate(cache_implementation="static")`, do it. Launched one by one, kernels would take as long as the host."""
    from transformers import StaticCache

    model, prompt = backbone.model, ids[:_PROMPT_TOKENS].expand(rows, -1)
    past: Any = StaticCache(config=model.config, max_cache_len=_PROMPT_TOKENS + tokens + 4)
    last, graph, stream = prompt[:, -1:].clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def token() -> None:
        last.copy_(model(last, past_key_values=past, use_cache=True).logits[:, -1:].argmax(-1))

    with memory() as alive, torch.no_grad(), frozen(model):
        model(prompt[:, :-1], past_key_values=past, use_cache=True, logits_to_keep=1)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                token()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            token()

    def step(_alive: object = alive) -> None:
        for layer in past.layers:
            layer.cumulative_length.fill_(_PROMPT_TOKENS - 1)
        last.copy_(prompt[:, -1:])
        for _ in range(tokens):
            graph.replay()

    return step


def _decoder(backbone: Backbone, ids: Tensor, rows: int, tokens: int) -> Callable[[], None]:
    """Generates `tokens` tokens greedily, row by row of a batch, after a short prompt."""
    from transformers import DynamicCache

    model = backbone.model
    prompt = ids[:_PROMPT_TOKENS].expand(rows, -1)

    def step() -> None:
        with torch.no_grad(), frozen(model):
            past = DynamicCache()
            model(prompt[:, :-1], past_key_values=past, use_cache=True, logits_to_keep=1)
            last = prompt[:, -1:]
            for _ in range(tokens):
                logits = model(last, past_key_values=past, use_cache=True).logits
                last = logits[:, -1:].argmax(-1)

    return step


def over_lengths(
    backbone: Backbone,
    settings: BenchSettings,
    positions: Sequence[int],
    reuse: bool,
    on_round: OnRound = lambda: None,
) -> dict[str, Timing]:
    """Time of a chunk far into a document, relative to the first of `positions` (in tokens). Readers begin there: what
    lies before is context only, as it is for whoever has read so far."""
    _, chunk = settings.read.sizes(backbone.model)
    rounds = settings.warmup + settings.rounds
    ids = random_ids(backbone, max(positions) + (rounds + 1) * chunk, settings.seed)
    read = replace(_read(backbone, settings), reuse=reuse, chunk=chunk)
    bank = new_bank(backbone, settings, ids)
    work: dict[str, Callable[[], object]] = {}
    for position in positions:
        reader = Reader(backbone.model, bank.clone(), [ids], read, start_id=backbone.start_id, first_token=position)
        work[f"{position}"] = reader.next_chunk
    return side_by_side(work, settings, device_of(backbone.model), on_round)


def over_documents(
    backbone: Backbone, settings: BenchSettings, counts: Sequence[int], on_round: OnRound = lambda: None
) -> dict[str, Timing]:
    """Time of a chunk of n documents read side by side, relative to one document's; the throughput is n / ratio."""
    ids, read = some_text(backbone, settings), _read(backbone, settings)
    one = new_bank(backbone, settings, ids)
    work: dict[str, Callable[[], object]] = {}
    for n in (1, *(n for n in counts if n != 1)):
        bank = Bank.stack([one] * n)
        work[f"{n}"] = Reader(backbone.model, bank, [ids] * n, read, start_id=backbone.start_id).next_chunk
    return side_by_side(work, settings, device_of(backbone.model), on_round)


def over_ranks(
    backbone: Backbone, settings: BenchSettings, ranks: Sequence[int], on_round: OnRound = lambda: None
) -> dict[str, Timing]:
    """Time of reading and learning with memories of several ranks, relative to truncated reading."""
    ids = some_text(backbone, settings)
    work = {REFERENCE: methods_of(backbone, settings, ids)[REFERENCE]()}
    for rank in ranks:
        work[f"{rank}"] = methods_of(backbone, replace(settings, rank=rank), ids)["locas_exact"]()
    return side_by_side(work, settings, device_of(backbone.model), on_round)


def over_windows(
    backbone: Backbone, settings: BenchSettings, windows: Sequence[int], on_round: OnRound = lambda: None
) -> dict[str, Timing]:
    """Time of reading and learning, relative to truncated reading of the same window, for windows of several lengths;
    a chunk has the same share of each."""
    window, chunk = settings.read.sizes(backbone.model)
    found: dict[str, Timing] = {}
    for tokens in windows:
        own = replace(settings, window=tokens, chunk=max(1, tokens * chunk // window))
        makers = methods_of(backbone, own, some_text(backbone, own))
        work = {name: makers[name]() for name in (REFERENCE, "locas_exact")}
        found[f"{tokens}"] = side_by_side(work, own, device_of(backbone.model), on_round)["locas_exact"]
    return found


def _read(backbone: Backbone, settings: BenchSettings) -> ReadSettings:
    return replace(settings.read, start_in_every_window=backbone.start_in_every_window)


__all__ = ["GROWTH", "over_documents", "over_lengths", "over_memories", "over_ranks", "over_windows"]
