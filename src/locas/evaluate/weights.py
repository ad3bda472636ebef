"""Baselines that learn while they read by training weights: TempLoRA, LoRA, dynamic evaluation.

    learner = WeightLearner("templora-tuned", backbone, settings, RECIPES["templora-tuned"], seed=0)
    for record in learner.read(ids):
        ...

Every chunk is scored first, by the reader and windows of truncated reading, then learnt. See `Recipe` for what is
whose: TempLoRA is arXiv:2401.11504 with the settings of its public code.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from locas.backbone import Backbone
from locas.evaluate.changes import Change, Lora, Weights, down_projections
from locas.forward import (
    IGNORED,
    call,
    chunk_nll,
    decoder,
    device_of,
    find_head,
    frozen,
    read_prefix,
    token_nll,
)
from locas.head import head_nll
from locas.initialise import InitSettings
from locas.sites import find_sites
from locas.stream import ChunkRecord, Reader, ReadSettings


@dataclass(frozen=True)
class Recipe:
    """How a baseline trains weights.

    Attributes:
        trains: "lora" (adapters on every linear layer but the output head), "ffn" (the FFNs' down-projections, in
            place) or "all" (every weight, in place).
        lr: AdamW's learning rate.
        steps: updates for each chunk.
        whole_window: True: as TempLoRA, each update is a forward and backward pass over the whole window in training
            mode, after the scoring pass. False: as a memory is written, the context goes without gradients, and the
            first update shares its forward pass with the scoring.
        warmup_chunks: the rate of chunk i is lr * min(1, i / warmup_chunks); 0: lr from the first chunk on.
        rank: of the adapters; None: the rank whose parameters are nearest to the default memory's.
        alpha: the adapters' output is scaled by alpha / rank; None: the rank.
        dropout: of the adapters' inputs; needs whole_window.
        init: of the adapters: "default", "pissa" or "eva".
        clip: gradients longer than this are shortened to it.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        eps: AdamW's floor under the root of the second moment.
    """

    trains: str
    lr: float
    steps: int = 1
    whole_window: bool = False
    warmup_chunks: int = 0
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    init: str = "default"
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-7

    def __post_init__(self) -> None:
        if self.trains not in ("lora", "ffn", "all"):
            raise ValueError(f"trains must be lora, ffn or all; got {self.trains!r}")
        for name in ("lr", "clip", "eps", "alpha"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number; got {value}")
        for name, least in (("steps", 1), ("warmup_chunks", 0), ("rank", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name} must be a whole number, {least} or more; got {value}")
        for name in ("dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}")
        if self.dropout and not self.whole_window:
            raise ValueError("dropout needs whole_window: without it the pass that learns is the pass that scores")


_TEMPLORA = Recipe("lora", lr=5e-5, steps=2, whole_window=True, warmup_chunks=2, rank=64, dropout=0.05)

RECIPES: dict[str, Recipe] = {
    "templora-paper": _TEMPLORA,
    "templora-tuned": replace(_TEMPLORA, lr=2e-3, warmup_chunks=0),
    "lora-pissa": Recipe("lora", lr=1e-3, steps=2, init="pissa"),
    "lora-eva": Recipe("lora", lr=4e-3, steps=2, init="eva"),
    "ffn-inplace": Recipe("ffn", lr=1e-3, steps=2),
    "dynamic": Recipe("all", lr=3e-4, steps=2),
}


class WeightLearner:
    """Learns a text by training weights; implements `locas.evaluate.learners.Learner`.

    Attributes:
        name: of the method.
        n_parameters: trained numbers.

    Raises:
        ValueError: settings that do not fit the backbone, or PEFT is missing; the backbone is unchanged.
    """

    def __init__(self, name: str, backbone: Backbone, settings: ReadSettings, recipe: Recipe, *, seed: int) -> None:
        settings.sizes(backbone.model)
        settings = replace(settings, reuse=False)  # kept context would be that of weights of before
        self.name, self.backbone, self.settings, self.recipe, self.seed = name, backbone, settings, recipe, seed
        with _seeded(backbone.model, seed, 0):
            self._change: Change | None = _make_change(backbone.model, recipe)
        masters = self._change.masters
        self.n_parameters = sum(p.numel() for p in masters)
        self._optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            masters,
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            weight_decay=0.0,
            fused=all(p.device.type in ("cpu", "cuda") for p in masters),
        )
        head = find_head(backbone.model)
        trained = {id(p) for p in self._change.trained}
        # The fast head has no gradient of its own weights: where they are trained, losses go through the logits.
        self._head = None if head is None or id(head.weight) in trained else head
        self._chunks = 0

    def read(self, ids: Tensor) -> Iterator[ChunkRecord]:
        """Scores each chunk with what was learnt so far, then learns it.

        Raises:
            ValueError: the learner was closed, or there is nothing to read.
            FloatingPointError: the loss is not finite: the learning rate is too large.
        """
        change = self._open_change()
        model = self.backbone.model
        reader = Reader(model, None, [ids], self.settings, start_id=self.backbone.start_id)
        while not reader.done:
            began = time.perf_counter()
            window = reader.window()
            with change.active():
                if self.recipe.whole_window:
                    (record,) = self._finite(reader.next_chunk)
                    norms = self._learn(window)
                else:
                    record, norms = self._score_and_learn(reader, window)
            assert record is not None
            self._chunks += 1
            yield replace(
                record,
                seconds=time.perf_counter() - began,
                grad_norm=norms[0] if norms else math.nan,
                undone=not all(map(math.isfinite, norms)),
            )

    def active(self) -> AbstractContextManager[None]:
        """Inside, the backbone acts with all that was learnt so far."""
        context: AbstractContextManager[None] = self._open_change().active()
        return context

    def close(self) -> None:
        """Drops what was learnt."""
        self._change = None
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()

    def tensors(self) -> list[Tensor]:
        """What the method keeps besides the backbone: trained numbers, optimiser."""
        change = self._open_change()
        mine: list[Tensor] = list(change.learnt if isinstance(change, Weights) else change.trained)
        kept = {t.data_ptr(): t for t in (*mine, *change.masters)}
        moments = [t for state in self._optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return [*kept.values(), *moments]

    def _open_change(self) -> Change:
        if self._change is None:
            raise ValueError(f"{self.name} was closed; make a new learner")
        return self._change

    # ---------------------------------------------------------------- scoring

    def _finite(self, score: Any) -> Any:
        try:
            return score()
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{self.name} diverged at learning rate {self.recipe.lr:g} after {self._chunks} chunks: its loss is "
                "not finite; use a smaller one"
            ) from error

    def _score_and_learn(self, reader: Reader, window: Any) -> tuple[ChunkRecord, list[float]]:
        """The pass that scores is the first one that is differentiated, as when a memory is written."""
        if not (window.targets != IGNORED).any():
            (record,) = reader.next_chunk()
            assert record is not None
            return record, []
        with self._learning(train=False):
            nll = self._losses(window)
            self._finite(lambda: _check_finite(nll))
            scores = torch.full((window.stops[0] - window.start,), math.nan)
            scores[window.first_target - window.start :] = nll[0].detach().float().cpu()
            norms = self._updates(window, nll)
        reader.position = window.start + reader.chunk_tokens
        return ChunkRecord(window.start, window.stops[0], scores, 0.0, math.nan, math.nan, 0, False, 1.0), norms

    # ---------------------------------------------------------------- learning

    def _learn(self, window: Any) -> list[float]:
        """All updates on a chunk that was scored before, in training mode; their gradients' norms."""
        if not (window.targets != IGNORED).any():
            return []
        with self._learning(train=True):
            return self._updates(window, None)

    def _updates(self, window: Any, scored: Tensor | None) -> list[float]:
        """scored: [1, chunk] losses with their graph, in place of the first forward pass."""
        change, model, warm = self._open_change(), self.backbone.model, self.recipe.warmup_chunks
        if self._chunks == 0 and self.recipe.init == "eva":
            change.see(window.inputs)
            scored = None  # its graph is that of the adapters before
        rate = self.recipe.lr * (min(1.0, self._chunks / warm) if warm else 1.0)
        norms = []
        with _seeded(model, self.seed, 1 + self._chunks):
            for step in range(self.recipe.steps):
                nll = scored if step == 0 and scored is not None else self._losses(window)
                norms.append(self._step(change, nll.sum() / (window.targets != IGNORED).sum(), rate))
        return norms

    def _losses(self, window: Any) -> Tensor:
        """[1, chunk] losses with their graph; by the reader's own code, except that context may have gradients."""
        model, n = self.backbone.model, window.targets.shape[1]
        if not self.recipe.whole_window:
            before, inputs = window.inputs.tensor_split([window.prefix_tokens], dim=1)
            return chunk_nll(model, inputs, window.targets, read_prefix(model, before), self._head)
        if self._head is not None:
            hidden = call(decoder(model), window.inputs).last_hidden_state[:, -n:]
            return head_nll(hidden, self._head, window.targets)
        only = {"logits_to_keep": n} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        return token_nll(call(model, window.inputs, **only).logits[:, -n:], window.targets)

    def _step(self, change: Change, loss: Tensor, rate: float) -> float:
        """One update; none, and NaN or infinity returned, if the gradient is not finite."""
        grads = torch.autograd.grad(loss, change.trained, allow_unused=True)
        for master, grad in zip(change.masters, grads, strict=True):
            master.grad = torch.zeros_like(master) if grad is None else grad.to(master.dtype)
        norm = float(nn.utils.clip_grad_norm_(change.masters, self.recipe.clip))
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
            change.stepped()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def _learning(self, *, train: bool) -> Iterator[None]:
        """Only the change is trainable; the model in training mode if asked. All is put back afterwards."""
        model, trained = self.backbone.model, self._open_change().trained
        flags = [p.requires_grad for p in trained]
        with frozen(model), torch.enable_grad():
            try:
                model.train(train)
                for parameter in trained:
                    parameter.requires_grad_(True)
                yield
            finally:
                model.eval()
                for parameter, flag in zip(trained, flags, strict=True):
                    parameter.requires_grad_(flag)


def equal_rank(model: nn.Module, parameters: int) -> int:
    """The LoRA rank whose adapters have about so many parameters, at least 1."""
    one = sum(p.numel() for p in Lora(model, 1, 1.0, 0.0, "default").adapters)
    return max(1, round(parameters / one))


def memory_parameters(model: nn.Module) -> int:
    """Numbers in the default memory for this backbone."""
    return sum((3 if s.gated else 2) * InitSettings().rank * s.d_model for s in find_sites(model).values())


def _make_change(model: nn.Module, recipe: Recipe) -> Change:
    if recipe.trains == "ffn":
        return Weights(model, down_projections(model))
    if recipe.trains == "all":
        return Weights(model, list(model.parameters()))
    rank = recipe.rank or equal_rank(model, memory_parameters(model))
    return Lora(model, rank, recipe.alpha or rank, recipe.dropout, recipe.init)


@contextmanager
def _seeded(model: nn.Module, seed: int, part: int) -> Iterator[None]:
    """Random numbers that depend on nothing but `seed` and `part`; the global generators are left as they were."""
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed * 1_000_003 + part)
        yield


def _check_finite(nll: Tensor) -> None:
    if not bool(nll.isfinite().all()):
        raise FloatingPointError("the loss is not finite")
