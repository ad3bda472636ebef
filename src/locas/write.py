"""Write rules: how a gradient becomes a change of a memory's rows.

Two rules, chosen by name. Both work on a whole bank at once, `[bank, n_rows, d_model]`; memories never mix, each
has its own step count, step scale and active flag, so that documents side by side are read as if alone. Frozen slots
stay bit-identical, and the others are written as if the frozen ones were not there: their gradients are zeroed before
a rule sees them, and zero rows have no part in orthogonalisation.

* `adamw`: Adam without weight decay; `lr` is about an entry's change.
* `muon`: momentum, then orthogonalisation of each [rank, d_model] matrix (Newton-Schulz); `lr` is the length
  by which a row moves, whatever d_model is. Values are orthogonalised in the metric of the loss's curvature where they
  write (`curvature.py`): they move less along what every text's predictions hang on, and more along the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from locas.bank import Bank
from locas.cuda import is_captured, perhaps

Rule = Literal["muon", "adamw"]

# Coefficients of the quintic Newton-Schulz iteration of Muon (K. Jordan, 2024): singular values land in about
# [0.7, 1.2] after five rounds, whatever they were, as long as they are not vanishingly small.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
PRIOR_TOKENS = 4.0  # for each dimension, see `Writer._metric`


@dataclass(frozen=True)
class WriteSettings:
    """How one gradient step changes the memory.

    Attributes:
        rule: "muon" (orthogonalised momentum) or "adamw".
        lr: the learning rate. muon: the length by which a row moves; adamw: about an entry's change.
        hold: the first so many updates are made at `lr`; after them update n (from 0) is made at
            max(floor, sqrt(hold / (n + 1))) times `lr`.
        floor: see `hold`. 1: the same step throughout.
        momentum: muon's decay of past gradients.
        damping: muon: move values in the metric of the loss's curvature at the FFNs' outputs, to which this share of
            its mean eigenvalue is added. None: without, Muon as published.
        damping_every: with damping, the metric is made anew, of all that was read until then, at each of the first
            chunks, twice this many, and then at one in so many, which costs less and changes little. 1: at every chunk.
        beta1: adamw's decay of the first moment.
        beta2: adamw's decay of the second moment.
        eps: adamw's floor under the root of the second moment.
        clip: rows longer than 1 are cut to length 1 after every step (arXiv:2602.05085 sec. 4).
    """

    rule: Rule = "muon"
    lr: float = 0.07
    hold: int = 8
    floor: float = 0.35
    momentum: float = 0.5
    damping: float | None = None
    damping_every: int = 8
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: bool = True

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"write rule {self.rule!r} is not one of {', '.join(get_args(Rule))}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be a positive number; got {self.lr}")
        if self.hold < 1:
            raise ValueError(f"hold must be 1 update or more; got {self.hold}")
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor must be above 0, and 1 (no decay) at most; got {self.floor}")
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive; got {self.eps}")
        if self.damping is not None and not (self.damping > 0 and math.isfinite(self.damping)):
            raise ValueError(f"damping must be a positive number, or none; got {self.damping}")
        if self.damping_every < 1:
            raise ValueError(f"damping_every must be 1 (every chunk) or more chunks; got {self.damping_every}")

    @property
    def curved(self) -> bool:
        """Whether values move in the metric of the loss's curvature."""
        return self.rule == "muon" and self.damping is not None

    def renews(self, chunk: int) -> bool:
        """Whether the metric is made anew at this chunk (from 0) of a reading, see `damping_every`."""
        return chunk < 2 * self.damping_every or chunk % self.damping_every == 0

    def schedule(self, number: Tensor) -> Tensor:
        """Multiplier of `lr` for updates of these numbers (integers, from 0), in float64."""
        return (self.hold / (number + 1).to(torch.float64)).sqrt().clamp(min=self.floor, max=1.0)


class Writer:
    """Applies write rules to one bank and can take the last write back.

    Attributes:
        scale: [bank] multiplier of the step, halved for a memory whenever one of its writes was undone.
        moments: the rule's running averages, each [bank, n_rows, d_model].
        counts: [bank] updates made.
        curvature: [bank, d_model, d_model] sum over tokens, see `Curvature`; None where it is not asked for.
        seen: [bank] how many tokens that is.
        inverse: [bank, d_model, d_model] inverse of the damped curvature when it was last made anew, up to a factor;
            the identity before. None like curvature.
    """

    def __init__(self, bank: Bank, settings: WriteSettings) -> None:
        self.bank = bank
        self.settings = settings
        self.moments = [torch.zeros_like(bank.rows) for _ in range(1 if settings.rule == "muon" else 2)]
        self.counts = torch.zeros(bank.size, dtype=torch.int64, device=bank.device)
        self.scale = torch.ones(bank.size, dtype=torch.float64, device=bank.device)
        self.curvature: Tensor | None = None
        self.inverse: Tensor | None = None
        if settings.curved:
            self.curvature = bank.rows.new_zeros(bank.size, bank.d_model, bank.d_model)
            self.inverse = torch.eye(bank.d_model, dtype=bank.rows.dtype, device=bank.device).repeat(bank.size, 1, 1)
        self.seen = torch.zeros(bank.size, dtype=torch.float64, device=bank.device)
        self._before: list[Tensor] | None = None
        self._pinned: list[Tensor] | None = None

    def live(self) -> list[Tensor]:
        """What an undone write takes back."""
        metric = [] if self.curvature is None or self.inverse is None else [self.curvature, self.seen, self.inverse]
        return [self.bank.rows, *self.moments, self.counts, *metric]

    @torch.no_grad()
    def write(
        self, grad: Tensor, share: Tensor, curvature: tuple[Tensor, Tensor] | None = None, renew: bool = True
    ) -> Tensor:
        """One update of the active memories, undone at once for those whose gradient or result is not finite.

        Args:
            grad: [bank, n_rows, d_model], gradient of each memory's own loss.
            share: [bank] in 0..1, how much of a full step each memory makes: the share of a full chunk that its
                gradient comes from, so that a book's last few words do not move it as far as a thousand would.
                With 0 a memory does not change at all.
            curvature: what `Curvature.take` returned of the same backward pass; it is added to what was seen before.
            renew: make the metric anew of all that was seen, this included.

        Returns:
            [bank] bool: the memories whose write was undone; their `scale` is halved.
        """
        now = [t.clone() for t in self.live()]
        finite = _all_finite(grad)
        if curvature is not None:
            finite &= _all_finite(curvature[0])
        if perhaps(~finite):
            grad = torch.where(finite[:, None, None], grad, 0.0)
        if curvature is not None and self.curvature is not None:
            self.curvature.add_(torch.where(finite[:, None, None], curvature[0], 0.0))
            self.seen.add_(torch.where(finite, curvature[1], 0.0))
        frozen = self.bank.frozen_rows()
        if frozen is not None:
            grad = grad.masked_fill(frozen[..., None], 0.0)
        step = self.scale * share * self.settings.schedule(self.counts)
        self.counts += 1
        delta = self._muon(grad, renew) if self.settings.rule == "muon" else self._adamw(grad)
        active = share > 0
        self.bank.rows.sub_(delta.mul_(step[:, None, None].to(delta.dtype)))
        if self.settings.clip:
            self.bank.clip_rows()
        if frozen is not None:  # clipping may have touched them
            self.bank.rows.copy_(torch.where(frozen[..., None], now[0], self.bank.rows))
        finite &= _all_finite(self.bank.rows)
        done = active & finite
        if perhaps(~done):
            self._restore(~done, now)
            now = now if self._before is None else _mix(done, now, self._before)
        self._keep(now)
        failed = active & ~finite
        self._halve(failed)
        return failed

    @torch.no_grad()
    def remember(self, which: Tensor) -> None:
        """Before a change made elsewhere (filling slots): what `undo` then goes back to, for `which` ([bank] bool)."""
        now = [t.clone() for t in self.live()]
        self._before = now if self._before is None else _mix(which, now, self._before)

    @torch.no_grad()
    def undo(self, which: Tensor) -> None:
        """Takes the last write of the memories in `which` ([bank] bool) back and halves their step.

        Attempts that failed are no writes: what comes back is the state before the last one that changed a memory.
        """
        if self._before is not None:
            self._restore(which, self._before)
        self._halve(which)

    def pin(self) -> None:
        """Before a write that is captured, and before each replay of it: what `undo` goes back to lies in one place."""
        before = self.live() if self._before is None else self._before
        if self._pinned is None:
            self._pinned = [t.clone() for t in before]
            if self.inverse is not None:  # what CUDA's solver sets up when it is first called cannot be captured
                one = self.inverse.new_ones(1, 1)
                torch.cholesky_solve(one, torch.linalg.cholesky_ex(one)[0])
        elif self._before is not self._pinned:
            torch._foreach_copy_(self._pinned, before)
        self._before = self._pinned

    def _keep(self, before: list[Tensor]) -> None:
        if is_captured():
            assert self._before is not None
            torch._foreach_copy_(self._before, before)
        else:
            self._before = before

    def _restore(self, which: Tensor, before: list[Tensor]) -> None:
        for live, mixed in zip(self.live(), _mix(which, before, self.live()), strict=True):
            live.copy_(mixed)

    def _halve(self, which: Tensor) -> None:
        self.scale.mul_(torch.where(which, 0.5, 1.0))

    def _adamw(self, grad: Tensor) -> Tensor:
        s = self.settings
        first, second = self.moments
        first.lerp_(grad, 1 - s.beta1)
        second.lerp_(grad.square(), 1 - s.beta2)
        count = self.counts[:, None, None].to(torch.float64)  # 1 - 0.999 in float32 is wrong in the fifth digit
        correct1, correct2 = ((1 - beta**count).to(grad.dtype) for beta in (s.beta1, s.beta2))
        scale = second.div(correct2).sqrt_().add_(s.eps)
        return first.div(correct1).div_(scale).mul_(s.lr)

    def _muon(self, grad: Tensor, renew: bool) -> Tensor:
        s = self.settings
        (velocity,) = self.moments
        frozen = self.bank.frozen_rows()
        velocity.mul_(s.momentum).add_(grad)
        ahead = grad.add(velocity, alpha=s.momentum)  # Nesterov
        delta, inverse = torch.empty_like(ahead), self._metric(renew)
        for rows, rank in self.bank.runs():
            matrices = ahead[:, rows].unflatten(1, (-1, rank))
            # Orthogonal rows have length 1 up to rank = d_model; beyond it the columns have, so stretch them.
            length = s.lr * max(1.0, rank / self.bank.d_model) ** 0.5
            steps = delta[:, rows].unflatten(1, (-1, rank))
            if inverse is None:
                steps.copy_(orthogonalise(matrices))
            else:
                kinds = matrices.unflatten(1, (-1, self.bank.parts)), steps.unflatten(1, (-1, self.bank.parts))
                (reads, values), (read_steps, value_steps) = (x.tensor_split([self.bank.parts - 1], 2) for x in kinds)
                read_steps.copy_(orthogonalise(reads))
                value_steps.copy_(orthogonalise(values, (values.flatten(1, -2) @ inverse).view(values.shape)))
            steps.mul_(length)
            if frozen is not None:  # only the slots that are written count
                written = (~frozen[:, rows]).unflatten(1, (-1, rank)).sum(dim=-1).div(self.bank.d_model).clamp(min=1.0)
                shorter = (written / max(1.0, rank / self.bank.d_model)).sqrt().to(delta.dtype)
                delta[:, rows].unflatten(1, (-1, rank)).mul_(shorter[..., None, None])
        return delta

    def _metric(self, renew: bool) -> Tensor | None:
        """[bank, d_model, d_model] C^-1, C the damped mean curvature of what each memory has read, up to a factor."""
        if self.curvature is None or self.inverse is None or not perhaps(self.seen > 0):
            return None
        if renew:
            assert self.settings.damping is not None
            # Of few tokens little is known: it counts as if some for each dimension had been seen that prefer no
            # direction.
            evenly = PRIOR_TOKENS * self.bank.d_model + self.settings.damping * self.seen
            flat = evenly.to(self.curvature.dtype)[:, None].expand(-1, self.bank.d_model)
            damped = self.curvature + torch.diag_embed(flat)
            one = torch.eye(self.bank.d_model, dtype=damped.dtype, device=damped.device)
            # One by one: what torch calls for several at once cannot be captured.
            for inverse, some in zip(self.inverse, damped, strict=True):
                inverse.copy_(torch.cholesky_solve(one, torch.linalg.cholesky_ex(some)[0]))
        return self.inverse

    # ---------------------------------------------------------------- resuming

    def state(self) -> dict[str, Tensor]:
        """Everything that the next writes depend on, besides the bank itself."""
        state = {"counts": self.counts, "scale": self.scale}
        state |= {f"moment.{i}": m for i, m in enumerate(self.moments)}
        if self.curvature is not None:
            state |= {"curvature": self.curvature, "seen": self.seen}
        if self.inverse is not None:
            state |= {"inverse": self.inverse}
        if self._before is not None:
            state |= {f"before.{i}": t for i, t in enumerate(self._before)}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` returned, from a writer of the same bank layout and settings."""
        self.counts.copy_(state["counts"])
        self.scale.copy_(state["scale"])
        for i, moment in enumerate(self.moments):
            moment.copy_(state[f"moment.{i}"])
        if self.curvature is not None:
            self.curvature.copy_(state["curvature"])
            self.seen.copy_(state["seen"])
        if self.inverse is not None:
            self.inverse.copy_(state["inverse"])
        self._before = None
        if "before.0" in state:
            self._before = [state[f"before.{i}"].to(t.device, copy=True) for i, t in enumerate(self.live())]


def _mix(which: Tensor, one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    """Tensors [bank, ...] with the memories in `which` ([bank] bool) from `one`, the rest from `other`."""
    masks = [which.reshape(-1, *[1] * (x.ndim - 1)) for x in one]
    return [torch.where(mask, x, y) for mask, x, y in zip(masks, one, other, strict=True)]


def orthogonalise(x: Tensor, dual: Tensor | None = None) -> Tensor:
    """The nearest matrix with orthonormal rows (or columns), approximately: U V^T of the SVD x = U S V^T.

    Newton-Schulz: x <- (a I + b x x^T + c (x x^T)^2) x. All iterates are polynomials of the one Gram matrix
    x x^T times x, so the rounds run on that small [rank, rank] matrix, and the long side is touched twice,
    instead of twice a round.

    With a metric C on rows it is the same in coordinates in which C is the identity, brought back: (x C^-1 x^T)^-1/2
    x C^-1, of which only `dual` = x C^-1 needs to be known; as long, taken together, as it is without a metric.

    Args:
        x: [..., m, n] float32 or float64.
        dual: [..., m, n] x C^-1; None: x itself.

    Returns:
        [..., m, n], singular values about 0.7 to 1.2 (in the metric, up to one factor); a zero matrix stays zero.
    """
    wide, other = (x, dual) if dual is not None or x.shape[-2] <= x.shape[-1] else (x.mT, None)
    shape, wide = wide.shape, _peak_1(wide.reshape(-1, *wide.shape[-2:]))
    other = wide if other is None else _peak_1(other.reshape(wide.shape))
    a, b, c = _NEWTON_SCHULZ
    gram = wide @ other.mT
    if dual is not None:
        gram = (gram + gram.mT) / 2  # symmetric but for rounding
    # The Gram matrix's trace is the squared Frobenius norm, to which x is scaled: no singular value above 1.
    square = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp(min=torch.finfo(x.dtype).tiny)
    gram /= square
    first, total = gram, None
    for i in range(_ROUNDS):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        total = p if total is None else p @ total
        if i + 1 < _ROUNDS:
            gram = p @ gram @ p
    assert total is not None
    if dual is None:
        out = (total.div_(square.sqrt()) @ wide).view(shape)
        return out if x.shape[-2] <= x.shape[-1] else out.mT
    out = total @ other
    length = (total @ first).mul_(total).sum(dim=(-2, -1), keepdim=True).clamp(min=0.0)
    mine = out.square().sum(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return out.mul_((length / mine).sqrt()).view(shape)


def _peak_1(x: Tensor) -> Tensor:
    """Each matrix divided by its largest entry: the squares of very small or large ones leave float32's range."""
    peak = x.abs().amax(dim=(-2, -1), keepdim=True)
    return x / torch.where(peak == 0, 1.0, peak)


def _all_finite(x: Tensor) -> Tensor:
    """[bank] bool for x [bank, n_rows, d_model], in one pass: the largest magnitude is NaN where an entry is."""
    return x.abs().amax(dim=(-2, -1)).isfinite()
