"""How much the loss minds a change of the FFNs' outputs, gathered in the backward pass that makes the gradient anyway.

    curvature = Curvature(bank, sites)
    with curvature.watching([0]):
        loss = ...                      # a forward pass with the memory attached
        with curvature.gathering():
            loss.backward()
    second_moments, tokens = curvature.take(tokens)

Second moments of the loss's gradient at an FFN's output are the output side of the Fisher information in its Kronecker
form (K-FAC, arXiv:1503.05671), here with the text's own tokens as labels. They hardly differ between texts, and little
between layers, so that one matrix is kept for a whole memory: the mean over its layers, each at a mean eigenvalue of 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from locas.bank import Bank
from locas.sites import Site

_BLOCK = 256  # columns


class Curvature:
    """Gathers second moments for every memory of a bank.

    Args:
        bank: attached to the model.
        sites: of the bank's layers.
        stride: gather from one token in so many, which stand for the others.
    """

    def __init__(self, bank: Bank, sites: Mapping[int, Site], stride: int = 1) -> None:
        self.bank, self.sites, self.stride = bank, sites, stride
        self._gathering = False
        self._samples: list[Tensor] = []
        self._where: Sequence[int] = ()

    @contextmanager
    def watching(self, rows: Sequence[int]) -> Iterator[None]:
        """Around forward passes whose batch row i reads memory rows[i]; inside `attached`, whose output it looks at."""
        self._where = list(rows)

        def look(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            main = output[0] if isinstance(output, tuple) else output
            if main.requires_grad:
                main.register_hook(self._add)

        handles = [site.exit.register_forward_hook(look) for site in self.sites.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Around the backward pass that counts; what was gathered before is dropped."""
        self._samples, self._gathering = [], True
        try:
            yield
        finally:
            self._gathering = False

    def take(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What was gathered since it was taken last.

        Args:
            tokens: [bank] how many tokens each memory's loss was of.

        Returns:
            [bank, d_model, d_model], mean eigenvalue = tokens (0 where there was no gradient); tokens as float64.
        """
        rows, samples, self._samples = self.bank.rows, self._samples, []
        tokens = tokens.to(rows.device, torch.float64)
        moments = rows.new_zeros(self.bank.size, self.bank.d_model, self.bank.d_model)
        if samples:
            made = _squared(torch.cat(samples, dim=1), rows.dtype)
            if self._where == list(range(self.bank.size)):
                moments = made
            else:
                for row, of_row in zip(self._where, made, strict=True):
                    moments[row] = of_row
        return moments.mul_(tokens.to(moments.dtype)[:, None, None]), tokens

    def _add(self, grad: Tensor) -> None:
        """Keeps a sample of a gradient [rows (* seq), seq, d_model], scaled so that its second moments have a mean
        eigenvalue of 1 / layers, or 0."""
        if not self._gathering:
            return
        rows = self.bank.rows
        sample = grad.detach().reshape(len(self._where), -1, self.bank.d_model)[:, :: self.stride]
        x = sample.to(rows.device, rows.dtype)
        peak = x.abs().amax(dim=(-2, -1), keepdim=True)  # squares of very small or large ones leave float32's range
        x = x / torch.where(peak == 0, 1.0, peak)
        mean = x.square().sum(dim=(-2, -1), keepdim=True) * (len(self.sites) / self.bank.d_model)
        self._samples.append((x * torch.where(mean == 0, 1.0, mean).rsqrt()).to(grad.dtype))


def _squared(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x^T x of [n, tokens, d], in `dtype`: [n, d, d]."""
    if x.is_cuda and x.element_size() == 2 and "dtype" in torch.ops.aten.bmm.overloads():  # torch 2.8
        return torch.bmm(x.mT, x, out_dtype=dtype)
    x = x.to(dtype)
    n, _, d = x.shape
    made = x.new_empty(n, d, d)
    for first in range(0, d, _BLOCK):  # what lies below the diagonal is copied from above it
        last = min(first + _BLOCK, d)
        torch.bmm(x[:, :, first:last].mT, x[:, :, first:], out=made[:, first:last, first:])
        made[:, last:, first:last] = made[:, first:last, last:].mT
    return made
