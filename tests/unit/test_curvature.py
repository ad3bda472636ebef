"""The loss's curvature at the FFNs' outputs: against gradients taken one position at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import tiny_model
from helpers import START, fresh, memory_for, text
from locas.attach import attached
from locas.bank import Bank
from locas.curvature import Curvature
from locas.forward import frozen, token_nll
from locas.sites import find_sites
from locas.stream import Reader, ReadSettings
from locas.write import WriteSettings
from readings import READ

FAMILIES = ["qwen2", "gemma2", "gpt2", "opt", "gptj", "mixtral"]
TOKENS = 9


def model_of(name: str) -> nn.Module:
    return tiny_model(name).double().eval()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return token_nll(model(input_ids=ids[:, :-1]).logits, ids[:, 1:]).mean(dim=1)


def expected(model: nn.Module, bank: Bank, ids: Tensor, stride: int = 1) -> Tensor:
    """[rows, d, d] by adding a nudge to every FFN's output, and differentiating with respect to it."""
    nudges: dict[int, Tensor] = {}

    def nudge(layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            main, *rest = output if isinstance(output, tuple) else (output,)
            nudges[layer] = torch.zeros_like(main, requires_grad=True)
            return (main + nudges[layer], *rest) if rest else main + nudges[layer]

        return hook

    sites = find_sites(model, bank.layers)
    index = list(range(len(ids)))
    with attached(model, bank, index):
        handles = [site.exit.register_forward_hook(nudge(layer)) for layer, site in sites.items()]
        gradients = torch.autograd.grad(loss_of(model, ids).sum(), [nudges[i] for i in sites])
        for handle in handles:
            handle.remove()
    total = torch.zeros(len(ids), bank.d_model, bank.d_model, dtype=torch.float64)
    for gradient in gradients:
        for row, of_row in enumerate(gradient.reshape(len(ids), -1, bank.d_model)):
            outer = sum((torch.outer(g, g) for g in of_row[::stride]), torch.zeros(()))
            total[row] += outer / outer.trace() * bank.d_model / len(gradients)
    return total


@pytest.mark.parametrize(("name", "stride"), [*((name, 1) for name in FAMILIES), ("qwen2", 4), ("opt", 2)])
def test_it_is_the_second_moment_of_the_gradient_at_the_outputs(name: str, stride: int) -> None:
    model = model_of(name)
    bank = memory_for(model, size=2)
    ids = torch.stack([text(TOKENS + 1, seed) for seed in (1, 2)])
    wanted = expected(model, bank, ids, stride)
    curvature = Curvature(bank, find_sites(model, bank.layers), stride)
    bank.requires_grad_()
    with frozen(model), attached(model, bank, [0, 1]), curvature.watching([0, 1]):
        loss_of(model, ids).sum().backward(inputs=bank.leaves())  # no one asked
        assert not curvature.take(torch.ones(2))[0].any()
        losses = loss_of(model, ids)
        with curvature.gathering():
            losses.sum().backward(inputs=bank.leaves())
    moments, tokens = curvature.take(torch.tensor([TOKENS, 2]))
    assert tokens.tolist() == [TOKENS, 2]
    torch.testing.assert_close(moments[0], TOKENS * wanted[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments[1], 2 * wanted[1], rtol=1e-9, atol=1e-9)
    assert not [hook for module in model.modules() for hook in module._forward_hooks.values()]


def test_a_memory_that_reads_nothing_has_none() -> None:
    model = model_of("qwen2")
    bank = memory_for(model, size=3)
    curvature = Curvature(bank, find_sites(model))
    ids = torch.stack([text(TOKENS, seed) for seed in (1, 2)])
    bank.requires_grad_()
    with frozen(model), attached(model, bank, [2, 0]), curvature.watching([2, 0]):
        weights = torch.tensor([0.0, 1.0], dtype=torch.float64)  # row 0, which reads memory 2, counts nothing
        with curvature.gathering():
            (loss_of(model, ids) * weights).sum().backward(inputs=bank.leaves())
    moments, _ = curvature.take(torch.full((3,), 5))
    assert [bool(x.any()) for x in moments] == [True, False, False]
    assert float(moments[0].trace()) == pytest.approx(5 * bank.d_model)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_reader_gathers_it_over_all_that_it_has_learnt_from(name: str) -> None:
    model = model_of(name)
    bank = fresh(model, name)
    reader = Reader(model, bank, [text(36)], READ, start_id=START)
    traces = []
    for _ in reader:
        assert reader.writer is not None
        assert reader.writer.curvature is not None
        traces.append(float(reader.writer.curvature[0].trace()) / bank.d_model)
        assert float(reader.writer.seen[0]) == pytest.approx(traces[-1])
    # 36 tokens in chunks of 7. A step-wise memory fills its five slots from the first chunk, which is no gradient step.
    learnt = [7, 14, 21, 28, 35, 36]
    assert traces == pytest.approx(learnt if name == "qwen2" else [n - 7 for n in learnt])


def test_unless_asked_for_and_with_adamw_nothing_is_gathered() -> None:
    model = model_of("qwen2")
    for write in (WriteSettings(), WriteSettings("adamw", damping=0.1)):
        reader = Reader(model, fresh(model, "qwen2"), [text(20)], ReadSettings(window=17, chunk=7, write=write))
        reader.next_chunk()
        assert reader.writer is not None
        assert reader.writer.curvature is None
        assert not any("curvature" in name for name in reader.state())


@pytest.mark.parametrize(("chunk", "stride"), [(7, 1), (127, 1), (128, 2), (256, 4), (512, 8), (1024, 8)])
def test_a_chunk_is_sampled_at_eight_tokens_apart_at_most_and_64_tokens_at_least(chunk: int, stride: int) -> None:
    model: Any = model_of("qwen2")
    model.config.max_position_embeddings = 4096
    settings = ReadSettings(window=chunk + 8, chunk=chunk, write=READ.write)
    reader = Reader(model, fresh(model, "qwen2"), [text(20)], settings, start_id=START)
    assert reader._curvature is not None
    assert reader._curvature.stride == stride


def test_reading_renews_the_metric_as_its_settings_say() -> None:
    """Chunks 0 to 3 and every second one; the number counts from where the reading begins."""
    model = model_of("qwen2")
    for first in (0, 5):
        bank = fresh(model, "qwen2")
        reader = Reader(model, bank, [text(70)], READ, start_id=START, first_token=first)
        changed = []
        while not reader.done:
            assert reader.writer is not None
            assert reader.writer.inverse is not None
            before = reader.writer.inverse.clone()
            reader.next_chunk()
            changed.append(not torch.equal(reader.writer.inverse, before))
        assert changed == [i < 4 or i % 2 == 0 for i in range(len(changed))]
