"""What the model is shown of the documents: each chunk, and as much context before it as the window has room for.

    [start] x_w ......... x_s-2  |  x_s-1  x_s ......... x_e-2        window: at most so many tokens in all
             prefix              |  predicts  x_s ...... x_e-1        chunk: scored, then learnt from

Documents lie side by side, one a row, all at the same position; those that have ended are no longer among the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locas.bank import Bank
from locas.forward import IGNORED, input_embedding


@dataclass(frozen=True)
class Window:
    """One chunk of the live documents as the model gets it. inputs: [live, seq]; targets: [live, chunk]."""

    start: int
    rows: list[int]
    stops: list[int]
    inputs: Tensor
    targets: Tensor
    prefix_tokens: int
    first_target: int


@dataclass(frozen=True)
class Layout:
    """Sizes in tokens, and where the start token goes (None: there is none)."""

    window_tokens: int
    chunk_tokens: int
    start_id: int | None
    start_in_every_window: bool

    def window(
        self, documents: Sequence[Tensor], rows: list[int], start: int, device: torch.device | str | None = None
    ) -> Window:
        """The chunk that begins at token `start` of the documents in `rows`, with its context.

        Args:
            documents: [n] token ids each.
            rows: those that are longer than `start`.
            start: 0 or more.
            device: of the window's tensors; None: the documents'.
        """
        stops = [min(start + self.chunk_tokens, documents[i].numel()) for i in rows]
        stop = max(stops)
        starts_here = self.start_id is not None and self.start_in_every_window
        # Room for the chunk at its full length, so that a short last chunk does not get more context than others.
        left = max(0, start + self.chunk_tokens - (self.window_tokens - starts_here))
        lead = [] if self.start_id is None or (left > 0 and not starts_here) else [self.start_id]
        first_target = start if (start > left or lead) else start + 1
        lies = documents[rows[0]].device
        inputs = torch.zeros(len(rows), len(lead) + stop - 1 - left, dtype=torch.int64, device=lies)
        targets = torch.full((len(rows), stop - first_target), IGNORED, dtype=torch.int64, device=lies)
        for i, (row, end) in enumerate(zip(rows, stops, strict=True)):
            document = documents[row]
            inputs[i, : len(lead)] = torch.tensor(lead)
            inputs[i, len(lead) : len(lead) + end - 1 - left] = document[left : end - 1]
            targets[i, : max(0, end - first_target)] = document[first_target:end]
        prefix = max(0, len(lead) + first_target - 1 - left)
        device = lies if device is None else device
        return Window(start, rows, stops, inputs.to(device), targets.to(device), prefix, first_target)


def check_documents(
    model: nn.Module, documents: Sequence[Tensor], bank: Bank | None, first_token: int, start_id: int | None
) -> None:
    """Raises ValueError unless this model can read these documents into this bank."""
    if not documents:
        raise ValueError("there is no document to read")
    if bank is not None and bank.size != len(documents):
        raise ValueError(f"{len(documents)} documents need as many memories; the bank holds {bank.size}")
    vocabulary = next(input_embedding(model).parameters()).shape[0]
    if start_id is not None and not 0 <= start_id < vocabulary:
        raise ValueError(f"the start token {start_id} is not among the 0..{vocabulary - 1} that the backbone knows")
    for i, ids in enumerate(documents):
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"document {i} must be a vector of token ids; got {tuple(ids.shape)} {ids.dtype}")
        if ids.numel() <= first_token or first_token < 0:
            raise ValueError(f"document {i} has {ids.numel()} tokens: there is nothing to read from {first_token} on")
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise ValueError(
                f"document {i} has token ids {int(ids.min())}..{int(ids.max())}, but the backbone knows "
                f"0..{vocabulary - 1}; was it encoded with another tokenizer?"
            )
