"""Growing and freezing: room for another book, without the last one being overwritten.

    memory = locas.grow.freeze(locas.load("a.safetensors", model))       # what it knows stays, to the last bit
    memory = locas.grow.grow(memory, model, ids[:256], rank=32)          # new slots, from the text that comes
    for record in locas.read(model, memory, ids):
        ...

New slots get zero values (step-wise ones of Locas-MLP are empty), so that the memory's function is the same at that
moment: a sum over slots with zeros appended. Sums over more slots may be rounded in another order, so logits are equal
to rounding (1e-12 in float64), not to the bit.

tau, of which a layer has one, stays: old slots must not change. By default it is a constant for each slot
(`initialise.TAU_PER_SLOT`), so that the grown memory has the scale that a fresh one of its rank would have. With the
paper's tau, which carries 1/rank, a fresh memory of the larger rank would have a smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from locas.bank import Bank
from locas.initialise import InitSettings, create_bank, without_auto
from locas.memory import Memory
from locas.sites import find_sites


def grow(
    memory: Memory,
    model: nn.Module,
    ids: Tensor | Sequence[int],
    rank: int,
    init: InitSettings | None = None,
    *,
    start_id: int | None = None,
) -> Memory:
    """A memory with `rank` more slots on each of its layers, which read the same as before; the old one stays.

    The new slots are initialised as a fresh memory's are, with the old memory attached: from the activations that they
    will see. Frozen slots stay frozen; new ones are not.

    Args:
        memory: what is grown.
        model: its backbone.
        ids: [n] token ids of what is read next (its first chunk).
        rank: how many slots are added.
        init: strategy and seed; its rank, variant, activation and tau have no say here. None: the default strategy.
        start_id: the model's beginning-of-text token, where it expects one.

    Raises:
        ValueError: rank below 1, another backbone, or a strategy that does not fit; the memory is unchanged.
    """
    if rank < 1:
        raise ValueError(f"a memory grows by 1 slot or more; got {rank}")
    memory.check(model)
    old = memory.bank
    init = init or InitSettings()
    # Another seed than the memory's own, so that random strategies do not draw the same slots again.
    seed = init.seed + max(old.ranks.values())
    settings = replace(init, rank=rank, variant=old.variant, activation=old.activation, seed=seed)
    with memory.attached(model):
        new = create_bank(
            model, torch.as_tensor(ids), settings, layers=dict.fromkeys(old.layers, rank), start_id=start_id
        )
    site = next(iter(find_sites(model, old.layers).values()))
    provenance = memory.provenance
    before = provenance.settings.get("grow", [])
    tokens = sum(document.tokens for document in provenance.documents)
    step = {"rank": rank, "after_tokens": tokens, "init": without_auto(settings, site).init, "seed": settings.seed}
    grown = replace(provenance, settings={**provenance.settings, "grow": [*before, step]})
    return Memory(_side_by_side(old, new), grown, model)


def freeze(memory: Memory) -> Memory:
    """A copy of the memory in which no slot that it has now is written any more; slots that it grows are.

    Its file says so too, and what is frozen stays so when the memory is composed or compressed.
    """
    bank = memory.bank.clone()
    bank.frozen[0] = torch.tensor(list(bank.ranks.values()))
    return Memory(bank, memory.provenance)


def thaw(memory: Memory) -> Memory:
    """A copy of the memory in which every slot is written again."""
    bank = memory.bank.clone()
    bank.frozen.zero_()
    return Memory(bank, memory.provenance)


def _side_by_side(old: Bank, new: Bank) -> Bank:
    """A bank with the slots of both on every layer, the old ones first, and the old one's tau."""
    ranks = {layer: rank + new.ranks[layer] for layer, rank in old.ranks.items()}
    bank = Bank(old.variant, old.activation, old.d_model, ranks, dtype=old.rows.dtype, device=old.device)
    bank.tau.copy_(old.tau)
    bank.frozen.copy_(old.frozen)
    for layer, rank in old.ranks.items():
        whole, first, second = bank.slots(layer), old.slots(layer), new.slots(layer)
        for both, one, other in (
            (whole.k, first.k, second.k),
            (whole.g, first.g, second.g),
            (whole.v, first.v, second.v),
        ):
            if both is not None and one is not None and other is not None:
                both[:, :rank].copy_(one)
                both[:, rank:].copy_(other)
    return bank
