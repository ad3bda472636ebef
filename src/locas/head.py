"""From the decoder's hidden states to each target's loss, without ever holding all logits.

Most backbones end in one plain matrix. There the loss and its gradient are made together, a piece of the tokens at a
time: what a chunk costs is the two products and one pass of the exponential, and its logits take a few MiB instead of
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

# A piece of logits has about so many entries, but at least so many tokens: below that the product is slow.
_PIECE_ENTRIES = 2**24
_PIECE_TOKENS = 256


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
    nll: Tensor = _HeadNLL.apply(hidden.flatten(0, 1), head.weight, head.bias, targets.flatten())
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
        tokens = max(_PIECE_TOKENS, _PIECE_ENTRIES // weight.shape[0])
        for start in range(0, targets.numel(), tokens):
            here = slice(start, start + tokens)
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
    logits = F.linear(hidden, weight, bias).to(nll.dtype)
    largest = logits.amax(dim=-1, keepdim=True)
    target = logits.gather(1, targets[:, None])
    powers = logits.sub_(largest).exp_()
    total = powers.sum(dim=-1, keepdim=True)
    nll.copy_((total.log() + largest - target)[:, 0])
    if grad is not None:
        grad.copy_((powers.to(weight.dtype) @ weight).div_(total).sub_(weight[targets]))
