"""What the unit tests share: seeded text, memories with something in them, and the slow obvious read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import BloomGelu

from families import GATED, MOE, VOCAB
from locas.bank import ACTIVATIONS, Bank
from locas.initialise import InitSettings, create_bank
from locas.sites import find_sites

START = 1
STANDS_FOR: dict[str, nn.Module] = {
    name: BloomGelu() if name == "gelu_bloom" else ACT2FN[name] for name in ACTIVATIONS
}  # each activation of ours, and the module of transformers that it copies


def text(n_tokens: int, seed: int = 0) -> Tensor:
    """[n_tokens] random token ids, above the special ones."""
    return torch.randint(3, VOCAB, (n_tokens,), generator=torch.Generator().manual_seed(seed))


def fill(bank: Bank, seed: int = 0) -> Bank:
    """Random rows of about unit length and a different tau for every memory and layer, in place."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(bank.rows.shape, generator=generator, dtype=torch.float64)
    bank.rows.copy_(noise / bank.d_model**0.5)
    bank.tau.copy_(torch.rand(bank.tau.shape, generator=generator, dtype=torch.float64) + 0.5)
    return bank


def memory_for(model: nn.Module, size: int = 1, layers: Mapping[int, int] | None = None, seed: int = 0) -> Bank:
    """A filled float64 bank in the backbone's own variant, over all layers unless told."""
    sites = find_sites(model)
    site = sites[0]
    ranks = layers or dict.fromkeys(sites, 3)
    variant = "glu" if site.gated else "mlp"
    return fill(Bank(variant, site.activation, site.d_model, ranks, size=size, dtype=torch.float64), seed)


def fresh(model: nn.Module, name: str, size: int = 1, **more: Any) -> Bank:
    """A memory as the paper makes it for its family (top-k or step-wise), `size` times, with a tau that is felt."""
    settings = InitSettings(rank=5, init="paper", tau_scale=8.0 if name in GATED + MOE else 1.0)
    one = create_bank(model, text(17, seed=99), settings, start_id=START, **more)
    return Bank.stack([one] * size)


def slow_read(bank: Bank, layer: int, a: Tensor, which: list[int]) -> Tensor:
    """tau * sum_j v_j m_j, one row, position and slot at a time, from the module of transformers."""
    act = STANDS_FOR[bank.activation]
    slots, tau = bank.slots(layer), bank.tau[:, bank.layers.index(layer)]
    rows = []
    for row, memory in zip(a, which, strict=True):
        for x in row:
            out = 0 * x  # keeps the graph where nothing is read
            for j in range(bank.ranks[layer] if memory >= 0 else 0):
                key = torch.dot(slots.k[memory, j], x)
                m = act(key) if slots.g is None else act(torch.dot(slots.g[memory, j], x)) * key
                out = out + tau[memory] * m * slots.v[memory, j]
            rows.append(out)
    return torch.stack(rows).view(a.shape)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit: NaN equals NaN, and 0.0 is not -0.0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = one.detach().contiguous(), other.detach().contiguous()
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits for [batch, seq] token ids, without gradients."""
    with torch.no_grad():
        return model(ids).logits
