"""The optimiser: Muon for the layers' matrices, AdamW for the embedding and the norms, one schedule for both.

One learning rate serves all weights because both rules move an entry by about 0.2 lr a step: AdamW's updates have a
root mean square of about 0.2 in training (Liu et al., arXiv:2502.16982 sec. 2.2), and Muon's, U V^T of an m by n
matrix with entries of root mean square 1 / sqrt(max(m, n)), is multiplied by 0.2 sqrt(max(m, n)). With lr = 3e-3 an
m = 512 by n = 1280 matrix moves by 3e-3 * 0.2 * sqrt(1280) = 0.021 times an orthogonal one: the 0.02 usual for Muon.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from locas.write import orthogonalise
from pretrain.settings import Preset

MOMENTUM = 0.95
BETAS = (0.9, 0.95)
EPS = 1e-8
_UPDATE_RMS = 0.2


def learning_rate(step: int, preset: Preset) -> float:
    """Warm-up, stable, decay: of the step that is about to be made, counted from 0.

    It rises linearly over the first share of the steps, and falls linearly, to just above zero, over the last.
    """
    n = preset.n_steps
    rise, fall = round(preset.warmup * n), round(preset.decay * n)
    if step < rise:
        return preset.lr * (step + 1) / rise
    return preset.lr * min(1.0, (n - step) / fall if fall else 1.0)


class Optimiser:
    """Steps a model's weights; its state can be saved and taken over.

    Args:
        model: its parameters must have their final place and dtype (float32).
        preset: the learning rate's schedule, weight decay and clipping.
    """

    def __init__(self, model: nn.Module, preset: Preset) -> None:
        self.preset = preset
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        matrices: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        others: list[Tensor] = []
        norms: list[Tensor] = []
        embedding = model.get_input_embeddings().weight
        for p in self.parameters:
            if p is embedding:
                others.append(p)
            elif p.ndim == 2:
                matrices[tuple(p.shape)].append(p)
            else:
                norms.append(p)
        self.groups = list(matrices.values())  # of equal shape: orthogonalised in one batch
        self.velocities = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.adamw = torch.optim.AdamW(
            [{"params": others, "weight_decay": preset.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            lr=preset.lr, betas=BETAS, eps=EPS, fused=embedding.is_cuda,
        )  # fmt: skip

    @torch.no_grad()
    def step(self, step: int) -> Tensor:
        """Clips the gradients, moves all weights and drops the gradients; returns the gradient's length, on the device.

        Nothing here waits for the device.
        """
        lr = learning_rate(step, self.preset)
        length = nn.utils.clip_grad_norm_(self.parameters, self.preset.grad_clip)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for weights, velocity in zip(self.groups, self.velocities, strict=True):
            grad = torch.stack([w.grad for w in weights])  # type: ignore[misc]
            velocity.mul_(MOMENTUM).add_(grad)
            update = orthogonalise(grad.add_(velocity, alpha=MOMENTUM))  # Nesterov
            size = lr * _UPDATE_RMS * max(velocity.shape[1:]) ** 0.5
            torch._foreach_mul_(weights, 1 - lr * self.preset.weight_decay)
            torch._foreach_add_(weights, list(update.unbind()), alpha=-size)
        for p in self.parameters:
            p.grad = None
        return length

    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on, besides the weights."""
        return {"adamw": self.adamw.state_dict(), "velocities": self.velocities}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned, from an optimiser of the same model."""
        self.adamw.load_state_dict(state["adamw"])
        for mine, other in zip(self.velocities, state["velocities"], strict=True):
            mine.copy_(other)
