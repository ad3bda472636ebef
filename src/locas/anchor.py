"""Anchoring: a memory that answers its text as before, and says little elsewhere.

    others = own_text(model, 16384, start_id=start_id)              # what the backbone writes by itself
    found = anchored(memory, model, ids, others, strength=1.0)
    print(found.difference, found.elsewhere)
    found.memory.save("anchored.safetensors")

Keys and gates stay. Each layer's values V become the V' with the least sum of two squared differences, from what the
memory adds on its text and from nothing elsewhere:

    E_text ||m(A)^T (V' - V)||^2 + strength * E_elsewhere ||m(A)^T V'||^2,    V' = (C + strength * C_e)^-1 C V,

m the slots' responses and C, C_e their second moments: values keep what their text has of its own, and lose what all
texts have. That is how edits of weights are held back by the covariance of keys in MEMIT (arXiv:2210.07229 sec. 4.2);
text that the model itself writes in the place of data is LLM-QAT's (arXiv:2305.17888 sec. 2.1). Not in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from locas.bank import Bank
from locas.fit import part_of, put_part, second_moments
from locas.forward import device_of, frozen
from locas.memory import Memory

SAMPLE_TOKENS = 16_384  # of each kind of text
_RIDGE = 1e-9  # of the mean response's square: a slot that answers nowhere keeps its value
_ROW_TOKENS, _MOST_ROWS = 256, 64  # of text that the backbone writes, side by side


@dataclass(frozen=True)
class Anchored:
    """What `anchored` returns.

    Attributes:
        memory: with other values.
        difference: ||F' - F|| / ||F|| of what it adds to the FFNs' outputs, over all layers, on its text.
        elsewhere: ||F'|| / ||F|| on the other text.
    """

    memory: Memory
    difference: float
    elsewhere: float


def anchored(
    memory: Memory,
    model: nn.Module,
    ids: Tensor | Sequence[int],
    others: Tensor | Sequence[int],
    strength: float = 1.0,
    *,
    start_id: int | None = None,
) -> Anchored:
    """The memory with values that say less on `others`; the old one stays, and so does what frozen slots add.

    Args:
        memory: what is anchored.
        model: its backbone.
        ids: [n] token ids of the text that the memory is for.
        others: [n] token ids of text that it should leave alone, such as `own_text`'s.
        strength: how much the change there counts beside the difference on the text.
        start_id: the model's beginning-of-text token, where it expects one.

    Raises:
        ValueError: another backbone, a strength that is no positive number, or a text of fewer than 4 tokens.
    """
    memory.check(model)
    bank, difference, elsewhere = anchored_bank(memory.bank, model, ids, others, strength, start_id=start_id)
    note = {
        "strength": strength, "text_tokens": len(ids), "other_tokens": len(others),
        "difference": difference, "elsewhere": elsewhere,
    }  # fmt: skip
    settings = memory.provenance.settings
    settings = {**settings, "anchor": [*settings.get("anchor", []), note]}
    return Anchored(Memory(bank, replace(memory.provenance, settings=settings)), difference, elsewhere)


def anchored_bank(
    bank: Bank,
    model: nn.Module,
    ids: Tensor | Sequence[int],
    others: Tensor | Sequence[int],
    strength: float,
    *,
    start_id: int | None = None,
) -> tuple[Bank, float, float]:
    """`anchored` for a bank of one memory: another bank, and what `Anchored` calls difference and elsewhere."""
    check_strength(strength)
    texts = [torch.as_tensor(text) for text in (ids, others)]
    if min(text.numel() for text in texts) < 4:
        raise ValueError(
            f"anchoring looks at two texts of 4 tokens or more, better thousands; got {[t.numel() for t in texts]}"
        )
    here, there = (second_moments(model, bank, text, start_id=start_id) for text in texts)
    bank, squares = bank.clone(), torch.zeros(4, dtype=torch.float64)
    for i, layer in enumerate(bank.layers):
        first, part = int(bank.frozen[0, i]), part_of(bank, layer)
        c, c_e = (moments[layer][first:, first:] for moments in (here, there))
        old = part.v[first:]
        new = _values(c, c_e, old, strength)
        put_part(
            bank, layer, replace(part, v=torch.cat([part.v[:first], new])), float(bank.tau[0, i]), by_doubling=first > 0
        )
        squares += torch.stack([_square(c, new - old), _square(c, old), _square(c_e, new), _square(c_e, old)])
    difference, elsewhere = (math.sqrt(float(a / b)) if b else 0.0 for a, b in squares.view(2, 2))
    return bank, difference, elsewhere


def check_strength(strength: float) -> None:
    """Raises ValueError unless it is a positive number."""
    if not (strength > 0 and math.isfinite(strength)):
        raise ValueError(f"the strength of anchoring must be a positive number; got {strength}")


def _values(c: Tensor, c_e: Tensor, v: Tensor, strength: float) -> Tensor:
    """V' of the module's text. c, c_e: [rank, rank] float64; v: [rank, d_model]."""
    both = c + strength * c_e
    ridge = _RIDGE * both.diagonal().mean().clamp(min=torch.finfo(both.dtype).tiny) * torch.eye(len(v), dtype=v.dtype)
    return torch.linalg.solve(both + ridge, (c + ridge) @ v)


def _square(moments: Tensor, values: Tensor) -> Tensor:
    """E ||m^T values||^2."""
    return (values * (moments @ values)).sum()


@torch.no_grad()
def own_text(
    model: nn.Module,
    tokens: int = SAMPLE_TOKENS,
    *,
    start_id: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Text that the backbone writes: [tokens] ids, in pieces drawn at temperature 1, each from the start token, or
    from a token drawn evenly where the model has none; the same for the same seed. Nothing may be attached.

    Args:
        model: a causal language model of transformers.
        tokens: how many.
        start_id: the model's beginning-of-text token.
        seed: of the draws; torch's global random state stays as it was.
        on_progress: called with how many tokens are written, and of how many.

    Raises:
        ValueError: tokens below 1.
    """
    if tokens < 1:
        raise ValueError(f"a text has 1 token or more; got {tokens}")
    device = device_of(model)
    pieces: list[Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), frozen(model):
        torch.manual_seed(seed)
        while (left := tokens - sum(p.numel() for p in pieces)) > 0:
            rows = min(_MOST_ROWS, -(-left // _ROW_TOKENS))
            first = torch.full((rows, 1), -1 if start_id is None else start_id)
            if start_id is None:
                first = torch.randint(_vocabulary(model), (rows, 1))
            done = tokens - left
            tick = None if on_progress is None else lambda n, done=done: on_progress(min(done + n, tokens), tokens)
            pieces.append(_written(model, first.to(device), tick)[:, :_ROW_TOKENS].flatten()[:left])
    return torch.cat(pieces).cpu()


def _written(model: Any, first: Tensor, on_token: Callable[[int], None] | None) -> Tensor:
    """[rows, _ROW_TOKENS] what the model goes on with, whatever its own settings for writing are; says after each token
    of the rows how many there are."""

    def watch(ids: Tensor, _: Any, **__: Any) -> Tensor:
        """A criterion for stopping that only looks on."""
        assert on_token is not None
        on_token(ids.numel())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    return model.generate(
        first, attention_mask=torch.ones_like(first), max_new_tokens=_ROW_TOKENS - 1, min_new_tokens=_ROW_TOKENS - 1,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, num_beams=1, use_cache=True,
        pad_token_id=int(first[0, 0]), stopping_criteria=None if on_token is None else [watch],
    )  # fmt: skip


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


__all__ = ["SAMPLE_TOKENS", "Anchored", "anchored", "anchored_bank", "check_strength", "own_text"]
