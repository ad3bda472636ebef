"""Which tokens a step sees: a function of seed and step alone, so that a run resumed goes on as if never stopped."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Batches:
    """All tokens in the device's memory, cut anew in every epoch and dealt in a shuffled order.

    An epoch's windows begin at a drawn offset and lie side by side, so every token is seen about once an epoch, with
    another context each time. A window may run from one book into the next; the start token stands between them.

    Args:
        ids: [n] all tokens, below 2 ** 15.
        context: tokens of a window; its targets reach one further.
        seed: of offsets and order.
        device: where the tokens lie, in 2 bytes each.

    Raises:
        ValueError: there are fewer tokens than two windows.
    """

    def __init__(self, ids: NDArray[np.uint16], context: int, seed: int, device: torch.device) -> None:
        self.per_epoch = (len(ids) - 1) // context - 1  # one less than fit, so that every offset has room
        if self.per_epoch < 1:
            raise ValueError(f"{len(ids)} tokens do not fill two windows of {context}; prepare more text")
        self.context = context
        self.seed = seed
        self.ids = torch.from_numpy(np.ascontiguousarray(ids).view(np.int16)).to(device)
        self._reach = torch.arange(context + 1, device=device)
        self._epoch = -1
        self._starts = torch.empty(0)

    def take(self, first: int, n: int) -> Tensor:
        """[n, context + 1] int64: windows number `first` to `first + n` since the beginning of training."""
        starts = torch.cat([self._of_epoch(number) for number in self._cut(first, n)])
        return self.ids[starts[:, None] + self._reach].to(torch.int64)

    def _cut(self, first: int, n: int) -> list[tuple[int, int, int]]:
        """(epoch, begin, end) for each epoch that the windows lie in."""
        cuts = []
        while n > 0:
            epoch, begin = divmod(first, self.per_epoch)
            end = min(self.per_epoch, begin + n)
            cuts.append((epoch, begin, end))
            first, n = first + end - begin, n - (end - begin)
        return cuts

    def _of_epoch(self, cut: tuple[int, int, int]) -> Tensor:
        epoch, begin, end = cut
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = torch.randint(self.context, (1,), generator=generator)
            order = torch.randperm(self.per_epoch, generator=generator)
            self._starts = (order * self.context + offset).to(self.ids.device)
            self._epoch = epoch
        return self._starts[begin:end]


def spread(ids: NDArray[np.uint16], context: int, n: int, device: torch.device) -> Tensor:
    """[n, context + 1] int64: windows spread evenly over a text, the same every time; fewer where it is too short."""
    n = max(1, min(n, (len(ids) - 1) // context))
    starts = torch.linspace(0, len(ids) - context - 1, n).long()
    whole = torch.from_numpy(np.ascontiguousarray(ids).view(np.int16))
    return whole[starts[:, None] + torch.arange(context + 1)].to(device, torch.int64)
