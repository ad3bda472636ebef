"""Attaching memories to a backbone by forward hooks: its modules, names and bytes never change.

    with attached(model, bank):
        model.generate(...)

The hook adds the memory's output to the FFN block's output (arXiv:2602.05085 sec. 3): H_out = FFN(A) + tau *
Locas(A). It sees positions only one by one, so key/value caches, left padding, beam search and gradient
checkpointing need nothing special. Several memories may be attached at once; their outputs add up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from locas.bank import Bank
from locas.sites import Site, decoder_of, find_sites


class Attachment:
    """Memories that sit on a model until `detach`.

    Attributes:
        bank: what is attached.
        index: [batch] which memory each row of the batch reads (-1: none), or None; may be exchanged between
            forward passes. It is kept on the model's device: generating copies nothing to and fro.
    """

    def __init__(
        self, bank: Bank, index: Tensor | Sequence[int] | None, device: torch.device, handles: list[RemovableHandle]
    ) -> None:
        self.bank = bank
        self._device = device
        self._handles = handles
        self.index = index

    @property
    def index(self) -> Tensor | None:
        return self._index

    @index.setter
    def index(self, index: Tensor | Sequence[int] | None) -> None:
        if index is not None:
            index = torch.as_tensor(index)
            check_index(index, self.bank)
            index = index.to(self._device)
        self._index = index

    def detach(self) -> None:
        """Removes the memories. Afterwards the model is what it was; calling it twice does no harm."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            _forget_compiled_code()


def attach(model: nn.Module, bank: Bank, index: Tensor | Sequence[int] | None = None) -> Attachment:
    """Puts a bank of memories beside the model's FFNs until `detach` is called on what this returns.

    Args:
        model: a causal language model of a supported family, compiled or not, on any devices.
        bank: memories for some or all of its layers.
        index: [batch] integers, row b of every batch reads memory index[b], none where it is negative. A batch
            that is a multiple of its length is read as beam search lays it out. None: everybody reads the only
            memory, or row b memory b of a larger bank.

    Raises:
        ValueError: the bank does not fit the model; nothing was attached.
    """
    sites = check_fit(model, bank)
    attachment = Attachment(bank, index, next(iter(sites.values())).device, [])
    layers = decoder_of(model)
    for layer, site in sites.items():
        attachment._handles += _hook(attachment, layer, site, layers[layer])
    _forget_compiled_code()
    return attachment


@contextmanager
def attached(model: nn.Module, bank: Bank, index: Tensor | Sequence[int] | None = None) -> Iterator[Attachment]:
    """`attach` for the length of a `with` block."""
    attachment = attach(model, bank, index)
    try:
        yield attachment
    finally:
        attachment.detach()


def check_fit(model: nn.Module, bank: Bank) -> dict[int, Site]:
    """The sites of the bank's layers.

    Raises:
        ValueError: the model lacks one of them, or its hidden states have another width.
    """
    sites = find_sites(model, bank.layers)
    width = next(iter(sites.values())).d_model
    if width != bank.d_model:
        raise ValueError(
            f"this memory was made for hidden states of width {bank.d_model}, but {type(model).__name__} has "
            f"{width}; use the backbone that it was made with (`locas info FILE` names it)"
        )
    return sites


def check_index(index: Tensor, bank: Bank) -> None:
    """Raises ValueError unless `index` is a vector of memories that the bank has (or negative: none)."""
    if index.ndim != 1 or index.numel() == 0 or index.is_floating_point():
        raise ValueError(f"the index must be a non-empty vector of integers; got {tuple(index.shape)} {index.dtype}")
    if int(index.max()) >= bank.size:
        raise ValueError(
            f"the index names memory {int(index.max())}, but the bank holds 0..{bank.size - 1} (-1: no memory)"
        )


def _hook(attachment: Attachment, layer: int, site: Site, block: nn.Module) -> list[RemovableHandle]:
    """Adds the hooks of one layer. Where the FFN has no module of its own (OPT), its first and last matrix
    stand for its entry and exit, and the input is carried from one to the other; they see [batch * seq, d], so the
    batch is noted where the decoder layer, `block`, begins."""
    if site.entry is site.exit:

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return _add(attachment, layer, first_input(args, kwargs), output, batch=None)

        return [site.exit.register_forward_hook(add, with_kwargs=True)]

    carried: list[Tensor] = []
    batch: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch[:] = [first_input(args, kwargs).shape[0]]

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        carried[:] = [first_input(args, kwargs)]

    def add_carried(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _add(attachment, layer, carried.pop(), output, batch[0])

    return [
        block.register_forward_pre_hook(count, with_kwargs=True),
        site.entry.register_forward_pre_hook(remember, with_kwargs=True),
        site.exit.register_forward_hook(add_carried),
    ]


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a module was called with: its first argument, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def _add(attachment: Attachment, layer: int, a: Tensor, output: Any, batch: int | None) -> Any:
    """The FFN block's output with the memory's added; extra outputs (router logits) pass through."""
    main, *rest = output if isinstance(output, tuple) else (output,)
    bank, index = attachment.bank, attachment.index
    if a.ndim == 2 and (index is not None or bank.size > 1):
        # Some layers flatten [batch, seq, d]; rows of the batch are then equal stretches.
        rows = batch or (bank.size if index is None else index.shape[0])
        onto = main.unflatten(0, (rows, -1))
        main = bank.read(layer, a.unflatten(0, (rows, -1)), index, onto).flatten(0, 1)
    else:
        main = bank.read(layer, a, index, main)
    return (main, *rest) if isinstance(output, tuple) else main


def _forget_compiled_code() -> None:
    """Makes torch.compile look again. Dynamo does not guard on hooks (`skip_nnmodule_hook_guards`), so code that
    was compiled before an attach or detach would silently go on without, or with, the memory."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]:
        torch.compiler.reset()
