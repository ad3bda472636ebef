"""Everything that learns while it reads: the same invariants for all, and each baseline against an obvious one."""

import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from families import tiny_model
from helpers import same_bytes, snapshot, text
from locas.backbone import Backbone
from locas.cli.memorize import PRESETS
from locas.evaluate.book import Method
from locas.evaluate.changes import Lora, down_projections
from locas.evaluate.learners import LEARNERS, MEMORIES, Locas, make, resolve
from locas.evaluate.memory_use import size_of
from locas.evaluate.weights import RECIPES, WeightLearner, equal_rank, memory_parameters
from locas.stream import ReadSettings
from tokens import tiny_backbone

READ = ReadSettings(window=23, chunk=11)
N = 53  # four chunks of 11 and one of 9
FAST: dict[str, dict[str, Any]] = {  # steps that are felt by a tiny random model
    **{name: {"lr": 0.02, "rank": 3} for name in RECIPES if RECIPES[name].trains == "lora"},
    "ffn-inplace": {"lr": 0.01},
    "dynamic": {"lr": 0.01},
    "locas": {"rank": 3},
    "locas-recomputed": {"rank": 3},
    "locas-paper": {"rank": 3, "lr": 0.1},
}
LEARNING = sorted(FAST)
TRAINED = sorted(RECIPES)


def backbone(family: str = "qwen3", dtype: torch.dtype = torch.float32) -> Backbone:
    return tiny_backbone(tiny_model(family, dtype))


def read(name: str, of: Backbone, ids: Tensor, seed: int = 0, **options: Any) -> list[Tensor]:
    learner = make(name, of, READ, seed=seed, options={**FAST.get(name, {}), **options})
    losses = [record.nll for record in learner.read(ids)]
    learner.close()
    return losses


def state(model: PreTrainedModel) -> list[Any]:
    """What must be as it was, besides the weights' bytes."""
    return [
        [(name, id(module), module.training, len(module._forward_hooks)) for name, module in model.named_modules()],
        [(name, id(p), p.data_ptr(), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        sorted(vars(model)),
    ]


class Unchanged:
    """Asserts that a backbone is byte for byte what it was when this was made."""

    def __init__(self, of: Backbone) -> None:
        self.model, self.before, self.weights = of.model, state(of.model), snapshot(of.model)

    def __call__(self) -> None:
        assert state(self.model) == self.before
        now = snapshot(self.model)
        assert all(same_bytes(now[name], weight) for name, weight in self.weights.items())


# -------------------------------------------------------------------- all methods


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_moe", "opt"])
@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_the_backbone_is_its_own_between_chunks_and_afterwards(name: str, family: str) -> None:
    of = backbone(family)
    unchanged = Unchanged(of)
    learner = make(name, of, READ, options=FAST.get(name))
    for record in learner.read(text(37)):
        unchanged()
        assert record.seconds > 0
        assert record.nll.shape == (record.stop - record.start,)
    with learner.active():
        of.model(text(5)[None])
    unchanged()
    learner.close()
    learner.close()
    unchanged()


@pytest.mark.parametrize("name", LEARNING)
def test_the_first_chunk_is_scored_as_by_truncated_reading_and_later_ones_are_not(name: str) -> None:
    of, ids = backbone(), text(N)
    plain, learnt = read("truncation", of, ids), read(name, of, ids)
    assert [x.shape for x in plain] == [x.shape for x in learnt] == [(11,)] * 4 + [(9,)]
    torch.testing.assert_close(learnt[0], plain[0])
    assert (learnt[-1] - plain[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", LEARNING)
def test_no_score_depends_on_a_later_token(name: str) -> None:
    of, ids = backbone(), text(N)
    other = torch.cat([ids[:25], text(N, seed=7)[25:]])
    one, two = (torch.cat(read(name, of, x)) for x in (ids, other))
    assert same_bytes(one[:25], two[:25])
    assert not torch.equal(one[25:], two[25:])


@pytest.mark.parametrize("name", LEARNING)
def test_equal_seeds_give_equal_bytes_and_leave_the_global_generator_alone(name: str) -> None:
    of, ids = backbone(), text(N)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = torch.cat(read(name, of, ids, seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    two, other = (torch.cat(read(name, of, ids, seed=s)) for s in (3, 4))
    assert same_bytes(one, two)
    # EVA and PiSSA without dropout hold nothing random; A of EVA is overwritten before it matters.
    assert torch.equal(one, other) != resolve(name, of, READ, FAST[name]).random
    assert resolve(name, of, READ).random == name.startswith("templora")


@pytest.mark.parametrize("name", sorted({*LEARNING} - {"locas"}))  # whose context is as older memories left it
def test_inside_active_the_backbone_is_what_scores_the_next_chunk(name: str) -> None:
    of, ids = backbone(), text(N)
    learner = make(name, of, ReadSettings(window=23, chunk=11, start_in_every_window=False), options=FAST[name])
    chunks = learner.read(ids)
    next(chunks), next(chunks)
    context = ids[None, 10:32]  # what the window of the third chunk (22 to 33) begins with
    with torch.no_grad(), learner.active():
        logits = of.model(context).logits
    plain = of.model(context).logits
    third = next(chunks)
    nll = F.cross_entropy(logits[0, 11:], ids[22:33], reduction="none")
    torch.testing.assert_close(nll, third.nll, rtol=1e-4, atol=1e-5)
    assert (logits - plain).abs().max() > 1e-3
    learner.close()


@pytest.mark.parametrize("name", TRAINED)
def test_an_exception_in_the_middle_leaves_the_backbone_as_it_was(name: str) -> None:
    of = backbone()
    unchanged = Unchanged(of)
    learner = make(name, of, READ, options=FAST[name])
    chunks = learner.read(text(N))
    next(chunks)
    calls = iter(range(100))

    def fail(*_: object) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    handle = of.model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        for _ in chunks:
            pass
    handle.remove()
    unchanged()


@pytest.mark.parametrize("name", ["templora-tuned", "lora-pissa", "lora-eva", "dynamic"])
def test_bfloat16_weights_are_trained_in_float32_and_come_back(name: str) -> None:
    of = backbone(dtype=torch.bfloat16)
    unchanged = Unchanged(of)
    learner = make(name, of, READ, options=FAST[name])
    assert isinstance(learner, WeightLearner)
    for record in learner.read(text(N)):
        assert record.nll.isfinite().all()
    change = learner._open_change()
    assert {p.dtype for p in change.masters} == {torch.float32}
    with learner.active():
        assert {p.dtype for p in of.model.parameters()} == {torch.bfloat16}
        for learnt, master in zip(change.trained, change.masters, strict=True):
            assert torch.equal(learnt, master.bfloat16())
            assert not torch.equal(learnt.float(), master)
    learner.close()
    unchanged()


def test_a_document_without_a_start_token_and_of_one_token() -> None:
    of = backbone()
    of = Backbone(of.name, of.model, of.tokenizer, None, False, of.tokenizer_sha256)
    for name in LEARNERS:
        (record,) = make(name, of, READ, options=FAST.get(name)).read(text(1))
        assert record.nll.isnan().tolist() == [True]
        assert math.isnan(record.grad_norm)
        assert not record.undone
        first, *_ = make(name, of, READ, options=FAST.get(name)).read(text(13))
        assert first.nll.isnan().tolist() == [True] + [False] * 10


# -------------------------------------------------------------------- TempLoRA


def slow_templora(of: Backbone, adapters: dict[str, Tensor], ids: Tensor, rates: list[float]) -> Iterator[Tensor]:
    """The losses of each chunk, by PEFT's own wrapper, transformers' own loss and whole windows throughout."""
    model = copy.deepcopy(of.model)
    config = peft.LoraConfig(r=3, lora_alpha=3, lora_dropout=0.0, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, module in model.named_modules():
            if f"{name}.A" in adapters:
                module.lora_A["default"].weight.copy_(adapters[f"{name}.A"])
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, betas=(0.9, 0.999), eps=1e-7, weight_decay=0.0)
    for i, start in enumerate(range(0, ids.numel(), 11)):
        chunk = ids[start : start + 11]
        prefix = torch.cat([torch.tensor([1]), ids[max(0, start - 11) : start]])  # room for BOS in a window of 23
        window = torch.cat([prefix, chunk])[None]
        labels = window.clone()
        labels[:, : prefix.numel()] = -100
        with torch.no_grad():
            logits = wrapped(input_ids=window).logits[0, prefix.numel() - 1 : -1]
            yield F.cross_entropy(logits, chunk, reduction="none")
        for _ in range(2):
            optimizer.zero_grad()
            wrapped(input_ids=window, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.param_groups[0]["lr"] = rates[i]
            optimizer.step()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's wrapper asks for it
@pytest.mark.parametrize("name", ["templora-paper", "templora-tuned"])
def test_templora_is_what_its_published_code_does(name: str) -> None:
    of, ids = backbone(), text(N)
    learner = make(name, of, READ, options={"rank": 3, "lr": 0.03, "dropout": 0.0})
    assert isinstance(learner, WeightLearner)
    change = learner._open_change()
    assert isinstance(change, Lora)
    adapters = {f"{path}.A": lora.lora_A["default"].weight.detach().clone() for path, _, _, _, lora in change._pairs}
    rates = [0.0, 0.015, 0.03, 0.03, 0.03] if name == "templora-paper" else [0.03] * 5
    got = [r.nll for r in learner.read(ids)]
    for mine, theirs in zip(got, slow_templora(of, adapters, ids, rates), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert len(adapters) == 3 * 7  # every linear layer but the head


def test_templora_as_published_has_the_published_settings() -> None:
    paper, tuned = RECIPES["templora-paper"], RECIPES["templora-tuned"]
    assert (paper.lr, paper.steps, paper.rank, paper.dropout, paper.warmup_chunks) == (5e-5, 2, 64, 0.05, 2)
    assert (paper.beta1, paper.beta2, paper.eps, paper.clip, paper.alpha) == (0.9, 0.999, 1e-7, 1.0, None)
    assert (tuned.warmup_chunks, tuned.rank, tuned.dropout, tuned.steps) == (0, 64, 0.05, 2)


@pytest.mark.parametrize(
    ("name", "tokens", "backwards"),
    [("templora-tuned", 3 * 23, 2), ("dynamic", 2 * 23, 2), ("ffn-inplace", 2 * 23, 2), ("lora-pissa", 2 * 23, 2)],
)
def test_a_chunk_costs_no_more_passes_than_its_method_needs(name: str, tokens: int, backwards: int) -> None:
    of = backbone()
    learner = make(name, of, READ, options=FAST[name])
    chunks = learner.read(text(N))
    for _ in range(3):
        next(chunks)
    seen: list[int] = []
    layer = of.model.model.layers[0]
    handle = layer.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[1]))
    called: list[int] = []
    grad, torch.autograd.grad = torch.autograd.grad, lambda *a, **k: (called.append(1), grad(*a, **k))[1]  # type: ignore[assignment]
    try:
        next(chunks)
    finally:
        torch.autograd.grad = grad
        handle.remove()
    assert sum(seen) == tokens - (tokens // 23)  # the window's last token is a target only
    assert len(called) == backwards


def test_dropout_is_on_while_learning_and_off_while_scoring() -> None:
    of, ids = backbone(), text(N)
    with_dropout, without = (read("templora-tuned", of, ids, dropout=d) for d in (0.5, 0.0))
    torch.testing.assert_close(with_dropout[0], without[0])
    assert (with_dropout[2] - without[2]).abs().max() > 1e-4


# -------------------------------------------------------------------- the others


@pytest.mark.parametrize("name", ["dynamic", "ffn-inplace"])
def test_weights_are_trained_as_by_an_ordinary_optimiser(name: str) -> None:
    of, ids = backbone(), text(11)
    learner = make(name, of, READ, options=FAST[name] | {"steps": 1})
    list(learner.read(ids))
    model = copy.deepcopy(of.model)
    trained = list(model.parameters()) if name == "dynamic" else down_projections(model)
    optimizer = torch.optim.AdamW(trained, lr=0.01, eps=1e-7, weight_decay=0.0)
    logits = model(torch.cat([torch.tensor([1]), ids[:-1]])[None]).logits[0]
    F.cross_entropy(logits, ids).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    expected, plain = snapshot(model), snapshot(of.model)
    with learner.active():
        got = snapshot(of.model)
    changed = {k for k in got if not torch.equal(got[k], plain[k])}
    assert changed == {k for k in expected if not torch.equal(expected[k], plain[k])}
    if name == "ffn-inplace":
        assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}
    for key in changed:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-3, atol=1e-4)


def test_pissa_begins_as_the_backbone_with_the_principal_part_of_each_weight() -> None:
    of = backbone()
    learner = make("lora-pissa", of, READ, options={"rank": 3})
    ids = text(17)[None]
    with torch.no_grad():
        plain = of.model(ids).logits
        with learner.active():
            torch.testing.assert_close(of.model(ids).logits, plain, rtol=1e-4, atol=1e-5)
            layer: Any = of.model.model.layers[1].mlp.up_proj
            principal = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        weight = of.model.model.layers[1].mlp.up_proj.weight
    u, s, v = torch.linalg.svd(weight.detach())
    torch.testing.assert_close(principal, u[:, :3] @ s[:3].diag() @ v[:3], rtol=1e-3, atol=1e-4)


def test_eva_takes_the_principal_directions_of_the_first_chunk() -> None:
    of, ids = backbone(), text(13)
    read_one = ReadSettings(window=29, chunk=13)
    learner = make("lora-eva", of, read_one, options={"rank": 2, "lr": 1e-30, "steps": 1})
    list(learner.read(ids))
    inputs: list[Tensor] = []
    layer = of.model.model.layers[1].mlp.up_proj
    handle = layer.register_forward_hook(lambda _m, args, _out: inputs.append(args[0][0]))
    with torch.no_grad():
        of.model(torch.cat([torch.tensor([1]), ids[:-1]])[None])
    handle.remove()
    centred = inputs[0] - inputs[0].mean(dim=0)
    directions = torch.linalg.svd(centred).Vh[:2]
    with learner.active():
        a = of.model.model.layers[1].mlp.up_proj.lora_A["default"].weight.detach()  # type: ignore[index]
    assert torch.linalg.svdvals(a @ directions.T).min() > 0.99


def test_eva_that_cannot_work_says_so_and_leaves_no_hook() -> None:
    of = backbone()
    unchanged = Unchanged(of)
    learner = make("lora-eva", of, ReadSettings(window=23, chunk=2), options={"rank": 5})
    with pytest.raises(ValueError, match="takes 5 directions from the first chunk, which has 2 tokens"):
        list(learner.read(text(N)))
    unchanged()


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_lora_at_equal_parameters_is_within_half_a_rank_of_the_memory(family: str) -> None:
    of = backbone(family)
    memory = make("locas", of, READ)
    assert memory.n_parameters == memory_parameters(of.model)
    one = make("templora-tuned", of, READ, options={"rank": 1}).n_parameters
    learner = make("lora-pissa" if family == "qwen3" else "lora-eva", of, READ, options={"rank": 6})
    assert learner.n_parameters == 6 * one
    assert abs(equal_rank(of.model, memory.n_parameters) * one - memory.n_parameters) <= one / 2


def test_what_a_method_trains_is_counted() -> None:
    of = backbone()
    assert make("truncation", of, READ).n_parameters == 0
    assert make("dynamic", of, READ).n_parameters == of.n_parameters
    assert make("ffn-inplace", of, READ).n_parameters == 3 * 37 * 22
    learner = make("locas", of, READ, options={"rank": 5, "layers": "1"})
    assert learner.n_parameters == 3 * 5 * 22
    list(learner.read(text(N)))
    assert isinstance(learner, Locas)
    assert learner.bank is not None
    assert learner.bank.n_parameters == learner.n_parameters
    assert size_of(learner.tensors()) > 4 * learner.n_parameters


@pytest.mark.parametrize("name", ["truncation", "locas-recomputed"])
def test_the_context_that_is_kept_is_among_what_a_method_keeps(name: str) -> None:
    of, held = backbone(), {}
    for reuse in (False, True):
        learner = make(name, of, READ, options={**FAST.get(name, {}), "reuse": reuse})
        list(learner.read(text(N)))
        held[reuse] = size_of(learner.tensors())
    window = 11 + 11  # of 23 the start token's place is left out
    config = of.model.config
    each = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    assert held[True] - held[False] >= window * each


def test_what_a_method_does_not_use_is_not_recorded_of_it() -> None:
    of = backbone()
    other = replace(READ, fill_eps=0.5, write=replace(READ.write, lr=0.3))
    for name in LEARNERS:
        recorded = resolve(name, of, READ).record()
        assert (resolve(name, of, other).record() == recorded) == (name not in MEMORIES), name
        assert resolve(name, of, replace(READ, chunk=7)).record() != recorded, name


def test_long_attention_sees_more_and_in_the_same_chunks() -> None:
    of, ids = backbone(), text(N)
    plain, long = read("truncation", of, ids), read("attention", of, ids)
    assert [x.shape for x in plain] == [x.shape for x in long]
    torch.testing.assert_close(plain[0], long[0])
    assert not torch.equal(plain[3], long[3])
    assert resolve("attention", of, READ).read.window == 131  # all that the backbone was trained for


def test_the_memories_are_those_of_the_command_line() -> None:
    of = backbone()
    for method, preset in (("locas", "default"), ("locas-paper", "paper")):
        setup = resolve(method, of, ReadSettings(window=128))
        read = replace(PRESETS[preset].read, window=128)
        assert setup.init == PRESETS[preset].init
        assert setup.read.write == read.write
        assert setup.read.reuse == read.reuse
        assert setup.read.attention_gradient == read.attention_gradient
        assert setup.read.sizes(of.model) == read.sizes(of.model)
    # In the windows and chunks that all other methods have; and the same by options.
    shared = resolve("locas-recomputed", of, ReadSettings(window=128)).read
    assert shared == resolve("truncation", of, ReadSettings(window=128)).read
    asked = Method.parse("locas:reuse=false:damping=none:attention_gradient=full")
    assert resolve(asked.name, of, ReadSettings(window=128), asked.options).read == shared


def test_a_backbone_that_cannot_keep_its_context_is_asked_to_only_by_name() -> None:
    of = backbone("gpt2")
    assert not resolve("locas", of, READ).read.reuse
    assert resolve("locas", of, READ, {"reuse": True}).read.reuse


def test_a_backbone_whose_attention_is_its_own_gets_the_full_gradient() -> None:
    assert resolve("locas", backbone("gptj"), READ).read.attention_gradient == "full"
    assert resolve("locas", backbone(), READ).read.attention_gradient == "values"
    assert resolve("locas", backbone(), READ, {"attention_gradient": "stop"}).read.attention_gradient == "stop"


def test_a_second_document_goes_on_with_what_the_first_taught() -> None:
    of = backbone()
    for name in ("templora-tuned", "locas", "dynamic"):
        learner = make(name, of, READ, options=FAST[name])
        list(learner.read(text(N)))
        second = next(iter(learner.read(text(N, seed=5)))).nll
        fresh = next(iter(make(name, of, READ, options=FAST[name]).read(text(N, seed=5)))).nll
        assert (second - fresh).abs().max() > 1e-4


# -------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("false", False), ("False", False)])
def test_an_option_that_is_on_or_off_is_read_as_such(text: str, value: bool) -> None:
    method = Method.parse(f"truncation:reuse={text}:chunk=8")
    setup = resolve(method.name, backbone(), READ, method.options)
    assert (setup.read.reuse, setup.read.chunk, setup.init) == (value, 8, None)


def test_wrong_methods_options_and_uses_are_explained() -> None:
    of = backbone()
    with pytest.raises(ValueError, match="no method 'lora'; there are truncation, attention, locas"):
        make("lora", of, READ)
    with pytest.raises(ValueError, match="templora-tuned has no option 'momentum'; it has window, chunk, trains"):
        make("templora-tuned", of, READ, options={"momentum": 0.5})
    with pytest.raises(ValueError, match="truncation has no option 'rank'"):
        make("truncation", of, READ, options={"rank": 2})
    with pytest.raises(ValueError, match="dynamic: lr must be a positive number; got -1"):
        make("dynamic", of, READ, options={"lr": -1.0})
    with pytest.raises(ValueError, match=r"rank must be a whole number, 1 or more; got 2\.5"):
        make("lora-eva", of, READ, options={"rank": 2.5})
    with pytest.raises(ValueError, match="layers '7' do not fit"):
        make("locas", of, READ, options={"layers": 7})
    learner = make("dynamic", of, READ)
    learner.close()
    with pytest.raises(ValueError, match="dynamic was closed"):
        next(iter(learner.read(text(N))))


def test_a_rate_that_is_too_large_is_named() -> None:
    of = backbone()
    unchanged = Unchanged(of)
    with pytest.raises(FloatingPointError, match=r"dynamic diverged at learning rate 1e\+30 after 1 chunks"):
        read("dynamic", of, text(N), lr=1e30)
    with pytest.raises(FloatingPointError, match="templora-tuned diverged"):
        read("templora-tuned", of, text(N), lr=1e30)
    unchanged()


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    of = backbone()
    with pytest.raises(ValueError, match=r'pip install "locas\[peft\]"'):
        make("templora-paper", of, READ)
    make("dynamic", of, READ)


def test_a_backbone_that_is_not_all_there_is_refused() -> None:
    of = backbone()
    of.model.model.layers[0].mlp.down_proj.to("meta")
    for name in ("dynamic", "templora-paper"):
        with pytest.raises(ValueError, match="is offloaded; baselines that train weights need the whole backbone"):
            make(name, of, READ)
