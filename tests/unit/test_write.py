"""Write rules: against torch's AdamW, a plain Newton-Schulz and the SVD; steps, curvature, settings."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import same_bytes
from locas.bank import Variant
from locas.write import Rule, Writer, WriteSettings, orthogonalise
from writers import CONSTANT, D_MODEL, RANKS, both, curvature, flags, gradient, make

# -------------------------------------------------------------------- the rules


@pytest.mark.parametrize("clip", [False, True])
def test_adamw_is_torchs_without_decay_memory_by_memory(clip: bool) -> None:
    settings = WriteSettings("adamw", lr=0.03, beta1=0.83, beta2=0.97, eps=1e-3, clip=clip, **CONSTANT)
    bank = make(3)
    writer = Writer(bank, settings)
    ours, theirs = [], []
    for i in range(3):
        ours.append(bank.rows[i].clone().requires_grad_())
        theirs.append(
            torch.optim.AdamW([ours[i]], lr=0.03, betas=(0.83, 0.97), eps=1e-3, weight_decay=0.0, foreach=False)
        )
    for step in range(41):
        grad = gradient(bank, step, scale=10.0 ** (step % 5 - 3))
        active = flags(1, step % 3 > 0, step > 17)
        assert not writer.write(grad, active).any()
        for i in range(3):
            if active[i]:
                ours[i].grad = grad[i].clone()
                theirs[i].step()
                if clip:
                    with torch.no_grad():
                        ours[i] /= ours[i].norm(dim=-1, keepdim=True).clamp(min=1.0)
    assert writer.counts.tolist() == [41, 27, 23]
    for i in range(3):
        torch.testing.assert_close(bank.rows[i], ours[i].detach(), rtol=1e-12, atol=1e-13)


def test_adamw_in_float32_corrects_its_bias_in_full_precision() -> None:
    """1 - beta2 ** t, rounded to float32 before the subtraction, would be wrong in the fifth digit."""
    settings = WriteSettings("adamw", lr=1.0, clip=False, eps=1e-30, **CONSTANT)
    bank = make(dtype=torch.float32)
    bank.rows.zero_()
    Writer(bank, settings).write(gradient(bank, 0), flags(1))
    torch.testing.assert_close(bank.rows.abs(), torch.ones_like(bank.rows), rtol=1e-6, atol=0)


def plain_newton_schulz(x: Tensor) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


@pytest.mark.parametrize("shape", [(3, 11), (11, 3), (5, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("scale", [1e-150, 1e-9, 1.0, 1e9, 1e150])
def test_orthogonalise_is_newton_schulz(shape: tuple[int, int], scale: float) -> None:
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = torch.stack([plain_newton_schulz(m) for m in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(orthogonalise(scale * x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 13), (13, 5), (5, 5)])
def test_orthogonalise_approaches_the_svds_rotation(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    s = torch.tensor([1.0, 0.6, 0.3, 0.1, 0.03], dtype=torch.float64)
    inner = u.T @ orthogonalise(u @ torch.diag(s) @ vt) @ vt.T  # diagonal: the same singular vectors
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-10)
    assert inner.diagonal().min() > 0.65
    assert inner.diagonal().max() < 1.25


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-25, 1e-20, 1e20, 1e30])
def test_orthogonalise_knows_no_scale_in_float32(scale: float) -> None:
    """Squares of such entries leave float32's range; a memory's momentum gets there when its gradients fade."""
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    tolerance = 1e-1 if scale < 1e-37 else 1e-4  # subnormal numbers have few digits
    torch.testing.assert_close(orthogonalise(scale * x), orthogonalise(x), rtol=0, atol=tolerance)


def test_orthogonalise_leaves_zero_and_its_neighbours_alone() -> None:
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] = 0
    x[2, 3] = 0
    out = orthogonalise(x)
    assert (out[1] == 0).all()
    assert (out[2, 3] == 0).all()  # an empty slot stays empty
    torch.testing.assert_close(out[0], orthogonalise(x[0]), rtol=1e-12, atol=1e-12)


def test_muon_is_the_formula_matrix_by_matrix() -> None:
    bank, settings = make(2), WriteSettings("muon", lr=0.07, momentum=0.6, clip=False, **CONSTANT)
    writer, expected = Writer(bank, settings), bank.rows.clone()
    velocity = torch.zeros_like(expected)
    for step in range(5):
        grad = gradient(bank, step)
        velocity = 0.6 * velocity + grad
        ahead = bank.like(grad + 0.6 * velocity, bank.tau)
        moved = bank.like(torch.zeros_like(grad), bank.tau)
        for layer, rank in RANKS.items():
            stretch = max(1.0, rank / D_MODEL) ** 0.5
            source, target = ahead.slots(layer), moved.slots(layer)
            for part, out in ((source.k, target.k), (source.g, target.g), (source.v, target.v)):
                assert part is not None
                assert out is not None
                for i in range(2):
                    out[i] = 0.07 * stretch * plain_newton_schulz(part[i])
        expected -= moved.rows
        writer.write(grad, flags(1, 1))
    torch.testing.assert_close(bank.rows, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [2, 7, 23])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_muon_moves_rows_by_about_lr(rank: int, scale: float) -> None:
    bank = make(ranks={0: rank, 1: rank})
    before = bank.rows.clone()
    Writer(bank, WriteSettings("muon", lr=0.01, clip=False)).write(gradient(bank, 0, scale), flags(1))
    moved = (bank.rows - before).norm(dim=-1)
    # Newton-Schulz brings singular values to 0.7 .. 1.2; rows of a tall matrix are that long on average only.
    mean = moved.square().mean().sqrt() / 0.01
    assert 0.65 < mean < 1.25
    if rank <= D_MODEL:
        assert moved.min() > 0.65 * 0.01
        assert moved.max() < 1.25 * 0.01


@both
def test_a_step_goes_against_the_gradient_and_clips(rule: Rule) -> None:
    bank = make()
    bank.rows.div_(bank.rows.norm(dim=-1, keepdim=True))
    loose = bank.clone()
    grad = -loose.rows  # away from zero: every row gets longer
    before = bank.rows.clone()
    Writer(bank, WriteSettings(rule, lr=0.5)).write(grad, flags(1))
    Writer(loose, WriteSettings(rule, lr=0.5, clip=False)).write(grad, flags(1))
    assert ((loose.rows - before) * grad).sum() < 0
    assert loose.rows.norm(dim=-1).max() > 1
    assert bank.rows.norm(dim=-1).max() <= 1 + 1e-12
    loose.clip_rows()
    assert same_bytes(loose.rows, bank.rows)


# -------------------------------------------------------------------- the schedule of steps


def test_the_step_falls_with_the_root_of_the_number_of_updates() -> None:
    settings = WriteSettings(hold=4, floor=0.25)
    numbers = torch.tensor([0, 1, 3, 15, 63, 64, 10_000])
    assert settings.schedule(numbers).tolist() == [1.0, 1.0, 1.0, 0.5, 0.25, 0.25, 0.25]
    constant = WriteSettings(**CONSTANT)
    assert constant.schedule(numbers).tolist() == [1.0] * 7


@both
def test_every_memorys_step_follows_the_schedule(rule: Rule) -> None:
    bank = make(2)
    reference = bank.clone()
    writer = Writer(bank, WriteSettings(rule, lr=1e-3, clip=False, hold=3, floor=0.5))
    plain = Writer(reference, WriteSettings(rule, lr=1e-3, clip=False, **CONSTANT))
    for number in range(30):
        before, before_plain = bank.rows.clone(), reference.rows.clone()
        grad = gradient(bank, number)
        for one in (writer, plain):
            one.write(grad, flags(1, number % 2))
        moved, moved_plain = bank.rows - before, reference.rows - before_plain
        for i, made in enumerate((number, number // 2)):
            factor = min(1.0, max(0.5, (3 / (made + 1)) ** 0.5))
            torch.testing.assert_close(moved[i], factor * moved_plain[i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hold": 0}, "hold must be 1 update or more; got 0"),
        ({"floor": 0.0}, "floor must be above 0"),
        ({"floor": 1.5}, "floor must be above 0"),
    ],
)
def test_schedules_out_of_range(more: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WriteSettings(**more)


# -------------------------------------------------------------------- curvature


def root(c: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(c)
    return (vectors * values**power) @ vectors.mT


@pytest.mark.parametrize("shape", [(5, 12), (12, 12), (14, 12)])
def test_with_a_metric_a_matrix_is_orthogonal_where_the_metric_is_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    half = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    c = half @ half.T + 0.5 * torch.eye(12, dtype=torch.float64)
    found = orthogonalise(x, x @ torch.linalg.inv(c))
    inside = orthogonalise(x @ root(c, -0.5))
    expected = inside @ root(c, -0.5)
    expected *= inside.norm(dim=(-2, -1), keepdim=True) / expected.norm(dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    # A metric without direction is none, whatever its size.
    torch.testing.assert_close(orthogonalise(x, 1e-9 * x), orthogonalise(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_with_a_metric_nothing_depends_on_the_gradients_scale(scale: float) -> None:
    x = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(1))
    dual = x @ torch.diag(torch.linspace(0.1, 2, 9))
    for one, other in ((scale * x, scale * dual), (x, scale * dual)):
        torch.testing.assert_close(orthogonalise(one, other), orthogonalise(x, dual), rtol=0, atol=1e-4)
    x[0], dual[0] = 0, 0
    assert not orthogonalise(x, dual)[0].any()


@pytest.mark.parametrize("variant", ["glu", "mlp"])
def test_values_move_less_where_the_loss_is_curved_and_reads_as_ever(variant: Variant) -> None:
    bank = make(variant=variant)
    plain = bank.clone()
    grad = gradient(bank, 0)
    steep = torch.ones(bank.d_model, dtype=torch.float64)
    steep[0] = 200.0
    seen = 1e6 * torch.diag(steep / steep.mean())[None]
    tokens = torch.tensor([1e6], dtype=torch.float64)
    Writer(bank, WriteSettings(lr=0.01, clip=False, damping=0.1)).write(
        grad, flags(1), (seen.to(bank.rows.dtype), tokens)
    )
    Writer(plain, WriteSettings(lr=0.01, clip=False)).write(grad, flags(1))
    for layer in bank.layers:
        one, other = bank.slots(layer), plain.slots(layer)
        assert same_bytes(one.k, other.k)
        assert one.g is None or (other.g is not None and same_bytes(one.g, other.g))
    fresh = make(variant=variant)
    moved = [torch.cat([(b.slots(i).v - fresh.slots(i).v)[0] for i in b.layers]) for b in (bank, plain)]
    assert float(moved[0][:, 0].norm()) < 0.2 * float(moved[1][:, 0].norm())
    torch.testing.assert_close(moved[0].norm(), moved[1].norm(), rtol=0.1, atol=0)


def test_little_text_says_little_of_the_curvature() -> None:
    """With the curvature of a few tokens, values move nearly as without: it counts beside 4 tokens a dimension."""
    moved = []
    for tokens in (0.0, 1.0, 1e6):
        bank = make(1)
        seen = curvature(bank, 0, tokens) if tokens else None
        Writer(bank, WriteSettings(lr=0.01, clip=False, damping=0.1)).write(gradient(bank, 0), flags(1), seen)
        moved.append(bank.rows - make(1).rows)
    few, many = (float((x - moved[0]).norm() / moved[0].norm()) for x in moved[1:])
    assert 0 < few < 0.1 < many


def test_the_metric_is_the_inverse_of_what_was_seen_when_it_was_made_anew() -> None:
    bank = make(2)
    writer = Writer(bank, WriteSettings(lr=0.01, damping=0.1))
    seen = [curvature(bank, i, 400.0) for i in range(3)]
    for number, renew in enumerate((True, False, False)):
        writer.write(gradient(bank, number), flags(1, 1), seen[number], renew)
    evenly = (4 * bank.d_model + 0.1 * 400) * torch.eye(bank.d_model, dtype=torch.float64)
    expected = torch.linalg.inv(seen[0][0] + evenly)
    torch.testing.assert_close(writer.inverse, expected, rtol=1e-10, atol=1e-14)
    # What was gathered meanwhile counts at the next renewal, and only then.
    twin = Writer(bank.clone(), writer.settings)
    twin.load_state(writer.state())
    before = bank.rows.clone()
    writer.write(gradient(bank, 5), flags(1, 1), None, False)
    twin.write(gradient(bank, 5), flags(1, 1), None, True)
    evenly = (4 * bank.d_model + 0.1 * 1200) * torch.eye(bank.d_model, dtype=torch.float64)
    torch.testing.assert_close(twin.inverse, torch.linalg.inv(sum(c for c, _ in seen) + evenly), rtol=1e-10, atol=1e-14)
    moved = [w.bank.rows - before for w in (writer, twin)]
    assert 1e-3 < float((moved[0] - moved[1]).norm() / moved[0].norm()) < 0.5


def test_when_the_metric_is_made_anew() -> None:
    often = WriteSettings(damping=0.1, damping_every=1)
    assert all(often.renews(chunk) for chunk in range(50))
    due = [chunk for chunk in range(40) if WriteSettings(damping=0.1, damping_every=8).renews(chunk)]
    assert due == [*range(16), 16, 24, 32]
    with pytest.raises(ValueError, match="damping_every must be 1"):
        WriteSettings(damping_every=0)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("inf"), float("nan")])
def test_damping_out_of_range(damping: float) -> None:
    with pytest.raises(ValueError, match="damping must be a positive number, or none"):
        WriteSettings(damping=damping)


# -------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "sgd"}, "write rule 'sgd' is not one of muon, adamw"),
        ({"lr": 0.0}, "lr must be a positive number; got 0.0"),
        ({"lr": -1.0}, "lr must be a positive number; got -1.0"),
        ({"lr": float("nan")}, "lr must be a positive number; got nan"),
        ({"lr": float("inf")}, "lr must be a positive number; got inf"),
        ({"momentum": 1.0}, "momentum must be in [0, 1); got 1.0"),
        ({"beta1": -0.1}, "beta1 must be in [0, 1); got -0.1"),
        ({"beta2": float("nan")}, "beta2 must be in [0, 1); got nan"),
        ({"eps": 0.0}, "eps must be positive; got 0.0"),
    ],
)
def test_errors_of_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        WriteSettings(**arguments)


class NothingFromTheHost(TorchDispatchMode):
    """Refuses what a capture would: a copy between the host and the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, made)) if isinstance(t, Tensor) and t.ndim > 0}
        assert len(devices) <= 1, func
        return made


@pytest.mark.parametrize("renew", [False, True])
@both
def test_a_write_that_is_captured_stays_on_the_device(rule: Rule, renew: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without numbers stand in for a GPU's."""
    for module in ("locas.write.is_captured", "locas.cuda.is_captured"):
        monkeypatch.setattr(module, lambda: True)
    bank = make(size=2, dtype=torch.float32).to("meta")
    writer = Writer(bank, WriteSettings(rule=rule, damping=0.1))
    writer.pin()
    share = torch.ones(2, dtype=torch.float64, device="meta")
    curvature = (torch.ones(2, D_MODEL, D_MODEL, device="meta"), share * 5) if rule == "muon" else None
    with NothingFromTheHost():
        failed = writer.write(torch.ones_like(bank.rows), share, curvature, renew)
    assert failed.device.type == "meta"
    assert failed.shape == (2,)
