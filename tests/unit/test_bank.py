"""Banks: reads against a loop, gradients against autograd and finite differences, layout, copies, errors."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import STANDS_FOR, fill, same_bytes, slow_read
from locas.bank import ACTIVATIONS, Bank, Variant, spread

D_MODEL, SEQ = 7, 5
RANKS = {4: 2, 1: 3, 2: 3, 7: 11}  # given out of order, on purpose
VARIANTS: list[Variant] = ["glu", "mlp"]
both = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: Variant, size: int = 1, activation: str = "silu", **more: Any) -> Bank:
    return fill(Bank(variant, activation, D_MODEL, RANKS, size=size, dtype=torch.float64, **more), seed=3)


def hidden(batch: int, seq: int = SEQ, d_model: int = D_MODEL) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return 2 * torch.randn(batch, seq, d_model, generator=generator, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * max(float(expected.abs().max()), 1e-300))


# -------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_the_one_of_transformers(name: str) -> None:
    x = torch.linspace(-9, 9, 1013, dtype=torch.float64)
    close(ACTIVATIONS[name](x), STANDS_FOR[name](x), 1e-12)


@both
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer", RANKS)
def test_read_is_the_formula(variant: Variant, activation: str, layer: int) -> None:
    one, many = make(variant, activation=activation), make(variant, 3, activation)
    close(one.read(layer, hidden(2)), slow_read(one, layer, hidden(2), [0, 0]))
    close(many.read(layer, hidden(3)), slow_read(many, layer, hidden(3), [0, 1, 2]))
    which = [2, -1, 0, 2]
    close(many.read(layer, hidden(4), torch.tensor(which)), slow_read(many, layer, hidden(4), which))
    close(one.read(layer, hidden(2), torch.tensor([-1, 0])), slow_read(one, layer, hidden(2), [-1, 0]))


@both
def test_read_multiplies_by_tau_of_its_own_layer(variant: Variant) -> None:
    bank = make(variant, 2)
    before = {layer: bank.read(layer, hidden(2)) for layer in bank.layers}
    bank.tau[1, bank.layers.index(4)] *= 3
    for layer in bank.layers:
        factor = torch.tensor([1.0, 3.0 if layer == 4 else 1.0], dtype=torch.float64)[:, None, None]
        close(bank.read(layer, hidden(2)), before[layer] * factor)


@both
def test_read_in_the_dtype_of_its_input(variant: Variant) -> None:
    bank = make(variant).to(dtype=torch.float32)
    out = bank.read(1, hidden(2).to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    # bfloat16 rounds to 3 significant digits; sums of a few terms.
    torch.testing.assert_close(out.float(), bank.read(1, hidden(2).float()), rtol=0.1, atol=0.1)


@both
def test_a_bank_of_one_reads_flat_input(variant: Variant) -> None:
    bank, a = make(variant), hidden(2)
    close(bank.read(1, a.flatten(0, 1)), bank.read(1, a).flatten(0, 1), 1e-14)


@both
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_rows_without_memory_are_exactly_zero_whatever_the_memory_holds(variant: Variant, poison: float) -> None:
    bank = make(variant, 2)
    clean = bank.read(1, hidden(3)[2:], torch.tensor([1]))
    bank.rows[0] = poison
    bank.tau[0] = poison
    out = bank.read(1, hidden(3), torch.tensor([-1, -7, 1]))
    assert same_bytes(out[:2], torch.zeros_like(out[:2]))
    close(out[2:], clean, 1e-14)


@both
def test_rows_without_memory_do_not_poison_gradients(variant: Variant) -> None:
    """Not by a memory that is not finite, nor by activations of theirs that are not."""
    bank = make(variant, 2)
    bank.rows[0] = torch.nan
    a = hidden(2).requires_grad_()
    out = bank.read(1, a, torch.tensor([-1, 1]))
    (grad,) = torch.autograd.grad(out.square().sum(), [a])
    assert grad.isfinite().all()
    assert (grad[0] == 0).all()

    bank = make(variant, 2).requires_grad_()
    a = hidden(2)
    a[0] = torch.inf
    bank.read(1, a, torch.tensor([-1, 1])).square().sum().backward(inputs=bank.leaves())
    assert bank.grad is not None
    assert bank.grad.isfinite().all()
    assert (bank.grad[0] == 0).all()


def test_index_spreads_as_beam_search_does() -> None:
    index = torch.tensor([4, -1, 2])
    assert spread(index, 3) is index
    assert spread(index, 6).tolist() == [4, 4, -1, -1, 2, 2]
    bank = make("glu", 5)
    out = bank.read(2, hidden(6), index)
    close(out, slow_read(bank, 2, hidden(6), [4, 4, -1, -1, 2, 2]))


@both
def test_a_fresh_bank_adds_nothing(variant: Variant) -> None:
    bank = Bank(variant, "silu", D_MODEL, RANKS, dtype=torch.float64)
    assert (bank.read(7, hidden(2)) == 0).all()
    assert (bank.tau == 1).all()


@both
def test_operands_are_made_once_and_anew_after_every_change(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, index, made = make(variant, 3), torch.tensor([2, -1, 0]), []
    operands = Bank._operands
    monkeypatch.setattr(
        Bank, "_operands", lambda self, *args, **more: (made.append(1), operands(self, *args, **more))[1]
    )

    def read(a: Tensor, by: Tensor | None, which: list[int]) -> int:
        """How often operands are made in two reads, which must be right."""
        made.clear()
        expected = slow_read(bank, 1, a, which)
        for _ in range(2):
            close(bank.read(1, a, by), expected)
        return len(made)

    with torch.no_grad():
        assert read(hidden(3), index, [2, -1, 0]) == 1
        assert read(hidden(3), index, [2, -1, 0]) == 0
        assert read(hidden(3)[:, :1], index, [2, -1, 0]) == 0
        assert read(hidden(6), index, [2, 2, -1, -1, 0, 0]) == 1
        bank.rows.mul_(1.5)
        assert read(hidden(6), index, [2, 2, -1, -1, 0, 0]) == 1
        bank.tau.mul_(1.5)
        assert read(hidden(6), index, [2, 2, -1, -1, 0, 0]) == 1
        index[1] = 1
        assert read(hidden(6), index, [2, 2, 1, 1, 0, 0]) == 1
        assert read(hidden(6), index.clone(), [2, 2, 1, 1, 0, 0]) == 1
        assert read(hidden(3), None, [0, 1, 2]) == 1
        with pytest.raises(ValueError, match="a batch of 2 rows cannot read a bank of 3 memories"):
            bank.read(1, hidden(2))
    assert read(hidden(3), index, [2, 1, 0]) == 2  # with gradients on nothing is kept


@both
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_that_read_one_memory_share_it(variant: Variant, activation: str) -> None:
    """Fetched once, not once a row; rows without memory get exactly nothing, and whatever they hold stays theirs."""
    many, one, a = make(variant, 3, activation), make(variant, 1, activation), hidden(6)
    a[1] = torch.nan
    onto = hidden(6).flip(0)
    with torch.no_grad():
        for bank, which in ((many, [2, -1, 2]), (one, [0, -1, 0])):
            out = bank.read(1, a, torch.tensor(which), onto)
            assert bank._prepared[1][2].keys.ndim == 2
            rows = [which[i // 2] for i in range(6)]
            present = [i for i, memory in enumerate(rows) if memory >= 0]
            close(out[2:4], onto[2:4], 0)
            if 1 in present:
                assert out[1].isnan().all()
            fine = [i for i in present if i != 1]
            close(out[fine], onto[fine] + slow_read(bank, 1, a[fine], [rows[i] for i in fine]))


@both
def test_a_memory_that_is_not_finite_is_not_shared_with_rows_without(variant: Variant) -> None:
    bank = make(variant, 2)
    bank.rows[1, -1] = torch.inf  # a value of the last layer
    with torch.no_grad():
        out = bank.read(7, hidden(3), torch.tensor([1, -1, 1]))
        assert bank._prepared[7][2].keys.ndim == 3
        assert same_bytes(out[1], torch.zeros_like(out[1]))
        assert not out[0].isfinite().all()


@both
def test_tau_is_rounded_once(variant: Variant) -> None:
    """Where a read is kept, tau goes into the values before they become bfloat16."""
    bank = make(variant).to(dtype=torch.float32)
    bank.tau.fill_(1 + 2**-7 + 2**-9)  # not a bfloat16
    with torch.no_grad():
        slots, a = bank.slots(1), hidden(1, 1).to(torch.bfloat16)
        keys = slots.k if slots.g is None else torch.cat([slots.g, slots.k], dim=1)
        values = (slots.v * bank.tau[:, 0, None, None]).to(torch.bfloat16)
        expected = bank._gate(a @ keys.to(torch.bfloat16).mT) @ values
        assert same_bytes(bank.read(1, a), expected)


# -------------------------------------------------------------------- gradients


def loss_of(out: Tensor) -> Tensor:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (out * weights).sum() + out.square().sum()


@both
@pytest.mark.parametrize("which", [None, [1, -1, 1, 0, 2], [2, 2, 2], [-1, -1]])
@pytest.mark.parametrize("activation", ["silu", "gelu_new", "relu2"])
def test_gradients_equal_those_of_the_formula(variant: Variant, which: list[int] | None, activation: str) -> None:
    bank = make(variant, 3, activation).requires_grad_()
    rows = [0, 1, 2] if which is None else which
    index = None if which is None else torch.tensor(which)
    a = hidden(len(rows)).requires_grad_()

    reference = make(variant, 3, activation)
    reference.rows.requires_grad_(True)  # slots are then views within the graph
    expected = loss_of(slow_read(reference, 4, a, rows)) + loss_of(slow_read(reference, 1, a, rows))
    expected_grads = torch.autograd.grad(expected, [a, reference.rows], allow_unused=True, materialize_grads=True)

    loss = loss_of(bank.read(4, a, index)) + loss_of(bank.read(1, a, index))
    (grad_a,) = torch.autograd.grad(loss, [a], retain_graph=True)
    loss.backward(inputs=bank.leaves())
    assert bank.grad is not None
    close(grad_a, expected_grads[0])
    close(bank.grad, expected_grads[1])
    for memory in set(range(3)) - set(rows):
        assert (bank.grad[memory] == 0).all()


@both
@pytest.mark.parametrize("size", [1, 2])
def test_gradients_equal_finite_differences(variant: Variant, size: int) -> None:
    bank = fill(Bank(variant, "gelu_bloom", 3, {1: 2}, size=size, dtype=torch.float64), seed=1).requires_grad_()
    a = hidden(3, 2, 3).requires_grad_()
    index = torch.tensor([size - 1, -1, 0])
    # gradcheck moves the leaves in place: they are views of the bank's rows, so that its reads see it.
    assert torch.autograd.gradcheck(lambda a, *_: bank.read(1, a, index), (a, *bank.leaves()))


@both
def test_grad_is_filled_in_place_and_accumulates(variant: Variant) -> None:
    bank = make(variant, 2).requires_grad_()
    grad = bank.grad
    assert grad is not None
    for _ in range(2):
        bank.read(2, hidden(2)).sum().backward(inputs=bank.leaves())
    assert bank.grad is grad
    twice = grad.clone()
    grad.zero_()
    bank.read(2, hidden(2)).sum().backward(inputs=bank.leaves())
    close(twice, 2 * grad)
    assert sum(leaf.numel() for leaf in bank.leaves()) == bank.rows.numel()
    assert all(leaf.is_leaf and leaf.untyped_storage().data_ptr() == bank.rows.data_ptr() for leaf in bank.leaves())


def test_the_gradients_sum_is_made_when_it_is_needed() -> None:
    bank = make("glu").requires_grad_()
    bank.read(1, hidden(1)).sum().backward(inputs=bank.leaves()[:2])
    first = bank.grad
    assert first is not None
    assert first.abs().max() > 0
    bank.requires_grad_()  # anew: what was there is gone
    assert bank.grad is not None
    assert bank.grad.abs().max() == 0


def test_gradients_can_be_turned_off() -> None:
    bank = make("glu")
    assert bank.requires_grad_() is bank
    assert bank.read(1, hidden(1)).requires_grad
    bank.requires_grad_(False)
    assert bank.grad is None
    assert not bank.read(1, hidden(1)).requires_grad
    bank.rows.mul_(2)  # and a plain change is seen by the next read
    close(bank.read(1, hidden(1)), slow_read(bank, 1, hidden(1), [0]))


def test_changes_of_rows_are_seen_by_reads_with_gradients_on() -> None:
    bank = make("mlp", 2).requires_grad_()
    with torch.no_grad():
        bank.rows.mul_(0.5)
    close(bank.read(1, hidden(2)), slow_read(bank, 1, hidden(2), [0, 1]))


# -------------------------------------------------------------------- rows


def test_clip_rows_cuts_long_rows_and_leaves_short_ones_bit_for_bit() -> None:
    bank = make("glu", 3)
    bank.rows[:, ::2] *= 4
    bank.rows[1, 3] = 0
    before = bank.rows.clone()
    lengths = before.norm(dim=-1)
    assert (lengths > 1).any()
    assert (lengths < 1).any()
    bank.clip_rows()
    short = lengths <= 1
    assert same_bytes(bank.rows[short], before[short])
    close(bank.rows[~short], before[~short] / lengths[~short, None], 1e-15)
    bank.clip_rows(0.25)
    close(bank.rows.norm(dim=-1), lengths.clamp(max=0.25), 1e-14)


@both
def test_slots_are_views_in_the_documented_order(variant: Variant) -> None:
    bank, parts = make(variant, 2), 3 if variant == "glu" else 2
    assert bank.layers == (1, 2, 4, 7)
    assert bank.rows.shape == (2, parts * 19, D_MODEL)
    assert bank.tau.shape == (2, 4)
    assert bank.n_parameters == parts * 19 * D_MODEL
    start = 0
    for layer in bank.layers:
        slots = bank.slots(layer)
        for part in ([slots.g] if variant == "glu" else []) + [slots.k, slots.v]:
            assert part is not None
            assert torch.equal(part, bank.rows[:, start : start + RANKS[layer]])
            assert part.untyped_storage().data_ptr() == bank.rows.data_ptr()
            start += RANKS[layer]
    assert (bank.slots(1).g is None) == (variant == "mlp")


@both
def test_runs_join_equal_neighbours_and_cover_every_row_once(variant: Variant) -> None:
    bank, parts = make(variant), 3 if variant == "glu" else 2
    runs = list(bank.runs())
    assert [rank for _, rank in runs] == [3, 2, 11]
    assert [(r.start, r.stop) for r, _ in runs] == [
        (0, 6 * parts),
        (6 * parts, 8 * parts),
        (8 * parts, 19 * parts),
    ]
    even = Bank(variant, "silu", D_MODEL, {0: 2, 3: 2, 4: 2})
    assert list(even.runs()) == [(slice(0, 6 * parts), 2)]
    back = Bank(variant, "silu", D_MODEL, {0: 2, 1: 5, 2: 2})  # equal, but no neighbours
    assert [rank for _, rank in back.runs()] == [2, 5, 2]


# -------------------------------------------------------------------- copies


def test_copies_share_nothing() -> None:
    bank = make("glu", 3)
    for copy in (bank.clone(), bank.like(bank.rows, bank.tau), bank.to(), bank.to(dtype=torch.float64)):
        assert copy.layout() == bank.layout()
        assert same_bytes(copy.rows, bank.rows)
        assert same_bytes(copy.tau, bank.tau)
        copy.rows.zero_()
        copy.tau.zero_()
        assert bank.rows.abs().min() > 0
        assert bank.tau.min() > 0
    assert bank.to("cpu", torch.float32).rows.dtype == bank.to(dtype=torch.float32).tau.dtype == torch.float32


def test_select_and_stack_are_inverse() -> None:
    bank = make("mlp", 3)
    ones = [bank.select(i) for i in range(3)]
    assert [one.size for one in ones] == [1, 1, 1]
    assert same_bytes(ones[1].rows, bank.rows[1:2])
    assert same_bytes(ones[2].tau, bank.tau[2:])
    again = Bank.stack(ones)
    assert same_bytes(again.rows, bank.rows)
    assert same_bytes(again.tau, bank.tau)
    assert Bank.stack([bank, ones[0]]).size == 4
    assert same_bytes(Bank.stack([bank, ones[0]]).rows[3:], bank.rows[:1])


def test_repr_shows_the_layout() -> None:
    assert repr(make("glu")) == "Bank(glu, silu, d_model=7, rank=2-11, layers=[1, 2, 4, 7], size=1)"
    assert repr(Bank("mlp", "relu", 5, {3: 2}, size=4)) == "Bank(mlp, relu, d_model=5, rank=2, layers=[3], size=4)"


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gru", "silu", 7, {0: 1}, 1), "variant 'gru' is not one of glu, mlp"),
        (
            ("glu", "tanh", 7, {0: 1}, 1),
            "activation 'tanh' is not one of silu, relu, relu2, gelu, gelu_pytorch_tanh, gelu_new, gelu_fast, "
            "gelu_bloom",
        ),
        (("glu", "silu", 7, {}, 1), "a memory needs at least one layer"),
        (("glu", "silu", 7, {0: 1, 1: 0}, 1), "layers must be 0 or more and ranks 1 or more; got {1: 0}"),
        (("glu", "silu", 7, {-1: 2}, 1), "layers must be 0 or more and ranks 1 or more; got {-1: 2}"),
        (("glu", "silu", 0, {0: 1}, 1), "d_model and the bank's size must be 1 or more; got 0 and 1"),
        (("glu", "silu", 7, {0: 1}, 0), "d_model and the bank's size must be 1 or more; got 7 and 0"),
    ],
)
def test_errors_of_making_a_bank(arguments: Any, message: str) -> None:
    *rest, size = arguments
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Bank(*rest, size=size)


def test_errors_of_using_a_bank() -> None:
    bank = make("glu", 3)
    with pytest.raises(ValueError, match=r"^memory 3 asked for, but the bank holds 0\.\.2$"):
        bank.select(3)
    with pytest.raises(ValueError, match=r"^memory -1 asked for"):
        bank.select(-1)
    message = (
        "a batch of 2 rows cannot read a bank of 3 memories one to one; pass an index that says which memory each "
        "row reads (-1: none)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bank.read(1, hidden(2))
    message = "the index names a memory for (2,) rows, but the batch has 3; give one entry for each row of the batch"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bank.read(1, hidden(3), torch.tensor([0, 1]))
    for index in (torch.tensor([[0, 1]]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 1, 2, 0])):
        with pytest.raises(ValueError, match="the index names a memory for"):
            bank.read(1, hidden(2), index)
    with pytest.raises(ValueError, match=r"^only memories of one layout fit into one bank: \('mlp', "):
        Bank.stack([bank, make("mlp")])
