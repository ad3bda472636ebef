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

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from locas.bank import Bank
from locas.sites import Site

_BLOCK = 256  # columns


class Curvature:
    """Gathers second moments for every memory of a bank. sites: of the bank's layers, with the bank attached."""

    def __init__(self, bank: Bank, sites: Mapping[int, Site]) -> None:
        self.bank, self.sites = bank, sites
        self._gathering = False
        self._sum = bank.rows.new_zeros(bank.size, bank.d_model, bank.d_model)

    @contextmanager
    def watching(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """Around forward passes whose batch row i reads memory rows[i]; inside `attached`, whose output it looks at."""
        where = torch.tensor(list(rows), device=self.bank.device)

        def look(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            main = output[0] if isinstance(output, tuple) else output
            if main.requires_grad:
                main.register_hook(self._adder(where))

        handles = [site.exit.register_forward_hook(look) for site in self.sites.values()]
        try:
            yield where
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Around the backward pass that counts; what was gathered before is dropped."""
        self._sum.zero_()
        self._gathering = True
        try:
            yield
        finally:
            self._gathering = False

    def take(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What was gathered.

        Args:
            tokens: [bank] how many tokens each memory's loss was of.

        Returns:
            [bank, d_model, d_model], mean eigenvalue = tokens (0 where there was no gradient); tokens as float64.
        """
        tokens = tokens.to(self._sum.device, torch.float64)
        return self._sum * tokens.to(self._sum.dtype)[:, None, None], tokens

    def _adder(self, where: Tensor) -> Callable[[Tensor], None]:
        def add(grad: Tensor) -> None:
            if self._gathering:
                self._add(where, grad.detach())

        return add

    def _add(self, where: Tensor, grad: Tensor) -> None:
        """Adds the second moments of a gradient [rows (* seq), seq, d_model], of mean eigenvalue 1 / layers, or 0, to
        those of the memories in `where` [rows]."""
        flat = grad.reshape(where.numel(), -1, self.bank.d_model).to(self._sum.device)
        moments = _squared(flat, self._sum.dtype)
        mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * len(self.sites)
        share = torch.where(mean == 0, 1.0, mean).reciprocal_()
        if where.numel() == self._sum.shape[0]:  # all of them, in order
            self._sum.addcmul_(moments, share)
        else:
            self._sum.index_add_(0, where, moments.mul_(share))


def _squared(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x^T x of [n, tokens, d], times what keeps it within range, in `dtype`: [n, d, d]."""
    if x.is_cuda and x.element_size() == 2 and "dtype" in torch.ops.aten.bmm.overloads():  # torch 2.8
        return torch.bmm(x.mT, x, out_dtype=dtype)  # which leaves float32's range where all entries are below 1e-19
    x = x.to(dtype)
    n, _, d = x.shape
    exponent = x.abs().amax(dim=(-2, -1), keepdim=True).frexp().exponent
    most = math.frexp(torch.finfo(dtype).max)[1] - 2
    x = x * torch.ldexp(x.new_ones(n, 1, 1), -exponent.clamp(-most, most))  # a power of two changes no digit
    made = x.new_empty(n, d, d)
    for first in range(0, d, _BLOCK):  # what lies below the diagonal is copied from above it
        last = min(first + _BLOCK, d)
        torch.bmm(x[:, :, first:last].mT, x[:, :, first:], out=made[:, first:last, first:])
        made[:, last:, first:last] = made[:, first:last, last:].mT
    return made
