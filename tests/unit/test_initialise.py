"""Where memories begin: every strategy against brute force."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import D_FF, MAX_POSITIONS, MOE, VOCAB, tiny_model
from helpers import START, same_bytes, snapshot, text
from locas.bank import ACTIVATIONS, Bank, Variant
from locas.grow import grow
from locas.initialise import TAU_PER_SLOT, InitSettings, Strategy, create_bank, empty_slots
from locas.memory import create
from locas.sites import Site, find_sites

ModelOf = Callable[..., PreTrainedModel]
N, RANK = 43, 5
WINDOWS = [(None, None), (START, None), (None, 17), (START, 17)]  # (start token, window): one or several windows


def observe(model: nn.Module, module: nn.Module, inputs: Tensor) -> tuple[Any, ...]:
    """The positional arguments of a module in one full pass over inputs [seq]."""
    seen: list[tuple[Any, ...]] = []
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(tuple(a.clone() for a in args)))
    with torch.no_grad():
        model(inputs[None], use_cache=False)
    handle.remove()
    return seen[0]


def windows(ids: Tensor, start: int | None, window: int | None) -> list[Tensor]:
    """The text in windows, start token included in the size and in front of each."""
    room = (window or MAX_POSITIONS) - (start is not None)
    lead = [] if start is None else [start]
    return [torch.tensor(lead + ids[i : i + room].tolist()) for i in range(0, len(ids), room)]


def intermediate(model: nn.Module, site: Site, inputs: Tensor) -> Tensor:
    """M [seq, d_ff] of a full pass. Experts: token by token and choice by choice, zero where one did not fire."""
    if site.experts is None:
        return observe(model, site.down, inputs)[0].reshape(-1, site.d_ff)
    hidden, chosen, weights = observe(model, site.experts, inputs)
    width = site.experts.down_proj.shape[2]
    out = hidden.new_zeros(len(hidden), site.d_ff)
    for t, x in enumerate(hidden):
        for expert, weight in zip(chosen[t].tolist(), weights[t], strict=True):
            rows = slice(expert * width, (expert + 1) * width)
            out[t, rows] = weight * ACTIVATIONS["silu"](site.gate_rows()[rows] @ x) * (site.up_rows()[rows] @ x)
    return out


def importance(model: nn.Module, site: Site, ids: Tensor, start: int | None, window: int | None) -> Tensor:
    """a_j, the start token's own activations left out."""
    skip = int(start is not None)
    return torch.cat([intermediate(model, site, w)[skip:] for w in windows(ids, start, window)]).abs().mean(0)


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def assert_fresh(model: nn.Module, bank: Bank, scale: float | None) -> None:
    """V = 0, unit keys and gates, tau = scale / r * mean ||v_j||."""
    for layer, site in find_sites(model, bank.layers).items():
        slots = bank.slots(layer)
        assert (slots.v == 0).all()
        for part in (slots.k, slots.g) if slots.g is not None else (slots.k,):
            torch.testing.assert_close(part.norm(dim=-1), torch.ones(1, bank.ranks[layer], dtype=bank.rows.dtype))
        norms = [float(v.norm()) for v in site.down_rows().double()]
        tau = (TAU_PER_SLOT if scale is None else scale / bank.ranks[layer]) * sum(norms) / len(norms)
        assert float(bank.tau[0, bank.layers.index(layer)]) == pytest.approx(tau, rel=1e-12)


# -------------------------------------------------------------------- cloning


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize(("start", "window"), WINDOWS)
@pytest.mark.parametrize("strategy", ["top-k", "bottom-k"])
def test_clones_the_most_or_least_important_rows(
    model_of: ModelOf, name: str, start: int | None, window: int | None, strategy: Strategy
) -> None:
    model, ids = model_of(name), text(N)
    settings = InitSettings(RANK, init=strategy, tau_scale=3.0)
    bank = create_bank(model, ids, settings, start_id=start, window_tokens=window)
    assert (bank.variant, bank.activation, bank.ranks) == (
        "glu",
        find_sites(model)[0].activation,
        dict.fromkeys(range(3), RANK),
    )
    assert_fresh(model, bank, 3.0)
    for layer, site in find_sites(model).items():
        score = importance(model, site, ids, start, window)
        slots, ups = bank.slots(layer), unit(site.up_rows())
        assert slots.g is not None
        order = torch.stack([(ups @ key).argmax() for key in slots.k[0]])
        assert len(set(order.tolist())) == RANK
        # Compared by their scores: experts that never fired are all equally unimportant. Sums are float32.
        best = score.sort(descending=strategy == "top-k").values[:RANK]
        torch.testing.assert_close(score[order], best, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(slots.k[0], unit(site.up_rows()[order]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slots.g[0], unit(site.gate_rows()[order]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MOE)
def test_experts_that_did_not_fire_are_not_cloned(model_of: ModelOf, name: str) -> None:
    model, ids = model_of(name), text(1)
    site = find_sites(model)[0]
    fired = (importance(model, site, ids, None, None) > 0).nonzero()[:, 0].tolist()
    assert len(fired) == 2 * 13  # two experts of five
    bank = create_bank(model, ids, InitSettings(len(fired), init="top-k"), layers=[0])
    rows = unit(site.up_rows())
    cloned = [int((rows @ key).argmax()) for key in bank.slots(0).k[0]]
    assert sorted(cloned) == fired


def test_mlp_beside_a_gated_ffn_clones_the_up_rows(model_of: ModelOf) -> None:
    model, ids = model_of("qwen2"), text(N)
    bank = create_bank(model, ids, InitSettings(RANK, variant="mlp", init="top-k"))
    assert bank.variant == "mlp"
    for layer, site in find_sites(model).items():
        order = importance(model, site, ids, None, None).argsort(descending=True)[:RANK]
        torch.testing.assert_close(bank.slots(layer).k[0], unit(site.up_rows()[order]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_random_rows_are_different_rows_of_the_backbone(model_of: ModelOf, name: str) -> None:
    model = model_of(name)
    bank = create_bank(model, text(3), InitSettings(D_FF - 2, variant="auto", init="random-rows"))
    assert_fresh(model, bank, None)
    picks = {}
    for layer, site in find_sites(model).items():
        slots, ups = bank.slots(layer), unit(site.up_rows())
        chosen = torch.stack([(ups @ key).argmax() for key in slots.k[0]])
        assert len(set(chosen.tolist())) == D_FF - 2
        torch.testing.assert_close(slots.k[0], ups[chosen], rtol=1e-12, atol=1e-12)
        if slots.g is not None:
            torch.testing.assert_close(slots.g[0], unit(site.gate_rows()[chosen]), rtol=1e-12, atol=1e-12)
        picks[layer] = chosen.tolist()
    assert picks[0] != picks[1] != picks[2]


# -------------------------------------------------------------------- the others


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize(("start", "window"), WINDOWS)
def test_activation_takes_the_ffn_inputs_of_evenly_spread_tokens(
    model_of: ModelOf, name: str, start: int | None, window: int | None
) -> None:
    model, ids = model_of(name), text(N)
    ranks = {0: 4, 2: N}
    settings = InitSettings(init="activation", tau_scale=1.0)
    bank = create_bank(model, ids, settings, layers=ranks, start_id=start, window_tokens=window)
    assert_fresh(model, bank, 1.0)
    skip = int(start is not None)
    for layer, site in find_sites(model, ranks).items():
        inputs = torch.cat(
            [observe(model, site.entry, w)[0].reshape(-1, site.d_model)[skip:] for w in windows(ids, start, window)]
        )
        where = [0, 10, 21, 32] if layer == 0 else list(range(N))
        slots = bank.slots(layer)
        torch.testing.assert_close(slots.k[0], unit(inputs[where]), rtol=1e-10, atol=1e-10)
        if slots.g is not None:
            assert same_bytes(slots.g, slots.k)


@pytest.mark.parametrize("variant", ["glu", "mlp"])
def test_gaussian_directions_are_random(model_of: ModelOf, variant: Variant) -> None:
    model = model_of("gpt2")
    bank = create_bank(model, text(1), InitSettings(501, variant=variant, init="gaussian"))
    assert_fresh(model, bank, None)
    parts = [bank.slots(layer).k[0] for layer in range(3)]
    parts += [g[0] for layer in range(3) if (g := bank.slots(layer).g) is not None]
    for i, part in enumerate(parts):
        covariance = part.T @ part * bank.d_model / 501
        torch.testing.assert_close(covariance, torch.eye(bank.d_model, dtype=part.dtype), rtol=0, atol=0.3)
        for other in parts[:i]:
            assert (part * other).sum(-1).mean().abs() < 0.05  # independent of each other


@pytest.mark.parametrize("strategy", ["gaussian", "random-rows"])
def test_seeds_decide_and_the_global_generator_does_not(model_of: ModelOf, strategy: Strategy) -> None:
    model = model_of("gpt2")

    def rows(seed: int, layers: list[int] | None = None) -> Bank:
        return create_bank(model, text(3), InitSettings(RANK, "mlp", strategy, seed=seed), layers=layers)

    torch.manual_seed(0)
    one, state = rows(3), torch.get_rng_state()
    assert same_bytes(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert same_bytes(one.rows, rows(3).rows)
    assert not torch.equal(one.rows, rows(4).rows)
    # A layer's draw depends on its index, not on which other layers there are.
    assert same_bytes(one.slots(2).k, rows(3, [2]).slots(2).k)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_step_wise_begins_with_empty_slots(model_of: ModelOf, name: str) -> None:
    bank = create_bank(model_of(name), text(0), InitSettings(RANK, variant="mlp", init="step-wise"))
    assert (bank.rows == 0).all()
    assert empty_slots(bank).tolist() == [RANK]


@pytest.mark.parametrize(
    ("name", "variant", "paper"),
    [("llama", "auto", "top-k"), ("llama", "mlp", "step-wise"), ("gpt2", "auto", "step-wise")],
)
def test_the_default_is_top_k_and_the_paper_s_depends_on_the_variant(
    model_of: ModelOf, name: str, variant: Any, paper: Any
) -> None:
    def rows(init: Any) -> Tensor:
        return create_bank(model_of(name), text(N), InitSettings(RANK, variant, init), start_id=START).rows

    assert same_bytes(rows("auto"), rows("top-k"))
    assert same_bytes(rows("paper"), rows(paper))
    assert rows("top-k").any()


@pytest.mark.parametrize(
    ("name", "init", "named"),
    [
        ("llama", "auto", ("glu", "top-k", "silu")),
        ("gpt2", "auto", ("mlp", "top-k", "gelu_new")),
        ("gpt2", "paper", ("mlp", "step-wise", "gelu_new")),
    ],
)
def test_a_memory_notes_what_auto_stood_for(model_of: ModelOf, name: str, init: Any, named: tuple[str, ...]) -> None:
    memory = create(model_of(name), text(N), InitSettings(RANK, init=init), layers=[1], start_id=START)
    noted = memory.provenance.settings["init"]
    assert (noted["variant"], noted["init"], noted["activation"]) == named
    if init == "auto":
        (step,) = grow(memory, model_of(name), text(N), 2, start_id=START).provenance.settings["grow"]
        assert step["init"] == "top-k"


@pytest.mark.parametrize("name", ["qwen3", "falcon"])
def test_making_a_memory_changes_nothing_of_the_backbone(model_of: ModelOf, name: str) -> None:
    model = model_of(name, torch.bfloat16)
    model.train()
    before, hooks = snapshot(model), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    first = next(model.parameters()).requires_grad_(False)
    for strategy in ("activation", "gaussian") + (("top-k",) if name == "qwen3" else ()):
        bank = create_bank(model, text(N), InitSettings(RANK, init=strategy), start_id=START)
        assert bank.rows.dtype == torch.float32
        assert not bank.rows.requires_grad
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    first.requires_grad_(True)
    model.eval()
    assert all(same_bytes(t, before[k]) for k, t in model.state_dict().items())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("strategy", ["top-k", "activation"])
def test_nobody_makes_logits_to_make_a_memory(strategy: Strategy) -> None:
    model: Any = tiny_model("qwen3")
    seen: list[object] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: seen.append(_))
    create_bank(model, text(N), InitSettings(init=strategy, rank=RANK), start_id=START)
    assert not seen


def test_activation_can_be_chosen(model_of: ModelOf) -> None:
    settings = InitSettings(RANK, activation="relu", init="gaussian")
    assert create_bank(model_of("gpt2"), text(1), settings).activation == "relu"
    assert create_bank(model_of("gpt2"), text(1), InitSettings(RANK)).activation == "gelu_new"


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "the rank must be 1 or more; got 0"),
        ({"variant": "gru"}, "variant 'gru' is not one of auto, glu, mlp"),
        (
            {"init": "svd"},
            "initialisation 'svd' is not one of auto, paper, top-k, bottom-k, random-rows, gaussian, activation, "
            "step-wise",
        ),
        ({"tau_scale": 0.0}, "tau_scale must be a positive number; got 0.0"),
        ({"tau_scale": float("nan")}, "tau_scale must be a positive number; got nan"),
        (
            {"variant": "glu", "init": "step-wise"},
            "step-wise initialisation writes a key and a value for a token, which the product with a gate makes "
            "impossible for Locas-GLU; use top-k, or variant mlp",
        ),
    ],
)
def test_errors_of_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        InitSettings(**arguments)


@pytest.mark.parametrize(
    ("name", "settings", "n", "message"),
    [
        (
            "llama",
            InitSettings(RANK, init="step-wise"),
            3,
            "step-wise initialisation is for Locas-MLP; this memory is gated (variant glu): use top-k",
        ),
        (
            "gpt2",
            InitSettings(RANK, "glu", "top-k"),
            3,
            "top-k clones gates, and this backbone's FFN has none; use variant mlp, or gaussian or activation",
        ),
        (
            "llama",
            InitSettings(RANK),
            0,
            "top-k initialisation looks at the text's activations, and the text has no tokens",
        ),
        (
            "llama",
            InitSettings(D_FF + 1, init="random-rows"),
            3,
            f"random-rows clones {D_FF + 1} of the FFN's basis vectors, but layer 0 has only {D_FF}; use a smaller "
            "rank, or gaussian",
        ),
        (
            "llama",
            InitSettings(4, init="activation"),
            3,
            "activation initialisation takes one token a slot: rank 4 needs as many tokens, and the text has 3; use "
            "a smaller rank or more text",
        ),
        ("gpt2", InitSettings(RANK, activation="tanh"), 3, "activation 'tanh' is not one of silu, relu,"),
    ],
)
def test_errors_of_making_a_memory(model_of: ModelOf, name: str, settings: InitSettings, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        create_bank(model_of(name), text(n), settings)


def test_errors_of_layers(model_of: ModelOf) -> None:
    for layers in ([3], [], {}, {-1: 2}):
        with pytest.raises(ValueError, match="allowed are integers from 0 to 2"):
            create_bank(model_of("llama"), text(3), InitSettings(RANK), layers=layers)
    with pytest.raises(ValueError, match=r"ranks 1 or more; got \{1: 0\}"):
        create_bank(model_of("llama"), text(3), InitSettings(RANK), layers={1: 0})
    assert VOCAB > 90
