"""Step-wise optimal slots: against autograd and finite differences, and how empty slots are filled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers import same_bytes, text
from locas.attach import attached
from locas.bank import ACTIVATIONS, Bank
from locas.forward import IGNORED, call, chunk_logits, decoder, frozen, token_nll
from locas.initialise import empty_slots, fill_slots, stepwise_rows
from locas.sites import find_sites

ModelOf = Callable[..., PreTrainedModel]

# Families that compute in float64 throughout (RMS norms, and BLOOM's softmax, are float32 whatever the dtype).
STEPWISE = ["gpt2", "opt", "opt_post_norm", "gpt_neox", "falcon"]
CONTEXT = 13


def log_likelihood(model: nn.Module, bank: Bank | None, ids: Tensor, everywhere: bool = False) -> float:
    """log p(last token | the others). The memory sees the last position of the context, or all of it."""
    inputs, target = ids[None, :-1], ids[None, -1:]
    with torch.no_grad():
        if everywhere and bank is not None:
            with attached(model, bank):
                logits = model(inputs, use_cache=False).logits[:, -1:]
        else:
            past = call(decoder(model), inputs[:, :-1], use_cache=True).past_key_values
            if bank is None:
                logits = call(model, inputs[:, -1:], past_key_values=past, use_cache=True).logits
            else:
                with attached(model, bank):
                    logits = call(model, inputs[:, -1:], past_key_values=past, use_cache=True).logits
    return -float(token_nll(logits, target))


def activations_and_gradients(model: nn.Module, ids: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """A and G = d log p(last token) / d H at the position before it, by autograd over one full pass."""
    sites = find_sites(model)
    a: dict[int, Tensor] = {}
    h: dict[int, Tensor] = {}
    handles: list[Any] = []
    for layer, site in sites.items():

        def keep(_m: Any, args: Any, layer: int = layer) -> None:
            a[layer] = args[0].detach().reshape(-1, sites[layer].d_model)[-1]

        def watch(_m: Any, _args: Any, output: Tensor, layer: int = layer) -> Tensor:
            h[layer] = output
            return output.clone()  # Falcon and others go on in place

        handles += [site.entry.register_forward_pre_hook(keep), site.exit.register_forward_hook(watch)]
    logits = model(ids[None, :-1], use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(logits.log_softmax(-1)[ids[-1]], list(h.values()))
    return a, {layer: g.reshape(-1, sites[layer].d_model)[-1] for layer, g in zip(h, grads, strict=True)}


@pytest.mark.parametrize("name", STEPWISE)
@pytest.mark.parametrize("prefix", [0, 5, CONTEXT - 1])
def test_stepwise_pair_is_activation_and_gradient(model_of: ModelOf, name: str, prefix: int) -> None:
    model, ids = model_of(name), text(CONTEXT + 1, seed=4)
    a, g = activations_and_gradients(model, ids)
    targets = torch.full((1, CONTEXT - prefix), IGNORED)
    targets[0, -1] = ids[-1]
    with frozen(model):
        keys, values = stepwise_rows(model, find_sites(model), ids[None, :-1], prefix, targets)
    total = torch.stack(list(g.values())).norm()
    for layer in g:
        assert keys[layer].shape == values[layer].shape == (1, CONTEXT - prefix, len(a[layer]))
        torch.testing.assert_close(keys[layer][0, -1], a[layer] / a[layer].norm(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(values[layer][0, -1], g[layer] / total, rtol=1e-10, atol=1e-12)
    assert float(torch.stack([v[0, -1] for v in values.values()]).norm()) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("name", STEPWISE)
def test_stepwise_slot_raises_the_likelihood_as_predicted(model_of: ModelOf, name: str) -> None:
    model, ids = model_of(name), text(CONTEXT + 1, seed=4)
    site = find_sites(model)[0]
    a, g = activations_and_gradients(model, ids)
    total = torch.stack(list(g.values())).norm()
    bank = Bank("mlp", site.activation, site.d_model, dict.fromkeys(g, 1), dtype=torch.float64)
    bank.tau.copy_(torch.tensor([[0.7, 1.0, 1.3]]))
    targets = torch.full((1, CONTEXT), IGNORED)
    targets[0, -1] = ids[-1]
    with frozen(model):
        keys, values = stepwise_rows(model, find_sites(model), ids[None, :-1], 0, targets)
    before = log_likelihood(model, None, ids)
    # d log p = sum_i <G_i, tau_i act(||A_i||) v_i>, since <A, k> = ||A||
    act = ACTIVATIONS[site.activation]
    slope = sum(float(bank.tau[0, i] * act(a[i].norm()) * g[i].square().sum() / total) for i in g)
    errors = []
    for eps in (1e-4, 1e-5, 1e-6):
        for layer in g:
            bank.slots(layer).k[0, 0] = keys[layer][0, -1]
            bank.slots(layer).v[0, 0] = eps * values[layer][0, -1]
        rise = log_likelihood(model, bank, ids) - before
        assert rise > 0
        assert log_likelihood(model, bank, ids, everywhere=True) > before
        errors.append(abs(rise / (eps * slope) - 1))
    assert errors[-1] < 1e-4
    assert errors[1] < errors[0] / 5  # the error is of first order in eps
    assert errors[2] < errors[1] / 5


def test_stepwise_value_of_several_targets_is_the_gradient_of_their_sum(model_of: ModelOf) -> None:
    model, ids = model_of("gpt2"), torch.stack([text(CONTEXT + 1, 4), text(CONTEXT + 1, 5)])
    sites, prefix = find_sites(model), 6
    targets = ids[:, prefix + 1 :].clone()
    targets[1, -2:] = IGNORED
    with frozen(model):
        keys, values = stepwise_rows(model, sites, ids[:, :-1], prefix, targets)
        # In pieces: the rows of a batch do not see one another.
        for row in range(2):
            k, v = stepwise_rows(model, sites, ids[row : row + 1, :-1], prefix, targets[row : row + 1])
            for layer in sites:
                torch.testing.assert_close(k[layer][0], keys[layer][row], rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(v[layer][0], values[layer][row], rtol=1e-10, atol=1e-12)
        # Finite difference: nudge layer 1's FFN output at one position along the direction.
        where, layer, eps = 3, 1, 1e-6

        def nudged(sign: int) -> float:
            def hook(_m: Any, _a: Any, output: Tensor) -> Tensor:
                if output.shape[1] == prefix:
                    return output
                output = output.clone()
                output[0, where] += sign * eps * values[layer][0, where]
                return output

            handle = sites[layer].exit.register_forward_hook(hook)
            with torch.no_grad():
                out = -float(token_nll(chunk_logits(model, ids[:, :-1], prefix), targets)[0].sum())
            handle.remove()
            return out

        slope = (nudged(1) - nudged(-1)) / (2 * eps)
    # <G, v> = ||G_layer||^2 / ||G||, and v_layer = G_layer / ||G||: slope / ||v_layer||^2 = ||G|| for each layer
    norms = [slope / float(values[layer][0, where].square().sum())]
    assert norms[0] > 0
    layer = 2
    with frozen(model):
        slope = (nudged(1) - nudged(-1)) / (2 * eps)
    norms.append(slope / float(values[layer][0, where].square().sum()))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert float(sum(v[0, where].square().sum() for v in values.values())) == pytest.approx(1, rel=1e-12)


def test_fill_slots_takes_the_worst_tokens_into_empty_slots_until_full() -> None:
    bank = Bank("mlp", "relu", 3, {0: 4, 2: 6}, size=2, dtype=torch.float64)
    assert empty_slots(bank).tolist() == [6, 6]

    def pairs(seed: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        draw = [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(4)]
        return {0: draw[0], 2: draw[1]}, {0: draw[2], 2: draw[3]}

    nll = torch.tensor([0.5, 9.0, 2.0, 3.0, 1.0])
    targets = torch.tensor([3, IGNORED, 4, 5, 6])
    keys, values = pairs(1)
    bank.slots(0).k[1, 1] = 7.0  # taken already
    assert fill_slots(bank, 1, keys, values, nll, targets) == 4
    assert (bank.rows[0] == 0).all()
    low, high = bank.slots(0), bank.slots(2)
    for slot, token in {0: 3, 2: 2, 3: 4}.items():
        assert torch.equal(low.k[1, slot], keys[0][token])
        assert torch.equal(low.v[1, slot], values[0][token])
    assert (low.k[1, 1] == 7).all()
    assert (low.v[1, 1] == 0).all()
    assert torch.equal(high.k[1, :4], keys[2][[3, 2, 4, 0]])
    assert torch.equal(high.v[1, :4], values[2][[3, 2, 4, 0]])
    assert (high.k[1, 4:] == 0).all()

    before = bank.rows.clone()
    more, again = pairs(2), torch.tensor([3, 4, 5, 6, 7])
    assert fill_slots(bank, 1, *more, nll, again) == 2
    assert torch.equal(high.k[1, 4:], more[0][2][[1, 3]])
    assert torch.equal(low.k[1], before[1, :4])
    assert torch.equal(high.v[1, 4:], more[1][2][[1, 3]])
    before = bank.rows.clone()
    assert fill_slots(bank, 1, *more, nll, again) == 0
    assert fill_slots(bank, 0, *more, nll, torch.full((5,), IGNORED)) == 0
    assert same_bytes(bank.rows, before)


def test_a_memory_has_room_while_any_layer_has() -> None:
    bank = Bank("mlp", "relu", 3, {0: 2, 1: 5}, size=2)
    bank.slots(0).k[:] = 1
    bank.slots(1).k[0, :3] = 1
    bank.slots(1).k[1] = 1
    assert empty_slots(bank).tolist() == [2, 0]
