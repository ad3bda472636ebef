"""Sites: every family's FFN is found, read and observed as the model itself computes it."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from custom_model import CUSTOM, Custom
from families import D_FF, FAMILY_NAMES, GATED, MLP, MOE, MULTIMODAL, tiny_model
from locas import sites
from locas.sites import Family, Site, canonical_activation, find_family, find_sites, fingerprint

ALL = FAMILY_NAMES + MULTIMODAL
LAYERS = 3
EXPERTS = 5


def _tanh_gelu(constant: float) -> Any:
    return lambda x: 0.5 * x * (1 + torch.tanh(constant * (x + 0.044715 * x**3)))


REFERENCE = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": _tanh_gelu(math.sqrt(2 / math.pi)),
    "gelu_new": _tanh_gelu(math.sqrt(2 / math.pi)),
    "gelu_bloom": _tanh_gelu(0.79788456),
}


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    """Token ids `[batch, length]`, above the special ones."""
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(5))


def forward(model: nn.Module, found: dict[int, Site]) -> dict[int, SimpleNamespace]:
    """Run the model; per layer: the entry's arguments, the exit's output and the router's, all cloned.

    Cloned because Falcon adds the attention's output to the FFN's in place.
    """
    seen = {layer: SimpleNamespace(router=None) for layer in found}
    handles = []
    for layer, site in found.items():

        def before(module: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
            seen[layer].args = [arg.clone() for arg in args]

        def after(module: nn.Module, args: Any, output: Tensor, layer: int = layer) -> None:
            seen[layer].output = output.clone()

        def route(module: nn.Module, args: Any, output: tuple[Tensor, ...], layer: int = layer) -> None:
            seen[layer].router = output

        handles += [site.entry.register_forward_pre_hook(before), site.exit.register_forward_hook(after)]
        if site.experts is not None:
            handles.append(site.entry.gate.register_forward_hook(route))
    with torch.no_grad():
        model(tokens())
    for handle in handles:
        handle.remove()
    return seen


def intermediate(site: Site, seen: SimpleNamespace) -> Tensor:
    """M, recomputed from the site's rows and the captured input: `[tokens, d_ff]`."""

    def biased(x: Tensor, module: nn.Module) -> Tensor:
        bias = getattr(module, "bias", None)
        return x if bias is None else x + bias

    act = REFERENCE[site.activation]
    x = seen.args[0].reshape(-1, site.d_model)
    up = biased(x @ site.up_rows().T, site.up)
    if not site.gated:
        return act(up)
    m = act(biased(x @ site.gate_rows().T, site.gate)) * up
    if site.experts is None:
        return m
    _, weights, chosen = seen.router
    routing = torch.zeros(len(x), EXPERTS, dtype=x.dtype)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            routing[token, expert] += weight
    return m * routing.repeat_interleave(site.d_ff // EXPERTS, dim=1)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    """Equal to rtol, relative to the tensor's largest element where an element is near zero."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("name", ALL)
def test_finds_every_layer(name: str) -> None:
    model = tiny_model(name, layers=LAYERS)
    found = find_sites(model)
    assert list(found) == [site.layer for site in found.values()] == list(range(LAYERS))
    config = getattr(model.config, "text_config", model.config)
    for site in found.values():
        assert site.d_model == config.hidden_size
        width = 65 if site.experts is not None else 88 if name == "bloom" else D_FF  # BLOOM: always 4 d_model
        assert site.d_ff == width
        assert site.gated == (name not in MLP)
        assert site.activation in sites.ACTIVATIONS
        assert site.device == torch.device("cpu")
        assert (site.experts is not None) == (name in MOE and (name, site.layer) != ("qwen3_moe", 1))


@pytest.mark.parametrize("name", ALL)
def test_rows_recompute_the_ffn(name: str) -> None:
    model = tiny_model(name)
    found = find_sites(model)
    for layer, seen in forward(model, found).items():
        site = found[layer]
        assert site.down_rows().shape == site.up_rows().shape == (site.d_ff, site.d_model)
        output = intermediate(site, seen) @ site.down_rows()
        if getattr(site.down, "bias", None) is not None:
            output = output + site.down.bias
        if name == "bloom":  # its mlp(A, residual) returns the sum
            output = output + seen.args[1].reshape(-1, site.d_model)
        close(output, seen.output.reshape(-1, site.d_model))


@pytest.mark.parametrize("name", ALL)
def test_observe_intermediate_equals_brute_force(name: str) -> None:
    model = tiny_model(name)
    found = find_sites(model)
    calls: dict[int, list[tuple[Tensor, int]]] = {layer: [] for layer in found}
    handles = []
    for layer, site in found.items():
        handles += site.observe_intermediate(lambda sums, count, to=calls[layer]: to.append((sums, count)))
    for layer, seen in forward(model, found).items():
        ((sums, count),) = calls[layer]
        m = intermediate(found[layer], seen).detach()
        assert (sums.dtype, sums.shape, count) == (torch.float32, (found[layer].d_ff,), len(m))
        assert not sums.requires_grad
        close(sums.double() / count, m.abs().mean(0), rtol=1e-6)  # sums are float32 by contract
    for handle in handles:
        handle.remove()
    forward(model, found)
    assert all(len(seen) == 1 for seen in calls.values())


def test_observe_intermediate_sees_no_expert_that_did_not_fire() -> None:
    model = tiny_model("mixtral", layers=1)
    site = find_sites(model)[0]
    sums: list[Tensor] = []
    site.observe_intermediate(lambda total, count: sums.append(total.view(EXPERTS, -1)))
    with torch.no_grad():
        model(tokens(1, 1))
    assert [int(expert.any()) for expert in sums[0]].count(1) == 2  # top-2 routing, one token


@pytest.mark.parametrize("name", MOE)
def test_observe_intermediate_with_another_experts_implementation(name: str) -> None:
    """Every implementation is dispatched inside the experts module: its arguments stay the same."""
    sums: dict[str, list[Tensor]] = {"eager": [], "batched_mm": []}
    for implementation, seen in sums.items():
        model = tiny_model(name, dtype=torch.float32)
        model.set_experts_implementation(implementation)
        for site in find_sites(model).values():
            site.observe_intermediate(lambda total, count, to=seen: to.append(total))
        with torch.no_grad():
            model(tokens())
    assert len(sums["eager"]) == LAYERS
    torch.testing.assert_close(sums["batched_mm"], sums["eager"])


def test_observe_intermediate_under_autograd() -> None:
    model = tiny_model("qwen3_moe")
    sums: list[Tensor] = []
    for site in find_sites(model).values():
        site.observe_intermediate(lambda total, count: sums.append(total))
    model(tokens()).logits.sum().backward()
    assert len(sums) == LAYERS
    assert not any(total.requires_grad for total in sums)


@pytest.mark.parametrize("name", GATED + MLP)
def test_rows_are_views_of_the_backbone(name: str) -> None:
    for site in find_sites(tiny_model(name)).values():
        pairs = [(site.up, site.up_rows()), (site.down, site.down_rows())]
        if site.gated:
            pairs.append((site.gate, site.gate_rows()))
        for module, rows in pairs:
            assert rows.untyped_storage().data_ptr() == module.weight.untyped_storage().data_ptr()
            assert not rows.requires_grad


@pytest.mark.parametrize("name", MOE)
def test_experts_rows_are_numbered_expert_by_expert(name: str) -> None:
    site = find_sites(tiny_model(name))[0]
    width = site.d_ff // EXPERTS
    expert, basis = 3, 7
    row = expert * width + basis
    assert torch.equal(site.gate_rows()[row], site.experts.gate_up_proj[expert, basis])
    assert torch.equal(site.up_rows()[row], site.experts.gate_up_proj[expert, width + basis])
    assert torch.equal(site.down_rows()[row], site.experts.down_proj[expert, :, basis])


def test_layers_are_chosen_checked_and_ordered() -> None:
    model = tiny_model("qwen3", layers=5)
    assert list(find_sites(model, [3, 0, 3])) == [0, 3]
    for wrong in ([5], [-1], [0, 7], [True], ["1"]):
        with pytest.raises(ValueError, match=r"has no layers .* integers from 0 to 4 "):
            find_sites(model, wrong)
    with pytest.raises(ValueError, match=r"layers is empty; allowed are integers from 0 to 4 "):
        find_sites(model, [])


def test_sees_through_torch_compile() -> None:
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="eager")
    assert [site.entry for site in find_sites(compiled).values()] == [layer.mlp for layer in model.model.layers]
    assert fingerprint(compiled) == fingerprint(model)


def test_no_gate() -> None:
    with pytest.raises(ValueError, match="layer 0 has no gate"):
        find_sites(tiny_model("gpt2"))[0].gate_rows()


# -------------------------------------------------------------------- Activations


@pytest.mark.parametrize("alias", sorted(sites.ALIASES))
def test_aliases_are_the_same_function(alias: str) -> None:
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    canonical = canonical_activation(alias)
    torch.testing.assert_close(ACT2FN[alias](x), ACT2FN[canonical](x), rtol=0, atol=1e-12)
    if canonical in REFERENCE:
        torch.testing.assert_close(ACT2FN[alias](x), REFERENCE[canonical](x), rtol=0, atol=1e-12)


def test_unknown_activation() -> None:
    model = tiny_model("llama")
    model.config.hidden_act = "quick_gelu"
    with pytest.raises(ValueError, match=r"'quick_gelu' is not supported; supported: .*gelu_bloom.* silu"):
        find_sites(model)


# -------------------------------------------------------------------- Models that are not known, or not as described


def test_a_family_described_by_the_user(families: list[Family]) -> None:
    families.append(Family(("custom",), **CUSTOM, activation="=silu"))
    model = Custom().double()
    found = find_sites(model)
    assert [(site.d_model, site.d_ff, site.gated, site.activation) for site in found.values()] == [
        (11, 17, False, "silu")
    ] * 2
    for layer, seen in forward(model, found).items():
        site = found[layer]
        output = intermediate(site, seen) @ site.down_rows() + site.down.bias
        close(output, seen.output.reshape(-1, 11))


def test_the_last_description_wins(families: list[Family]) -> None:
    mine = Family(("llama",), **CUSTOM)
    families.append(mine)
    assert find_family(tiny_model("llama")) is mine


def test_unknown_model() -> None:
    with pytest.raises(ValueError) as error:
        find_sites(Custom())
    for part in ("Custom ", "'custom'", "qwen3_moe", "locas.sites.FAMILIES.append(Family(", "print(model)"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"Linear keeps its FFN.* None"):
        find_sites(nn.Linear(2, 3))


def test_model_without_its_head() -> None:
    with pytest.raises(ValueError, match=r"LlamaModel .*'llama'.* no decoder layers at model\.layers.*AutoModel"):
        find_sites(tiny_model("llama").model)


def test_paths_and_sizes_that_do_not_fit(families: list[Family]) -> None:
    model = Custom()
    families.append(Family(("custom",), **{**CUSTOM, "up": "ffn.first"}, activation="=silu"))
    with pytest.raises(ValueError, match=r"layer 0, a Block, has no module at 'ffn\.first'; it has ffn, ffn\.one"):
        find_sites(model)
    families.append(Family(("custom",), **CUSTOM))
    with pytest.raises(ValueError, match=r"Namespace has no attribute 'hidden_act' .*Family\.activation"):
        find_sites(model)
    families.append(Family(("custom",), **CUSTOM, gate="ffn.one", activation="=silu"))
    with pytest.raises(ValueError, match=r"maps 17 to 11, so ffn\.one must have .*\(34, 11\), not \(17, 11\)"):
        find_sites(model)


def test_conv1d_that_is_not_described_as_such(families: list[Family]) -> None:
    model = tiny_model("gpt2")
    described = vars(find_family(model))
    families.append(Family(**{**described, "conv1d": False, "down": "mlp.c_fc"}))
    with pytest.raises(ValueError, match=r"check up, down, gate and conv1d of the Family for gpt2"):
        find_sites(model)


def test_experts_stored_otherwise() -> None:
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts.is_transposed = True
    with pytest.raises(ValueError, match=r"layer 1: mlp\.experts must hold gate_up_proj \[experts, 2 m, d_model\]"):
        find_sites(model)


# -------------------------------------------------------------------- Weights that are not plainly there


class Packed(nn.Module):
    """A linear module as weight-only quantisers build it: packed integers, and no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight * 8).to(torch.int32)[:, ::8].clone())


@pytest.mark.parametrize("how", ["no weight", "int8", "float8", "packed floats", "subclass"])
def test_quantised_weights(how: str) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    before = fingerprint(model)
    down = model.model.layers[1].mlp.down_proj

    class Subclass(Tensor):
        pass

    weight = down.weight.detach()
    if how == "no weight":
        model.model.layers[1].mlp.down_proj = Packed(down)
    else:
        new = {
            "int8": weight.to(torch.int8),
            "float8": weight.to(torch.float8_e4m3fn),
            "packed floats": weight[:, ::2].clone(),
            "subclass": weight.clone().as_subclass(Subclass),
        }[how]
        del down.weight
        down.register_buffer("weight", new)
    site = find_sites(model)[1]
    assert (site.d_ff, site.d_model, site.device.type) == (D_FF, 22, "cpu")
    assert site.up_rows().shape == (D_FF, 22)
    with pytest.raises(TypeError, match=r"layer 1: .* quantised .*'gaussian' and 'activation' do not need them"):
        site.down_rows()
    if how != "subclass":
        assert fingerprint(model) != before


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "qwen3_moe"])
def test_weights_offloaded_by_accelerate(name: str) -> None:
    plain, offloaded = tiny_model(name), tiny_model(name)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    found, sums = find_sites(offloaded), {}
    for layer, site in find_sites(plain).items():
        other = found[layer]
        assert next(other.down.parameters()).is_meta
        assert other.device == torch.device("cpu")
        assert torch.equal(other.up_rows(), site.up_rows())
        assert torch.equal(other.down_rows(), site.down_rows())
        for key, one in (("plain", site), ("offloaded", other)):
            one.observe_intermediate(lambda total, count, at=(key, layer): sums.update({at: total}))
    assert fingerprint(offloaded) == fingerprint(plain)
    with torch.no_grad():
        plain(tokens())
        offloaded(tokens())
    for layer in found:
        assert torch.equal(sums["plain", layer], sums["offloaded", layer])


def test_meta_model() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model("mixtral").config)
    site = find_sites(model)[0]
    assert (site.d_ff, site.device.type) == (65, "meta")
    with pytest.raises(RuntimeError, match="layer 0: its weights are on the meta device; load a checkpoint"):
        site.up_rows()
    with pytest.raises(RuntimeError, match="weights on the meta device have no fingerprint"):
        fingerprint(model)
