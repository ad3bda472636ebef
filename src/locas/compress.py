"""Compressing: a memory of fewer slots that computes nearly the same, with the difference measured on a real text.

    small = compress(memory, model, ids, rank=16)
    print(small.error, small.errors)       # relative, on activations that no choice was made on
    small.memory.save("small.safetensors")

A memory's function in a layer is a sum over slots of a response m_j(A) times a value: F(A) = sum_j m_j(A) tau v_j. The
text's activations A, seen with the memory attached, say which of it matters. Methods (`METHODS`), each layer by itself:

* `prune`: keeps the slots whose term is largest on the text, ||m_j|| ||v_j||.
* `refit`: the same slots, with values fitted anew to F by least squares.
* `eliminate`: drops one slot after another, each time the one whose loss costs least when all others' values are fitted
  anew (backward elimination; the cost of each is known in closed form, as in "optimal brain surgeon").
* `merge`: joins, again and again, the two slots whose responses are most alike, then fits the values.
* `distil`: starts from `eliminate`, then moves keys and gates too, by gradient on the difference.
* `nl-svd` (Locas-MLP): arXiv:2602.05085 app., see `nl_svd`; `nl-svd-refit`: with values fitted anew.

All in float64 whatever the memory's dtype. Frozen slots stay as they are, and frozen; the others are compressed. A
value that comes out longer than 1 raises the layer's tau instead, so that clipping takes nothing away later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from locas.bank import Bank
from locas.fit import Part, normal_equations, part_of, put_part, ridged, sample_activations, solve
from locas.memory import Memory

Method = Literal["eliminate", "distil", "refit", "merge", "prune", "nl-svd", "nl-svd-refit"]
METHODS: tuple[Method, ...] = get_args(Method)
FIT_SHARE = 0.75  # of the sampled activations; the error is measured on the rest
_RIDGE = 1e-9  # of the mean response's square: keeps the normal equations solvable, moves nothing that matters
_DISTIL_STEPS, _DISTIL_LR = 150, 5e-3


@dataclass(frozen=True)
class Compressed:
    """What `compress` returns.

    Attributes:
        memory: the smaller memory.
        errors: {layer: ||F' - F|| / ||F||} over activations that were not fitted to.
        error: the same over all layers together.
        tokens: how many activations of each layer were looked at, those of the error included.
    """

    memory: Memory
    errors: dict[int, float]
    error: float
    tokens: int


def compress(
    memory: Memory,
    model: nn.Module,
    ids: Tensor | Sequence[int],
    rank: int,
    *,
    method: Method = "eliminate",
    start_id: int | None = None,
    sample_tokens: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> Compressed:
    """A memory with at most `rank` slots on every layer that reads nearly as this one; the old one stays.

    Args:
        memory: what is compressed.
        model: its backbone.
        ids: [n] token ids of a text such as the memory is for; its activations decide.
        rank: slots for each layer afterwards; layers that have fewer stay as they are.
        method: see the module's text.
        start_id: the model's beginning-of-text token, where it expects one.
        sample_tokens: how many of the text's first tokens are looked at.
        on_progress: called with how many layers are done, and of how many.

    Raises:
        ValueError: a rank that compresses nothing, a method that does not fit the variant, or too short a text.
    """
    bank = memory.bank
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if not 1 <= rank < max(bank.ranks.values()):
        raise ValueError(f"this memory has {max(bank.ranks.values())} slots a layer; compress to 1 or more, and fewer")
    if method.startswith("nl-svd") and bank.variant != "mlp":
        raise ValueError("nl-svd is for Locas-MLP: the product with a gate has no one probe a slot; use eliminate")
    frozen = {layer: int(bank.frozen[0, i]) for i, layer in enumerate(bank.layers)}
    stay = max(n for layer, n in frozen.items() if bank.ranks[layer] > rank)
    if stay >= rank:
        raise ValueError(
            f"{stay} slots of a layer are frozen and stay as they are, so that {rank} slots leave no room for the "
            "others; compress to more, or thaw the memory first (locas.grow.thaw, locas compress --thaw)"
        )
    memory.check(model)
    samples = sample_activations(model, bank, torch.as_tensor(ids)[:sample_tokens], start_id=start_id)
    tokens = next(iter(samples.values())).shape[0]
    if tokens < 4:
        raise ValueError(f"the text gives {tokens} activations to look at; give at least 4 tokens, better thousands")
    parts, squares = {}, {}
    for done, layer in enumerate(bank.layers, start=1):
        a = samples.pop(layer).double()
        fit, test = a[: int(tokens * FIT_SHARE)], a[int(tokens * FIT_SHARE) :]
        old = part_of(bank, layer)
        new = _reduced(old, frozen[layer], fit, rank, method)
        parts[layer] = new
        truth = old.responses(test) @ old.v
        missed = new.responses(test) @ new.v - truth
        squares[layer] = float(missed.square().sum()), float(truth.square().sum())
        if on_progress is not None:
            on_progress(done, len(bank.layers))
    errors = {layer: _ratio(*pair) for layer, pair in squares.items()}
    error = _ratio(*(sum(pair[i] for pair in squares.values()) for i in (0, 1)))
    note = {"method": method, "rank": rank, "from": max(bank.ranks.values()), "error": error, "sample_tokens": tokens}
    return Compressed(_memory_of(memory, parts, note), errors, error, tokens)


def _reduced(old: Part, n_frozen: int, a: Tensor, rank: int, method: Method) -> Part:
    """A layer with at most `rank` slots, the frozen ones as they are."""
    if len(old.k) <= rank:
        return old
    if n_frozen == 0:
        return reduce(old, a, rank, method)
    first, others = (old.take(torch.arange(*span)) for span in ((n_frozen,), (n_frozen, len(old.k))))
    few = reduce(others, a, rank - n_frozen, method)
    both = [
        None if x is None or y is None else torch.cat([x, y])
        for x, y in zip(*((p.k, p.g, p.v) for p in (first, few)), strict=True)
    ]
    return replace(few, k=both[0], g=both[1], v=both[2])  # type: ignore[arg-type]


def _ratio(missed: float, truth: float) -> float:
    """Root of a ratio of sums of squares; 0 where there is nothing to miss."""
    return (missed / truth) ** 0.5 if truth else 0.0


def _memory_of(old: Memory, parts: dict[int, Part], note: dict[str, Any]) -> Memory:
    bank = Bank(
        old.bank.variant,
        old.bank.activation,
        old.bank.d_model,
        {layer: part.k.shape[0] for layer, part in parts.items()},
        dtype=old.bank.rows.dtype,
        device=old.bank.device,
    )
    bank.frozen.copy_(old.bank.frozen)
    for i, (layer, part) in enumerate(parts.items()):
        put_part(bank, layer, part, float(old.bank.tau[0, i]), by_doubling=bool(bank.frozen[0, i]))
    settings = old.provenance.settings
    settings = {**settings, "compress": [*settings.get("compress", []), note]}
    return Memory(bank, replace(old.provenance, settings=settings))


# -------------------------------------------------------------------- one layer


def reduce(part: Part, a: Tensor, rank: int, method: Method) -> Part:
    """A layer's slots, at most `rank` of them, by a method, fitted to activations `a` [n, d_model] float64."""
    if method in ("nl-svd", "nl-svd-refit"):
        k, v = nl_svd(part.k, part.v, part.act, rank)
        new = replace(part, k=k, v=v)
        return new if method == "nl-svd" else _refit(new, part, a)
    if method in ("prune", "refit"):
        terms = part.responses(a).norm(dim=0) * part.v.norm(dim=-1)
        kept = part.take(terms.topk(rank).indices.sort().values)
        return kept if method == "prune" else _refit(kept, part, a)
    if method == "merge":
        return _refit(_merge(part, a, rank), part, a)
    kept = part.take(eliminate(part.responses(a), part.v, rank))
    kept = _refit(kept, part, a)
    return kept if method == "eliminate" else _distil(kept, part, a)


def _refit(new: Part, old: Part, a: Tensor) -> Part:
    """The values with which `new`'s slots come nearest to `old`'s function on `a`."""
    equations = normal_equations(new.responses(a), old.responses(a) @ old.v)
    return replace(new, v=solve(*equations, _RIDGE))


def eliminate(responses: Tensor, values: Tensor, rank: int) -> Tensor:
    """Which `rank` slots to keep, ascending: dropped is, one at a time, the slot whose loss costs least.

    With all other values fitted anew, dropping slot j from least squares with Gram matrix G and solution W costs
    ||w_j||^2 / (G^-1)_jj; then W -= (G^-1)_:j w_j / (G^-1)_jj, and G^-1 loses row and column j likewise.

    Args:
        responses: [n, r] float64.
        values: [r, d_model] float64.
        rank: how many are kept.
    """
    inverse, w = torch.linalg.inv(ridged(responses.T @ responses, _RIDGE)), values.clone()
    left = torch.arange(values.shape[0])
    while left.numel() > rank:
        diagonal = inverse.diagonal()
        j = int((w.square().sum(dim=-1) / diagonal).argmin())
        column = inverse[:, j] / diagonal[j]
        w = w - column[:, None] * w[j]
        inverse = inverse - column[:, None] * inverse[j]
        rest = torch.arange(left.numel()) != j
        left, w, inverse = left[rest], w[rest], inverse[rest][:, rest]
    return left


def _merge(part: Part, a: Tensor, rank: int) -> Part:
    """Joins pairs of slots whose responses are most alike (up to sign, which a value can carry), weighted by their
    terms, until `rank` are left. Values are to be fitted afterwards."""
    m = part.responses(a)
    weights = m.norm(dim=0) * part.v.norm(dim=-1)
    while m.shape[1] > rank:
        unit = m / m.norm(dim=0).clamp(min=torch.finfo(m.dtype).tiny)
        alike = (unit.T @ unit).triu(1)
        i, j = divmod(int(alike.abs().argmax()), m.shape[1])
        # Only a gated slot's response changes its sign with its key.
        sign = -1.0 if part.g is not None and alike[i, j] < 0 else 1.0
        share = float(weights[j] / (weights[i] + weights[j]).clamp(min=torch.finfo(m.dtype).tiny))
        k = part.k.clone()
        k[i] = (1 - share) * k[i] + share * sign * k[j]
        g = None if part.g is None else part.g.clone()
        if g is not None:
            g[i] = (1 - share) * g[i] + share * g[j]
        weights[i] += weights[j]
        rest = torch.arange(m.shape[1]) != j
        part, weights = replace(part, k=k, g=g).take(rest), weights[rest]
        m = m[:, rest]
        at = i - (j < i)
        m[:, at] = part.take(torch.tensor([at])).responses(a)[:, 0]
    return part


def _distil(start: Part, old: Part, a: Tensor) -> Part:
    """Adam (in float32) on keys, gates and values, by the squared difference on `a`, then values fitted; the start
    where that was no better."""
    truth = old.responses(a) @ old.v
    tiny = torch.finfo(torch.float32).tiny
    size = start.v.norm(dim=-1).mean().clamp(min=tiny)
    inputs, goal = a.float(), (truth / truth.square().mean().sqrt().clamp(min=tiny)).float()
    scale = float(size / truth.square().mean().sqrt().clamp(min=tiny))
    rows = [start.k, start.v / size, *([] if start.g is None else [start.g])]
    leaves = [x.float().clone().requires_grad_() for x in rows]
    optimiser = torch.optim.Adam(leaves, lr=_DISTIL_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _DISTIL_STEPS)
    with torch.enable_grad():
        for _ in range(_DISTIL_STEPS):
            optimiser.zero_grad()
            now = replace(start, k=leaves[0], v=leaves[1], g=leaves[2] if start.g is not None else None)
            (now.responses(inputs) @ now.v * scale - goal).square().mean().backward()
            optimiser.step()
            schedule.step()
    moved = [x.detach().double() for x in leaves]
    k, *g = (x / x.norm(dim=-1, keepdim=True).clamp(min=1.0) for x in (moved[0], *moved[2:]))
    end = _refit(replace(start, k=k, g=g[0] if g else None), old, a)
    return min(start, end, key=lambda part: float((part.responses(a) @ part.v - truth).square().sum()))


# -------------------------------------------------------------------- NL-SVD


def nl_svd(
    keys: Tensor, values: Tensor, act: Callable[[Tensor], Tensor], rank: int, *, threshold: float = 1e-9
) -> tuple[Tensor, Tensor]:
    """Fewer slots for Locas-MLP, exact at its new keys, the probes (arXiv:2602.05085 app.).

    With s_i = ||k_i|| ||v_i||, the rows s_i k_i / ||k_i|| = ||v_i|| k_i span what the memory reacts to; the probes p_j
    are their leading right singular vectors, orthonormal, and v'_j = f(p_j) / act(1), f being the old memory. At p_j
    all other new slots give act(0) = 0, so that f'(p_j) = f(p_j).

    Where we differ: act(1), which is 1 for the paper's ReLU, makes it hold for other activations; the singular vectors
    come from an SVD instead of the Gram matrix's eigenvectors (the same vectors, orthonormal also where singular values
    are small); the threshold is relative. A singular vector's sign is arbitrary, and p and -p are different slots: we
    take the sign at which the old memory's answer f is longer, p with the positive sum of s_i <p, k_i> where both are
    equally long. So the answer does not depend on the sign that the decomposition happens to return.

    Args:
        keys: [r, d_model]; values: [r, d_model]; computed in float64 whatever they are.
        values: see there.
        act: the activation; act(0) must be 0 and act(1) not.
        rank: how many slots at most.
        threshold: probes whose singular value is below this share of the largest are dropped.

    Returns:
        Keys and values, [n, d_model] float64 each, n <= min(rank, r, d_model), at least 1.
    """
    k, v = keys.double(), values.double()
    weighted = v.norm(dim=-1, keepdim=True) * k
    _, singular, right = torch.linalg.svd(weighted, full_matrices=False)
    keep = singular[:rank] > threshold * singular[0].clamp(min=torch.finfo(v.dtype).tiny)
    probes = right[:rank][keep] if bool(keep.any()) else right[:1]

    def answer(p: Tensor) -> Tensor:
        return act(p @ k.T) @ v

    there, back = answer(probes).norm(dim=-1), answer(-probes).norm(dim=-1)
    side = (probes @ weighted.T).sum(dim=-1)
    equal = (there - back).abs() <= 1e-9 * torch.maximum(there, back)
    flip = torch.where(equal, side < 0, back > there)
    probes = torch.where(flip[:, None], -probes, probes)
    one = act(torch.ones((), dtype=torch.float64))
    return probes, answer(probes) / one
