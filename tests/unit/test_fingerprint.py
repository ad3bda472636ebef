"""The fingerprint names a backbone: its FFN weights and shape, and nothing else."""

import pytest
import torch

from custom_model import CUSTOM, Custom
from families import FAMILY_NAMES, MULTIMODAL, tiny_model
from helpers import text
from locas import sites
from locas.sites import FAMILIES, Family, find_sites, fingerprint

ALL = FAMILY_NAMES + MULTIMODAL


@pytest.mark.parametrize("name", ALL)
def test_fingerprint_names_the_backbone(name: str) -> None:
    bfloat16 = tiny_model(name, dtype=torch.bfloat16)
    rounded = tiny_model(name, dtype=torch.float32)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    digest = fingerprint(bfloat16)
    assert len(digest) == 64
    assert fingerprint(tiny_model(name, dtype=torch.bfloat16)) == digest
    assert fingerprint(rounded) == digest
    assert fingerprint(rounded.double()) == digest
    assert fingerprint(tiny_model(name, dtype=torch.bfloat16, seed=1)) != digest
    assert fingerprint(tiny_model(name, dtype=torch.bfloat16, layers=2)) != digest


@pytest.mark.parametrize("name", ALL)
def test_fingerprint_changes_with_any_ffn_weight(name: str) -> None:
    model = tiny_model(name)
    digest, changed = fingerprint(model), []
    modules = {m: None for site in find_sites(model).values() for m in (site.up, site.down, site.gate) if m}
    matrices = [matrix for module in modules for matrix in module.parameters() if matrix.dim() > 1]
    for matrix in matrices:
        last = matrix.data.view(-1)[-1:]  # small weights are hashed whole
        kept = last.clone()
        last.add_(1)
        changed.append(fingerprint(model))
        last.copy_(kept)
    assert len({digest, *changed}) == 1 + len(matrices)
    assert fingerprint(model) == digest


def test_fingerprint_ignores_what_is_not_the_ffn() -> None:
    model = tiny_model("qwen3")
    digest = fingerprint(model)
    for site in find_sites(model).values():
        site.observe_intermediate(lambda sums, count: None)
        site.exit.register_forward_hook(lambda module, args, output: output + 1)
    model.requires_grad_(False).train()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
        model(text(11)[None])
    assert fingerprint(model) == digest


def test_fingerprint_depends_on_the_activation() -> None:
    model = tiny_model("qwen3")
    digest = fingerprint(model)
    model.config.hidden_act = "gelu"
    assert fingerprint(model) != digest


def test_fingerprint_is_stable_between_releases(families: list[Family]) -> None:
    families.append(Family(("custom",), **CUSTOM, activation="=silu"))
    assert fingerprint(Custom()) == "61471b65a19798099d46b54dc9c723c92804901a7964fab0611944f47e0d684c"


def test_fingerprint_samples_large_weights_over_every_column(families: list[Family]) -> None:
    families.append(Family(("custom",), **CUSTOM, activation="=silu"))
    model = Custom(d_model=64, d_ff=4096, layers=1)  # 262,144 elements: a stride of 5
    digest = fingerprint(model)
    weight = model.blocks[0].ffn.one.weight.data
    flat = weight.view(-1)
    flat[1] += 1
    assert fingerprint(model) == digest  # between two samples: unseen, as documented
    flat[5 * 1001] += 1
    assert fingerprint(model) != digest
    assert len(sites._sample_bytes(weight)) <= 2 * sites.FINGERPRINT_SAMPLE
    columns = {int(index) % 64 for index in torch.arange(0, weight.numel(), 5)}
    assert len(columns) == 64


def test_tiny_models_do_not_touch_the_global_generator() -> None:
    state = torch.get_rng_state()
    one, two = tiny_model("bloom"), tiny_model("bloom")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_every_listed_model_type_is_tested() -> None:
    tested = {tiny_model(name, layers=1).config.model_type for name in ALL}
    assert tested == {model_type for family in FAMILIES for model_type in family.model_types}
