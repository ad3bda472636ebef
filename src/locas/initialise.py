"""Where a memory begins: from the backbone's own weights and activations (arXiv:2602.05085 sec. 4).

Every strategy leaves the values V at zero, so that a fresh memory does not change the backbone's behaviour:

* `top-k`: keys and gates are clones of the FFN's own basis vectors that are most active on the text.
* `bottom-k`, `random-rows`: the same with the least active, or with random ones.
* `gaussian`: random directions.
* `activation`: the FFN's inputs at evenly spread tokens of the text.
* `step-wise` (Locas-MLP): empty slots. A reader fills them at its writes with pairs of activation and gradient,
  one slot for a token (`stepwise_rows`); an empty slot (zero key) adds nothing.

All keys and gates are unit vectors. Where a chunk's activations choose the basis, use the text's first chunk only:
the choice then depends on no token that is scored later with the memory in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from locas.attach import first_input
from locas.bank import Bank, Variant
from locas.forward import IGNORED, call, chunk_logits, decoder, device_of, frozen, token_nll, trained_context
from locas.sites import Site, find_sites

Strategy = Literal["top-k", "bottom-k", "random-rows", "gaussian", "activation", "step-wise"]
TAU_PER_SLOT = 4.0  # chosen on the development books, see LOG.md
CLONING = ("top-k", "bottom-k", "random-rows")


@dataclass(frozen=True)
class InitSettings:
    """How a memory is made.

    Attributes:
        rank: slots for each layer.
        variant: "auto": gated (glu) beside a gated FFN, else mlp.
        init: strategy; "auto": top-k; "paper": top-k for glu, step-wise for mlp (arXiv:2602.05085 sec. 4).
        tau_scale: the output scale is tau = tau_scale / rank * mean_j ||v_j||; the paper's is 1. None:
            proportional to the rank, so that a slot adds as much whatever the rank.
        activation: "auto": the backbone FFN's own, so that merging is exact; or a name, e.g. "relu".
        seed: of the random strategies.
    """

    rank: int = 64
    variant: Literal["auto"] | Variant = "auto"
    init: Literal["auto", "paper"] | Strategy = "auto"
    tau_scale: float | None = None
    activation: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"the rank must be 1 or more; got {self.rank}")
        if self.variant not in ("auto", *get_args(Variant)):
            raise ValueError(f"variant {self.variant!r} is not one of auto, {', '.join(get_args(Variant))}")
        if self.init not in ("auto", "paper", *get_args(Strategy)):
            raise ValueError(f"initialisation {self.init!r} is not one of auto, paper, {', '.join(get_args(Strategy))}")
        if self.tau_scale is not None and not (self.tau_scale > 0 and math.isfinite(self.tau_scale)):
            raise ValueError(f"tau_scale must be a positive number; got {self.tau_scale}")
        if self.variant == "glu" and self.init == "step-wise":
            raise ValueError(
                "step-wise initialisation writes a key and a value for a token, which the product with a gate makes "
                "impossible for Locas-GLU; use top-k, or variant mlp"
            )


def create_bank(
    model: nn.Module,
    ids: Tensor,
    settings: InitSettings,
    *,
    layers: Mapping[int, int] | list[int] | None = None,
    start_id: int | None = None,
    window_tokens: int | None = None,
) -> Bank:
    """A bank of one fresh memory for `model`.

    Args:
        model: a causal language model of a supported family.
        ids: [n] token ids of the text (its first chunk) whose activations choose the basis.
        settings: rank, variant, strategy, tau.
        layers: layer indices, or a rank for each; None: every layer at `settings.rank`.
        start_id: put before every window, and not counted among the text's activations.
        window_tokens: the text is run through the model in windows of this size; None: the trained context.

    Returns:
        A bank whose reads are exactly zero. float32, or float64 for a float64 model.

    Raises:
        ValueError: no such layer, rank larger than what the strategy can draw from, no tokens, or a strategy that
            does not fit the backbone.
    """
    ranks = dict(layers) if isinstance(layers, Mapping) else None
    sites = find_sites(model, ranks if ranks is not None else layers)
    ranks = ranks or dict.fromkeys(sites, settings.rank)
    site = next(iter(sites.values()))
    settings = without_auto(settings, site)
    variant, strategy = variant_of(settings, site), settings.init
    dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    bank = Bank(variant, settings.activation, site.d_model, ranks, dtype=dtype, device=device_of(model))
    _set_tau(bank, sites, settings.tau_scale)
    if strategy == "step-wise":
        return bank
    _check_source(strategy, ranks, sites, ids)
    text = None
    if strategy in ("top-k", "bottom-k", "activation"):
        text = _Text(model, ids, start_id, window_tokens)
    if strategy == "activation":
        assert text is not None
        keys = activations_at(text, sites, _spread_positions(ids.numel(), ranks))
        directions = {layer: (key, key) for layer, key in keys.items()}
    elif strategy == "gaussian":
        directions = {layer: _gaussian(bank, layer, settings.seed) for layer in ranks}
    else:
        chosen = _choose(strategy, sites, ranks, importance(text, sites) if text else None, settings.seed)
        directions = {layer: _clone(sites[layer], chosen[layer], variant) for layer in ranks}
    for layer, (gates, keys_) in directions.items():
        slots = bank.slots(layer)
        slots.k[0].copy_(_unit(keys_.to(slots.k)))
        if slots.g is not None:
            slots.g[0].copy_(_unit(gates.to(slots.k)))
    return bank


def variant_of(settings: InitSettings, site: Site) -> Variant:
    """The variant that a memory beside this site gets."""
    if settings.variant != "auto":
        return settings.variant
    return "glu" if site.gated else "mlp"


def without_auto(settings: InitSettings, site: Site) -> InitSettings:
    """The same with variant, strategy and activation named, as they are beside this site; None stays.

    Raises:
        ValueError: a strategy that does not fit the variant or the site.
    """
    variant = variant_of(settings, site)
    strategy: Strategy
    if settings.init == "paper":
        strategy = "top-k" if variant == "glu" else "step-wise"
    else:
        strategy = "top-k" if settings.init == "auto" else settings.init
    if strategy == "step-wise" and variant == "glu":
        raise ValueError("step-wise initialisation is for Locas-MLP; this memory is gated (variant glu): use top-k")
    if strategy in CLONING and variant == "glu" and not site.gated:
        raise ValueError(
            f"{strategy} clones gates, and this backbone's FFN has none; use variant mlp, or gaussian or activation"
        )
    activation = site.activation if settings.activation == "auto" else settings.activation
    return replace(settings, variant=variant, init=strategy, activation=activation)


def _check_source(strategy: str, ranks: Mapping[int, int], sites: dict[int, Site], ids: Tensor) -> None:
    if strategy in ("top-k", "bottom-k", "activation") and ids.numel() == 0:
        raise ValueError(f"{strategy} initialisation looks at the text's activations, and the text has no tokens")
    for layer, rank in ranks.items():
        if strategy in CLONING and rank > sites[layer].d_ff:
            raise ValueError(
                f"{strategy} clones {rank} of the FFN's basis vectors, but layer {layer} has only "
                f"{sites[layer].d_ff}; use a smaller rank, or gaussian"
            )
        if strategy == "activation" and rank > ids.numel():
            raise ValueError(
                f"activation initialisation takes one token a slot: rank {rank} needs as many tokens, and the text "
                f"has {ids.numel()}; use a smaller rank or more text"
            )


@torch.no_grad()
def _set_tau(bank: Bank, sites: dict[int, Site], scale: float | None) -> None:
    """tau = (scale / r) mean_j ||W_down[:, j]|| (arXiv:2602.05085 sec. 4 has scale 1; see `InitSettings`)."""
    for i, (layer, rank) in enumerate(bank.ranks.items()):
        norms = sites[layer].down_rows().to(torch.float32 if bank.rows.dtype != torch.float64 else torch.float64)
        bank.tau[:, i] = norms.norm(dim=-1).mean().to(bank.device) * (TAU_PER_SLOT if scale is None else scale / rank)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def _generator(seed: int, layer: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)


def _gaussian(bank: Bank, layer: int, seed: int) -> tuple[Tensor, Tensor]:
    both = torch.randn(2, bank.ranks[layer], bank.d_model, generator=_generator(seed, layer), dtype=torch.float64)
    return both[0], both[1]


def _choose(
    strategy: str,
    sites: dict[int, Site],
    ranks: Mapping[int, int],
    scores: dict[int, Tensor] | None,
    seed: int,
) -> dict[int, Tensor]:
    """The indices [rank] of the basis vectors to clone, for each layer."""
    if scores is None:
        return {
            layer: torch.randperm(sites[layer].d_ff, generator=_generator(seed, layer))[:rank]
            for layer, rank in ranks.items()
        }
    return {layer: scores[layer].topk(rank, largest=strategy == "top-k").indices for layer, rank in ranks.items()}


def _clone(site: Site, chosen: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    """(gate rows, up rows) of the chosen basis vectors, [rank, d_model] each."""
    up = site.up_rows()
    keys = up[chosen.to(up.device)]
    return (site.gate_rows()[chosen.to(up.device)] if variant == "glu" else keys), keys


# -------------------------------------------------------------------- looking at the text


@dataclass(frozen=True)
class _Text:
    """A text that is run through the model window by window, each with the start token before it."""

    model: nn.Module
    ids: Tensor
    start_id: int | None
    window_tokens: int | None

    @torch.no_grad()
    def run(self, hook: Any) -> None:
        """Calls `hook()` around each window's pass over the text itself: the start token's own activations, which
        in many models are huge and say nothing of the text, are computed before and not seen."""
        size = self.window_tokens or trained_context(self.model) or 2048
        size = max(1, size - (self.start_id is not None))
        ids, body = self.ids.to(device_of(self.model)), decoder(self.model)  # nobody asks for logits
        with frozen(self.model):
            for first in range(0, ids.numel(), size):
                window, past = ids[first : first + size][None], None
                if self.start_id is not None:
                    start = window.new_full((1, 1), self.start_id)
                    past = call(body, start, use_cache=True).past_key_values
                with hook(first):
                    if past is None:
                        call(body, window)
                    else:
                        call(body, window, past_key_values=past, use_cache=True)


class _Handles:
    """Hooks for the length of a `with` block."""

    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def importance(text: _Text, sites: dict[int, Site]) -> dict[int, Tensor]:
    """a_j = mean over the tokens of |M_t,j|, M the FFN's own intermediate (arXiv:2602.05085 sec. 4), [d_ff]
    float32 for each layer; memory use does not grow with the text."""
    sums: dict[int, Tensor] = {}
    counts = dict.fromkeys(sites, 0)

    def watch(_first: int) -> _Handles:
        handles: list[Any] = []
        for layer, site in sites.items():

            def add(total: Tensor, tokens: int, layer: int = layer) -> None:
                sums[layer] = sums[layer] + total if layer in sums else total
                counts[layer] += tokens

            handles += site.observe_intermediate(add)
        return _Handles(handles)

    text.run(watch)
    return {layer: sums[layer] / counts[layer] for layer in sites}


def _spread_positions(n_tokens: int, ranks: Mapping[int, int]) -> dict[int, Tensor]:
    """`rank` token positions spread evenly over the text, for each layer."""
    return {layer: torch.arange(rank) * n_tokens // rank for layer, rank in ranks.items()}


def activations_at(text: _Text, sites: dict[int, Site], positions: dict[int, Tensor]) -> dict[int, Tensor]:
    """The FFN's inputs at some token positions of the text: [rank, d_model] for each layer."""
    found: dict[int, Tensor] = {}

    def watch(first: int) -> _Handles:
        def keep(layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                a = first_input(args, kwargs).reshape(-1, sites[layer].d_model)
                where = positions[layer].to(a.device) - first
                here = (where >= 0) & (where < a.shape[0])
                if layer not in found:
                    found[layer] = a.new_zeros(where.shape[0], a.shape[1])
                found[layer][here] = a[where[here]]

            return hook

        return _Handles(
            [s.entry.register_forward_pre_hook(keep(layer), with_kwargs=True) for layer, s in sites.items()]
        )

    text.run(watch)
    return found


# -------------------------------------------------------------------- step-wise optimal slots


def stepwise_rows(
    model: nn.Module, sites: dict[int, Site], inputs: Tensor, prefix_tokens: int, targets: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Keys and value directions that raise the likelihood of each target (arXiv:2602.05085 sec. 4).

    For the position that predicts token x_t: k = A / ||A||, v = G / ||G||, where G = d log p(x_t | x_<t) / d H,
    H being the FFN block's output, and ||G|| is taken over hidden size and layers together. One backward pass.
    For several targets at once it is the gradient of the sum of their log-likelihoods, so that a slot also gets
    the credit for what later tokens of the chunk draw from its position; for one target it is the paper's formula.

    Args:
        model: frozen, in evaluation mode, with the memory attached where there is one.
        sites: the layers of interest.
        inputs: [batch, seq] token ids.
        prefix_tokens: positions that are context only.
        targets: [batch, seq - prefix_tokens], `IGNORED` where nothing is predicted.

    Returns:
        Keys and value directions, each {layer: [batch, seq - prefix_tokens, d_model]}.
    """
    entries: dict[int, Tensor] = {}
    nudges: dict[int, Tensor] = {}
    shape = targets.shape

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entries[layer] = first_input(args, kwargs).detach().reshape(shape[0], -1, sites[layer].d_model)

        return hook

    def nudge(layer: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            main, *rest = output if isinstance(output, tuple) else (output,)
            nudges[layer] = torch.zeros_like(main, requires_grad=True)
            main = main + nudges[layer]
            return (main, *rest) if isinstance(output, tuple) else main

        return hook

    hooks: list[Any] = []
    for layer, site in sites.items():
        hooks.append(site.entry.register_forward_pre_hook(keep(layer), with_kwargs=True))
        hooks.append(site.exit.register_forward_hook(nudge(layer)))
    with _Handles(hooks), torch.enable_grad():
        # Hooks also see the prefix's pass, which comes first; what the chunk's pass leaves behind is what stays.
        loss = token_nll(chunk_logits(model, inputs, prefix_tokens), targets).sum()
        gradients = torch.autograd.grad(loss, [nudges[layer] for layer in sites])
    values = {
        layer: -grad.reshape(shape[0], -1, sites[layer].d_model) for layer, grad in zip(sites, gradients, strict=True)
    }
    total = sum(v.to(targets.device, torch.float32 if v.dtype != torch.float64 else v.dtype).square().sum(-1)
                for v in values.values())  # fmt: skip
    norm = torch.as_tensor(total).sqrt().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    keys = {layer: _unit(a.float() if a.dtype != torch.float64 else a) for layer, a in entries.items()}
    return keys, {layer: v / norm.to(v.device) for layer, v in values.items()}


def empty_slots(bank: Bank, *, least: bool = False) -> Tensor:
    """[bank] how many slots of each memory are still empty (zero key, not frozen), in the layer that has most room of
    them, or least."""
    counts = torch.stack([_empty(bank, layer).sum(dim=-1) for layer in bank.layers])
    return counts.amin(dim=0) if least else counts.amax(dim=0)


def _empty(bank: Bank, layer: int) -> Tensor:
    """[bank, rank] bool: slots that may be filled."""
    zero = (bank.slots(layer).k == 0).all(dim=-1)
    frozen = torch.arange(bank.ranks[layer]) < bank.frozen[:, bank.layers.index(layer), None]
    return zero & ~frozen.to(zero.device)


@torch.no_grad()
def fill_slots(
    bank: Bank, row: int, keys: dict[int, Tensor], values: dict[int, Tensor], nll: Tensor, targets: Tensor
) -> int:
    """Writes one slot a token into the empty slots of memory `row`: the worst predicted tokens first.

    Args:
        bank: Locas-MLP memories.
        row: which memory.
        keys: {layer: [seq, d_model]} unit keys, from `stepwise_rows`.
        values: {layer: [seq, d_model]} values, already scaled by eps.
        nll: [seq] nats, how badly each token was predicted.
        targets: [seq], `IGNORED` where nothing was predicted.

    Returns:
        How many slots were filled in the layer that had most room.
    """
    usable = targets != IGNORED
    order = torch.where(usable, nll, -torch.inf).argsort(descending=True, stable=True)[: int(usable.sum())]
    most = 0
    for layer in bank.layers:
        slots = bank.slots(layer)
        free = _empty(bank, layer)[row].nonzero()[:, 0][: order.numel()]
        chosen = order[: free.numel()].to(slots.k.device)
        slots.k[row, free] = keys[layer].to(slots.k)[chosen]
        slots.v[row, free] = values[layer].to(slots.v)[chosen]
        most = max(most, free.numel())
    return most
