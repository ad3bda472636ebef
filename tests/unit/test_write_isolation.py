"""Writing: memories never leak into one another, what fails is undone, and a saved state goes on bit for bit."""

import pytest
import torch

from helpers import same_bytes
from locas.write import Rule, Writer, WriteSettings
from writers import assert_same, both, copies, curvature, flags, gradient, live, make

# -------------------------------------------------------------------- isolation and undoing


@both
def test_memories_of_a_bank_never_leak_into_one_another(rule: Rule) -> None:
    bank = make(3)
    alone = [bank.select(i) for i in range(3)]
    settings = WriteSettings(rule, lr=0.2, damping=0.1)
    together, each = Writer(bank, settings), [Writer(one, settings) for one in alone]
    for step in range(11):
        grad = gradient(bank, step)
        active = flags(1, step % 2, step > 4)
        if step == 6:
            grad[2, 5, 1] = torch.nan
        seen = curvature(bank, step)
        failed = together.write(grad, active, seen)
        assert failed.tolist() == [False, False, step == 6]
        for i in range(3):
            own = grad[i : i + 1], active[i : i + 1], (seen[0][i : i + 1], seen[1][i : i + 1])
            assert each[i].write(*own).tolist() == [bool(failed[i])]
    for i in range(3):
        for name, tensor in live(each[i]).items():
            torch.testing.assert_close(live(together)[name][i : i + 1], tensor, rtol=1e-12, atol=1e-13)
    assert together.scale.tolist() == [1.0, 1.0, 0.5]


@both
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_scale(rule: Rule, poison: float) -> None:
    bank = make(3)
    writer = Writer(bank, WriteSettings(rule, damping=0.1))
    writer.write(gradient(bank, 0), flags(1, 1, 1), curvature(bank, 0))
    before = copies(writer)
    grad = gradient(bank, 1)
    grad[1, 17, 3] = poison
    grad[2, 0, 0] = poison
    assert writer.write(grad, flags(1, 1, 0), curvature(bank, 1)).tolist() == [False, True, False]
    after = copies(writer)
    assert after.pop("scale").tolist() == [1.0, 0.5, 1.0]
    assert_same(after, before, 1)
    assert_same(after, before, 2)
    assert not torch.equal(after["rows"][0], before["rows"][0])
    # The next step of the memory that failed is half as long.
    before = copies(writer)
    writer.write(grad := gradient(bank, 2), flags(0, 1, 1))
    full = Writer(bank.like(before["rows"], bank.tau), WriteSettings(rule, clip=False, damping=0.1))
    full.load_state({k: v for k, v in before.items() if k != "rows"} | {"scale": torch.ones(3, dtype=torch.float64)})
    full.write(grad, flags(1, 1, 1))
    half = before["rows"] + 0.5 * (full.bank.rows - before["rows"])
    half = half / half.norm(dim=-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(bank.rows[1], half[1], rtol=1e-12, atol=1e-13)


def test_a_result_that_is_not_finite_is_undone() -> None:
    bank = make(2)
    writer = Writer(bank, WriteSettings("adamw", lr=1e308, clip=False))
    bank.rows[1] = -1.7e308
    before = copies(writer)
    grad = torch.ones_like(bank.rows)
    assert writer.write(grad, flags(1, 1)).tolist() == [False, True]
    assert_same({k: v for k, v in copies(writer).items() if k != "scale"}, before, 1)


@both
def test_undo_takes_the_last_write_back_bit_for_bit(rule: Rule) -> None:
    bank = make(3)
    writer = Writer(bank, WriteSettings(rule))
    writer.write(gradient(bank, 0), flags(1, 1, 1))
    before = copies(writer)
    writer.write(gradient(bank, 1), flags(1, 1, 0))
    written = copies(writer)
    writer.undo(flags(1, 0, 0))
    after = copies(writer)
    assert after.pop("scale").tolist() == [0.5, 1.0, 1.0]
    assert_same(after, before, 0)
    assert_same(after, written, 1)
    writer.undo(flags(1, 0, 0))  # there is nothing more to take back
    assert_same({k: v for k, v in copies(writer).items() if k != "scale"}, before, 0)
    assert writer.scale.tolist() == [0.25, 1.0, 1.0]


@both
def test_undo_takes_back_the_last_write_that_happened(rule: Rule) -> None:
    """Not the attempts after it: those that failed, and those that other memories made."""
    bank = make(2)
    writer = Writer(bank, WriteSettings(rule))
    writer.write(gradient(bank, 0), flags(1, 1))
    before = copies(writer)
    writer.write(gradient(bank, 1), flags(1, 1))
    failing = gradient(bank, 2)
    failing[0] = torch.nan
    writer.write(failing, flags(1, 0))
    writer.undo(flags(1, 1))
    assert_same({k: v for k, v in copies(writer).items() if k != "scale"}, before)


@both
def test_a_share_of_a_step_moves_that_much(rule: Rule) -> None:
    bank = make(4)
    bank.rows.copy_(bank.rows[:1].expand_as(bank.rows).clone())
    before, writer = bank.rows.clone(), Writer(bank, WriteSettings(rule, lr=0.1, clip=False))
    grad = gradient(bank, 0)[:1].expand_as(bank.rows).clone()
    share = torch.tensor([1.0, 0.25, 0.0, 0.5], dtype=torch.float64)
    writer.scale[3] = 0.5
    assert not writer.write(grad, share).any()
    moved = bank.rows - before
    for memory, part in ((1, 0.25), (3, 0.25)):
        torch.testing.assert_close(moved[memory], part * moved[0], rtol=1e-12, atol=1e-14)
    assert (moved[2] == 0).all()
    assert writer.counts.tolist() == [1, 1, 0, 1]
    for moment in writer.moments:
        assert same_bytes(moment[0], moment[1])
        assert (moment[2] == 0).all()


def test_undo_before_any_write_only_halves() -> None:
    bank = make(2)
    writer = Writer(bank, WriteSettings())
    before = bank.rows.clone()
    writer.undo(flags(0, 1))
    assert same_bytes(bank.rows, before)
    assert writer.scale.tolist() == [1.0, 0.5]


# -------------------------------------------------------------------- resuming


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_state_round_trip_goes_on_bit_for_bit(rule: Rule, dtype: torch.dtype, stop: int) -> None:
    settings = WriteSettings(rule, lr=0.1)
    bank = make(2, dtype)
    writer = Writer(bank, settings)
    for step in range(stop):
        grad = gradient(bank, step)
        grad[1] = torch.nan if step == 2 else grad[1]
        writer.write(grad, flags(1, 1))
    twin = Writer(bank.clone(), settings)
    twin.write(gradient(bank, 77), flags(1, 1))  # whatever it did before is forgotten
    twin.bank.rows.copy_(bank.rows)
    twin.load_state({name: tensor.clone() for name, tensor in writer.state().items()})
    for one in (writer, twin):
        one.undo(flags(1, 0))
        for step in range(9, 12):
            one.write(gradient(bank, step), flags(1, step % 2))
    assert_same(live(writer), live(twin))
    assert set(writer.state()) == set(twin.state())
