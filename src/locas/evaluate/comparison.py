"""A backbone with what a learner has learnt, beside the same without: losses and divergence on one text.

    (found,) = compare(backbone, learner, ids, ReadSettings())
    print(found.before - found.after, found.kl)

What was learnt can be dialled up and down where it is a sum with one factor; and a check that nothing is left behind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from locas.backbone import Backbone
from locas.evaluate.learners import Locas
from locas.forward import IGNORED, chunk_logits, frozen, token_nll
from locas.stream import Reader, ReadSettings
from locas.window import Window

_HELD_BYTES = 2**28  # of the backbone's logits that are kept while those with what was learnt are made


class Learnt(Protocol):
    """What was learnt: a learner, or a memory from a file. name: in messages."""

    @property
    def name(self) -> str: ...

    def active(self) -> AbstractContextManager[Any]:
        """Inside, the backbone acts with it."""


@dataclass(frozen=True)
class Comparison:
    """The backbone without and with what was learnt, on one text, means over its tokens in nats.

    before, after: negative log-likelihoods; kl: KL(backbone || backbone with it); tokens: that were scored.
    """

    tokens: int
    before: float
    after: float
    kl: float


def compare(
    backbone: Backbone,
    learner: Learnt,
    ids: Tensor,
    read: ReadSettings,
    *,
    first_token: int = 0,
    scales: Sequence[float] = (1.0,),
) -> list[Comparison]:
    """Scores a text with what a learner has learnt and without; nothing is learnt from it.

    Windows and chunks are those of truncated reading.

    Args:
        backbone: model and tokenizer.
        learner: that has read something.
        ids: [n] token ids.
        read: window and chunk.
        first_token: tokens before it are context only.
        scales: see `scaled`.

    Returns:
        One for each scale.

    Raises:
        ValueError: there is nothing to score, or this learner cannot be scaled.
        FloatingPointError: a loss is not finite.
    """
    if read.start_in_every_window is None:
        read = replace(read, start_in_every_window=backbone.start_in_every_window)
    reader = Reader(backbone.model, None, [ids], read, start_id=backbone.start_id, first_token=first_token)
    total, tokens = torch.zeros(len(scales), 3, dtype=torch.float64), 0
    for windows in _blocks(backbone, reader):
        before = [_logits(backbone, w) for w in windows]
        tokens += sum(int((w.targets != IGNORED).sum()) for w in windows)
        for i, scale in enumerate(scales):
            with learner.active(), scaled(backbone, learner, scale):
                for window, logits in zip(windows, before, strict=True):
                    total[i] += _sums(window.targets, logits, _logits(backbone, window))
    if tokens == 0:
        raise ValueError("there is no token to score: a first token needs one before it")
    if not bool(total.isfinite().all()):
        raise FloatingPointError(f"with what {learner.name} learnt, the loss is not finite; use a smaller step size")
    return [Comparison(tokens, *row) for row in (total / tokens).tolist()]


def _sums(targets: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """[3] float64: both losses and the divergence, summed over a window's targets [1, chunk]."""
    counted = targets != IGNORED
    figures = (token_nll(before, targets), token_nll(after, targets), divergence(before, after))
    return torch.stack([f[counted].double().sum().cpu() for f in figures])


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(one) || softmax(other)) over the last axis, in nats; exactly 0 where they are equal.

    Args:
        one: [..., vocab] logits.
        other: the same.

    Returns:
        [...] float32 or better.
    """
    dtype = torch.float64 if one.dtype == torch.float64 else torch.float32
    p, q = one.to(dtype).log_softmax(dim=-1), other.to(dtype).log_softmax(dim=-1)
    # 0 * (-inf - x) is 0 here: what the first one rules out costs nothing.
    return torch.where(p.exp() == 0, 0.0, p.exp() * (p - q)).sum(dim=-1)


def _blocks(backbone: Backbone, reader: Reader) -> Iterator[list[Window]]:
    """Windows with something to score, as many at once as may be held."""
    vocabulary = int(backbone.model.get_input_embeddings().weight.shape[0])
    most = max(1, _HELD_BYTES // (4 * reader.chunk_tokens * vocabulary))
    block: list[Window] = []
    while not reader.done:
        window = reader.window()
        reader.position = window.start + reader.chunk_tokens
        if window.targets.shape[1]:
            block.append(window)
        if block and (len(block) == most or reader.done):
            yield block
            block = []


def _logits(backbone: Backbone, window: Window) -> Tensor:
    """[1, chunk, vocab] of a window's targets."""
    with frozen(backbone.model), torch.no_grad():
        return chunk_logits(backbone.model, window.inputs, window.prefix_tokens)[:, -window.targets.shape[1] :]


# -------------------------------------------------------------------- the dial


def can_scale(backbone: Backbone, learner: Learnt) -> bool:
    """Whether what was learnt is a sum with one factor: a memory, or LoRA that began at zero."""
    if isinstance(learner, Locas):
        return True
    recipe = getattr(learner, "recipe", None)
    return recipe is not None and recipe.trains == "lora" and recipe.init == "default"


@contextmanager
def scaled(backbone: Backbone, learner: Learnt, scale: float) -> Iterator[None]:
    """Inside, and inside `learner.active()`, what was learnt counts `scale` times: tau, or LoRA's alpha / rank.

    Raises:
        ValueError: this learner has no such dial.
    """
    if scale == 1:
        yield
        return
    if not can_scale(backbone, learner):
        raise ValueError(f"what {learner.name} learnt cannot be scaled; its only scale is 1")
    if isinstance(learner, Locas):
        assert learner.bank is not None
        tau = learner.bank.tau.clone()
        learner.bank.tau.mul_(scale)
        try:
            yield
        finally:
            learner.bank.tau.copy_(tau)
        return
    layers = [m for m in backbone.model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    before = [dict(m.scaling) for m in layers]
    try:
        for module in layers:
            module.scaling = {name: value * scale for name, value in module.scaling.items()}
        yield
    finally:
        for module, value in zip(layers, before, strict=True):
            module.scaling = value


# -------------------------------------------------------------------- nothing is left behind


class BitExact:
    """Remembers a backbone's weights and what it says about a text; calling it raises unless they are the same."""

    def __init__(self, backbone: Backbone, ids: Tensor) -> None:
        self.backbone, self.ids = backbone, ids[: min(64, ids.numel())]
        self._before = self._now()

    def __call__(self, when: str) -> None:
        logits, weights = self._now()
        if weights != self._before[1] or not torch.equal(logits, self._before[0]):
            raise RuntimeError(f"{when} the backbone is not what it was: this is a bug in the method that learnt")

    def _now(self) -> tuple[Tensor, str]:
        model = self.backbone.model
        with frozen(model), torch.no_grad():
            logits = chunk_logits(model, self.ids[None].to(next(model.parameters()).device), 0).cpu()
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        return logits, digest.hexdigest()
