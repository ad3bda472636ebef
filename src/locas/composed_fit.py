"""Fitting a composed memory: on each part's text it comes to predict as that part alone.

Each part was written without the others in sight. In the sum, what both have learnt (a kind of prose, say) counts
twice, and each part disturbs the others' texts. With some text for each part at hand, a few passes over the texts mend
that: the predictions with the composed memory are drawn, by gradient on all of its rows, to those with part i alone
(Kullback-Leibler divergence), and for a small share to the text's own next tokens, as in reading. Frozen slots stay as
they are.

Tried and dropped (LOG.md): values by least squares in each layer, so that the composed function comes nearest to part
i's on text i, in closed form. It helps the parts' gain on later text nearly as much and costs a third, but on the text
that was read it gives up more; as a start for the gradient it is no better than the plain sum.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locas.attach import attached
from locas.bank import Bank
from locas.forward import call, device_of, frozen, in_windows
from locas.write import Writer, WriteSettings

_WINDOW_TOKENS = 512  # each a step


@dataclass(frozen=True)
class FitSettings:
    """How a composed memory is fitted.

    Attributes:
        tokens: how many of each text's last tokens are looked at.
        epochs: passes over them.
        lr: the length by which a row moves in the first step; it falls to zero along a cosine.
        text_share: how much of the loss is that of the text's own tokens, which is to read it once more; 0: the
            composed memory learns the parts' predictions only.
    """

    tokens: int = 16384
    epochs: int = 2
    lr: float = 0.01
    text_share: float = 0.1

    def __post_init__(self) -> None:
        if self.tokens < 4:
            raise ValueError(f"fitting looks at 4 tokens of each text or more, better thousands; got {self.tokens}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be 1 or more; got {self.epochs}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be a positive number; got {self.lr}")
        if not 0 <= self.text_share <= 1:
            raise ValueError(f"text_share must be in [0, 1]; got {self.text_share}")


def fit_composed(
    model: nn.Module,
    bank: Bank,
    parts: Sequence[Bank],
    texts: Sequence[Tensor],
    settings: FitSettings,
    *,
    start_id: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Fits a composed bank in place, and says what was done.

    Args:
        model: the backbone.
        bank: the parts' slots side by side, a bank of one.
        parts: banks of one, each as it is to answer on its text.
        texts: [n] token ids for each part.
        settings: see `FitSettings`.
        start_id: put before every window, where the model expects a start token.
        on_progress: called with how many windows are done, and of how many.

    Returns:
        The settings, each text's hash and tokens, and the divergence from each part on its own text in nats a token,
        before and after.

    Raises:
        ValueError: too short a text, or a bank in which every slot is frozen.
    """
    texts = [torch.as_tensor(text)[-settings.tokens :].to("cpu", torch.int64) for text in texts]
    for number, text in enumerate(texts, start=1):
        if text.numel() < 4:
            raise ValueError(f"text {number} has {text.numel()} tokens to fit to; give 4 or more, better thousands")
    if bool((bank.frozen[0] == torch.tensor(list(bank.ranks.values()))).all()):
        raise ValueError("every slot of these memories is frozen: there is nothing to fit; thaw one (locas.grow.thaw)")
    work = [in_windows(model, text, start_id, _WINDOW_TOKENS) for text in texts]
    total, done = (settings.epochs + 2) * sum(map(len, work)), itertools.count(1)

    def tick() -> None:
        if on_progress is not None:
            on_progress(next(done), total)

    before = _divergences(model, bank, parts, work, tick)
    _distil(model, bank, parts, work, settings, tick)
    after = _divergences(model, bank, parts, work, tick)
    about = [
        {
            "tokens": text.numel(),
            "ids_sha256": hashlib.sha256(text.numpy().astype("<i8").tobytes()).hexdigest(),
            "divergence_before": before[i],
            "divergence": after[i],
        }
        for i, text in enumerate(texts)
    ]
    return asdict(settings) | {"texts": about}


def _distil(
    model: nn.Module,
    bank: Bank,
    parts: Sequence[Bank],
    work: list[list[Tensor]],
    settings: FitSettings,
    tick: Callable[[], None],
) -> None:
    """Passes over all texts' windows in a seeded order, one step a window, each followed by `tick`."""
    windows = [(part, window) for part, mine in zip(parts, work, strict=True) for window in mine]
    longest = max(window.numel() for _, window in windows)
    writer = Writer(bank, WriteSettings("muon", settings.lr, floor=1.0, momentum=0.9, damping=None))
    generator = torch.Generator().manual_seed(0)
    steps = settings.epochs * len(windows)
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(settings.epochs)])
    for step, chosen in enumerate(order.tolist()):
        bank.requires_grad_()
        try:
            with torch.enable_grad():
                part, window = windows[chosen]
                _loss(model, bank, part, window, settings.text_share).backward(inputs=bank.leaves())
            grad = bank.grad
        finally:
            bank.requires_grad_(False)
        assert grad is not None
        share = (0.5 + 0.5 * math.cos(math.pi * step / steps)) * window.numel() / longest
        writer.write(grad, torch.tensor([share], dtype=torch.float64, device=bank.device))
        tick()


def _divergences(
    model: nn.Module, bank: Bank, parts: Sequence[Bank], work: list[list[Tensor]], tick: Callable[[], None]
) -> list[float]:
    """Of each text, in nats a token."""
    found = []
    with torch.no_grad():
        for part, windows in zip(parts, work, strict=True):
            total = 0.0
            for window in windows:
                total += float(_loss(model, bank, part, window, 0.0)) * window.numel()
                tick()
            found.append(total / sum(window.numel() for window in windows))
    if not all(map(math.isfinite, found)):
        raise FloatingPointError(f"predictions on the texts are not finite ({found}); try the backbone in float32")
    return found


def _loss(model: nn.Module, bank: Bank, part: Bank, window: Tensor, text_share: float) -> Tensor:
    """KL from the predictions with `part` to those with `bank`, and for its share the loss of the window's own tokens;
    means over a window's tokens, float32 or better."""
    window = window.to(device_of(model))
    with frozen(model):
        with torch.no_grad(), attached(model, part):
            wanted = _log_probabilities(call(model, window[None]).logits[0])
        with attached(model, bank):
            found = _log_probabilities(call(model, window[None]).logits[0])
    divergence = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
    if text_share == 0 or window.numel() < 2:
        return divergence
    return (1 - text_share) * divergence + text_share * torch.nn.functional.nll_loss(found[:-1], window[1:])


def _log_probabilities(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)
