"""Values fitted by least squares, which compressing and anchoring rest on.

A memory's function in a layer is linear in its values: F(A) = sum_j m_j(A) tau v_j, where the response m_j depends on
slot j's key (and gate) only. So the values with which given slots come nearest to a wanted function, on the
activations of a text, are the solution of a linear system of the rank's size, with no step size and no iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from locas.attach import attached, check_fit, first_input
from locas.bank import ACTIVATIONS, Bank
from locas.forward import call, device_of, frozen, in_windows


@dataclass(frozen=True)
class Part:
    """One layer's slots in float64. k, g, v: [rank, d_model]; tau is in v; g is None for Locas-MLP."""

    k: Tensor
    g: Tensor | None
    v: Tensor
    act: Callable[[Tensor], Tensor]

    def responses(self, a: Tensor) -> Tensor:
        """m_j(A), [n, rank], for activations [n, d_model]."""
        keys = a @ self.k.T
        return self.act(keys) if self.g is None else self.act(a @ self.g.T) * keys

    def take(self, chosen: Tensor) -> Part:
        """Some of the slots."""
        return replace(self, k=self.k[chosen], g=None if self.g is None else self.g[chosen], v=self.v[chosen])


def part_of(bank: Bank, layer: int) -> Part:
    """One layer's slots, in float64 on the CPU, with tau in the values."""
    slots, tau = bank.slots(layer), bank.tau[0, bank.layers.index(layer)].double().cpu()
    k, g, v = (None if rows is None else rows[0].detach().double().cpu() for rows in (slots.k, slots.g, slots.v))
    assert k is not None
    assert v is not None
    return Part(k, g, v * tau, ACTIVATIONS[bank.activation])


def put_part(bank: Bank, layer: int, part: Part, tau: float, *, by_doubling: bool = False) -> None:
    """Writes a layer's slots into a bank of one, and its tau: the one given, or one so much larger that no value is
    longer than 1 and clipping takes nothing away later. Got by doubling, it leaves the numbers of slots that were
    there before what they were, but for a power of two."""
    longest, tau = float(part.v.norm(dim=-1).max()), abs(tau)
    if by_doubling and tau:
        while tau * (1 + 1e-6) < longest:
            tau *= 2
    else:
        tau = max(tau, longest)
    bank.tau[0, bank.layers.index(layer)] = tau
    slots = bank.slots(layer)
    slots.k[0].copy_(part.k)
    slots.v[0].copy_(part.v / tau if tau else part.v)
    if slots.g is not None and part.g is not None:
        slots.g[0].copy_(part.g)


def normal_equations(responses: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """M^T M [rank, rank] and M^T F [rank, d_model]."""
    return responses.T @ responses, responses.T @ wanted


def solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """The values V [rank, d_model] that minimise ||M V - F||^2 + r ||V||^2.

    Args:
        gram: M^T M, [rank, rank] float64.
        right: M^T F, [rank, d_model] float64.
        ridge: r as a share of the mean of gram's diagonal.
    """
    return torch.linalg.solve(ridged(gram, ridge), right)


def ridged(gram: Tensor, ridge: float) -> Tensor:
    """The Gram matrix with a share of its diagonal's mean added on the diagonal, so that it has an inverse."""
    size = ridge * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    return gram + size * torch.eye(gram.shape[0], dtype=gram.dtype)


@torch.no_grad()
def look_at_activations(
    model: nn.Module, bank: Bank, ids: Tensor, look: Callable[[int, Tensor], None], *, start_id: int | None = None
) -> None:
    """Calls `look(layer, a)` with the FFNs' inputs a [n, d_model] at every token of a text, with the memory attached.

    In the model's dtype, on its device. The text is run in windows of the trained context, whose start tokens are left
    out.

    Args:
        model: the backbone.
        bank: what is attached.
        ids: [n] token ids.
        look: called for every window and layer.
        start_id: put before every window, where the model expects a start token.
    """
    sites = check_fit(model, bank)
    lead = int(start_id is not None)

    def hook_of(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            look(layer, first_input(args, kwargs).detach().reshape(-1, bank.d_model)[lead:])

        return hook

    ids = ids.to(device_of(model), torch.int64)
    with frozen(model), attached(model, bank):
        handles = [s.entry.register_forward_pre_hook(hook_of(layer), with_kwargs=True) for layer, s in sites.items()]
        try:
            for window in in_windows(model, ids, start_id):
                call(model, window[None])
        finally:
            for handle in handles:
                handle.remove()


def sample_activations(model: nn.Module, bank: Bank, ids: Tensor, *, start_id: int | None = None) -> dict[int, Tensor]:
    """All that `look_at_activations` shows: {layer: [n, d_model]} on the CPU, in the model's dtype."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in bank.layers}
    look_at_activations(model, bank, ids, lambda layer, a: found[layer].append(a.cpu()), start_id=start_id)
    return {layer: torch.cat(parts) if parts else torch.empty(0, bank.d_model) for layer, parts in found.items()}


def second_moments(model: nn.Module, bank: Bank, ids: Tensor, *, start_id: int | None = None) -> dict[int, Tensor]:
    """Mean over a text's tokens of m m^T, m the slots' responses: {layer: [rank, rank]} float64 on the CPU.

    Args: as `look_at_activations`'s.
    """
    parts = {layer: part_of(bank, layer) for layer in bank.layers}
    sums = {layer: torch.zeros(rank, rank, dtype=torch.float64) for layer, rank in bank.ranks.items()}

    def add(layer: int, a: Tensor) -> None:
        m = parts[layer].responses(a.double().cpu())
        sums[layer] += m.T @ m

    look_at_activations(model, bank, ids, add, start_id=start_id)
    return {layer: total / max(1, ids.numel()) for layer, total in sums.items()}
