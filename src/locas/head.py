"""From the decoder's hidden states to each target's loss, without ever holding all logits.

Most backbones end in one plain matrix. There the loss and its gradient are made together, a piece of the vocabulary at
a time, with a running maximum and sum as in online softmax (arXiv:1805.02867): what a chunk costs is the two products
and one pass of the exponential over numbers that a processor's cache still holds, and its logits take 8 MiB instead of
seq x vocab numbers thrice. Where a backbone does more (soft caps, scales, a quantised matrix), `forward.find_head`
finds that out by trying, and the loss goes through the backbone's own logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

IGNORED = -100  # a target that is not scored, as in torch's cross-entropy

# A piece of logits has about so many entries, on a CPU and elsewhere (fewer, larger kernels), of so many tokens at most
# and so much of the vocabulary at least: products of smaller ones are slow.
_PIECE_ENTRIES, _PIECE_ENTRIES_OFF_CPU = 2**21, 2**23
_PIECE_TOKENS, _PIECE_VOCABULARY = 2048, 1024


def head_nll(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats under softmax(head(hidden)).

    Differentiable in `hidden` alone: the head is part of the frozen backbone.

    Args:
        hidden: [batch, seq, d_model].
        head: the output matrix, with or without a bias.
        targets: [batch, seq] ids; `IGNORED` where nothing is scored.

    Returns:
        [batch, seq] float32, or float64 for float64 states; 0 where the target is `IGNORED`.
    """
    states = hidden.flatten(0, 1).to(head.weight.dtype)  # another one only under autocast
    nll: Tensor = _HeadNLL.apply(states, head.weight, head.bias, targets.flatten())
    return nll.view(targets.shape)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, [batch, seq] float32 or better; 0 where it is `IGNORED`."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none").view(
        targets.shape
    )


class _HeadNLL(torch.autograd.Function):
    """A token's loss depends on its own hidden state only, so the gradient of each is found along with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        scored = targets != IGNORED
        known = targets.where(scored, 0)
        nll = hidden.new_empty(targets.shape, dtype=exact)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, targets.numel(), _PIECE_TOKENS):
            here = slice(start, start + _PIECE_TOKENS)
            _piece(hidden[here], weight, bias, known[here], nll[here], None if grad is None else grad[here])
        if grad is not None:
            ctx.save_for_backward(grad, scored)
        return nll.masked_fill_(~scored, 0.0)

    @staticmethod
    def backward(ctx: FunctionCtx, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (each,) = outputs
        grad, scored = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * each.where(scored, 0.0)[:, None].to(grad.dtype), None, None, None


def _piece(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, nll: Tensor, grad: Tensor | None
) -> None:
    """Fills in the loss of some tokens, and its gradient: sum_v p_v w_v - w_target."""
    tokens, exact = hidden.shape[0], nll.dtype
    entries = _PIECE_ENTRIES if hidden.device.type == "cpu" else _PIECE_ENTRIES_OFF_CPU
    columns = min(weight.shape[0], max(_PIECE_VOCABULARY, entries // tokens))
    # In one place for all pieces: fresh memory costs a processor more than what is written there.
    place = hidden.new_empty(tokens * columns)
    place_exact = place if hidden.dtype == exact else nll.new_empty(tokens * columns)
    largest = nll.new_full((tokens, 1), torch.finfo(exact).min)  # not -inf, which a whole piece's logits may be
    total, target = nll.new_zeros(tokens, 1), nll.new_zeros(tokens, 1)
    # Of the exponentials, relative to the largest so far: sum_v p_v w_v times their sum.
    mean = None if grad is None else torch.zeros_like(hidden, dtype=exact)
    for first in range(0, weight.shape[0], columns):
        some = weight[first : first + columns]
        raw = place[: tokens * some.shape[0]].view(tokens, -1)
        if bias is None:
            torch.mm(hidden, some.mT, out=raw)
        else:
            torch.addmm(bias[first : first + columns], hidden, some.mT, out=raw)
        logits = raw if raw.dtype == exact else place_exact[: raw.numel()].view_as(raw).copy_(raw)
        where = targets[:, None] - first
        inside = (where >= 0) & (where < some.shape[0])
        target = torch.where(inside, logits.gather(1, where.clamp(0, some.shape[0] - 1)), target)
        before, largest = largest, torch.maximum(largest, logits.amax(dim=-1, keepdim=True))
        powers, shrink = logits.sub_(largest).exp_(), (before - largest).exp_()
        total.mul_(shrink).add_(powers.sum(dim=-1, keepdim=True))
        if mean is not None and some.dtype == exact:
            mean.mul_(shrink).addmm_(powers, some)
        elif mean is not None:
            mean.mul_(shrink).add_(raw.copy_(powers) @ some)
    nll.copy_((total.log() + largest - target)[:, 0])
    if grad is not None and mean is not None:
        grad.copy_(mean.div_(total).sub_(weight[targets]))
