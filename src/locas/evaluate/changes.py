"""What the baselines train: adapters of PEFT, or the backbone's own weights.

A *change* is a set of trained numbers that the backbone acts with only inside `active()`. Outside it the backbone's
modules and weights are its own, the very same objects and storage: nothing has to be restored, so nothing can be
restored wrongly, whatever goes wrong in between.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from locas.forward import device_of
from locas.sites import find_sites

_EVA_PASSES = 200  # over the first chunk, until its principal directions must have converged


class Change(Protocol):
    """Trained numbers that a backbone can act with."""

    @property
    def trained(self) -> list[nn.Parameter]:
        """What the loss is differentiated by (inside `active`)."""

    @property
    def masters(self) -> list[nn.Parameter]:
        """What the optimiser steps on, in float32 or better; of the same storage where what is learnt is so, too."""

    def see(self, inputs: Tensor) -> None:
        """Takes the inputs [1, seq] of the first chunk, once it has been scored, to initialise from."""

    def stepped(self) -> None:
        """After the optimiser changed `masters`: brings `trained` up to date."""

    def active(self) -> AbstractContextManager[None]:
        """A context manager: inside, the backbone acts with the change."""


class Weights:
    """Some of the backbone's own weights, trained; the originals wait in their own storage.

    Args:
        model: the backbone.
        chosen: which of its parameters.

    Raises:
        ValueError: a weight that is not on a device, or not a plain floating-point tensor.
    """

    def __init__(self, model: nn.Module, chosen: list[nn.Parameter]) -> None:
        _check_plain(chosen)
        self.chosen = chosen
        self.originals = [p.data for p in chosen]
        self.learnt = [p.data.clone() for p in chosen]
        self._masters = _masters(self.learnt)

    @property
    def trained(self) -> list[nn.Parameter]:
        return self.chosen

    @property
    def masters(self) -> list[nn.Parameter]:
        return self._masters

    def see(self, inputs: Tensor) -> None:
        """Nothing to initialise: training begins at the backbone's weights."""

    def stepped(self) -> None:
        _round(self._masters, self.learnt)

    @contextmanager
    def active(self) -> Iterator[None]:
        try:
            for parameter, learnt in zip(self.chosen, self.learnt, strict=True):
                parameter.data = learnt
            yield
        finally:
            for parameter, original in zip(self.chosen, self.originals, strict=True):
                parameter.data = original


class Lora:
    """Low-rank adapters on every linear layer but the output head (`linear_layers`), through PEFT.

    Args:
        model: the backbone.
        rank: of every adapter.
        alpha: the adapters' output is scaled by alpha / rank.
        dropout: of the adapters' inputs, while training.
        init: "default" (B zero, A random), "pissa" (the weight's own principal part, arXiv:2404.02948) or "eva" (the
            first chunk's principal activations, arXiv:2410.07170, ranks not redistributed).

    Raises:
        ValueError: PEFT is missing, or weights that it cannot adapt; the backbone is unchanged.
    """

    def __init__(self, model: nn.Module, rank: int, alpha: float, dropout: float, init: str) -> None:
        _check_plain(list(model.parameters()))
        self.model, self.init, self.rank = model, init, rank
        self._pairs = _adapted(model, lambda targets: _lora_config(rank, alpha, dropout, init, targets))
        self.adapters = [p for *_, lora in self._pairs for p in _adapter_parameters(lora)]
        for *_, lora in self._pairs:
            lora.train(model.training)  # a fresh module begins in training mode, its dropout with it
        # Beside weights in bfloat16 adapters compute in bfloat16, as where TempLoRA's own code runs them.
        self._masters = _masters([p.data for p in self.adapters])

    @property
    def trained(self) -> list[nn.Parameter]:
        return self.adapters

    @property
    def masters(self) -> list[nn.Parameter]:
        return self._masters

    def stepped(self) -> None:
        _round(self._masters, [p.data for p in self.adapters])

    @torch.no_grad()
    def see(self, inputs: Tensor) -> None:
        if self.init != "eva":
            return
        with self._put(False):
            components = _principal_activations(self.model, inputs, self.rank, [name for name, *_ in self._pairs])
        masters = {id(adapter): master for adapter, master in zip(self.adapters, self._masters, strict=True)}
        for name, *_, lora in self._pairs:
            masters[id(lora.lora_A["default"].weight)].copy_(components[name])
        self.stepped()

    def active(self) -> AbstractContextManager[None]:
        return self._put(True)

    @contextmanager
    def _put(self, on: bool) -> Iterator[None]:
        """The adapters in place, or the original layers; afterwards what was there before."""
        before = []
        try:
            for _, parent, key, original, lora in self._pairs:
                before.append((parent, key, parent._modules[key]))
                parent._modules[key] = lora if on else original
            yield
        finally:
            for parent, key, module in reversed(before):
                parent._modules[key] = module


# -------------------------------------------------------------------- what is trained


def _masters(learnt: list[Tensor]) -> list[nn.Parameter]:
    """What the optimiser steps on: the tensors themselves, or float32 copies of coarser ones, on which a step would
    mostly be rounded away."""
    return [nn.Parameter(t if t.dtype in _EXACT else t.float()) for t in learnt]


@torch.no_grad()
def _round(masters: list[nn.Parameter], learnt: list[Tensor]) -> None:
    """What was learnt is the masters, rounded to its dtype."""
    for tensor, master in zip(learnt, masters, strict=True):
        if tensor.data_ptr() != master.data_ptr():
            tensor.copy_(master)


def linear_layers(model: nn.Module) -> list[str]:
    """Paths of every linear layer but the output head. A mixture's experts are no linear layers in transformers 5."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not head
    ]


def down_projections(model: nn.Module) -> list[nn.Parameter]:
    """The second matrix of every FFN (of every expert, in a mixture)."""
    found = []
    for site in find_sites(model).values():
        weight = site.down.weight if site.experts is None else site.down.down_proj
        assert isinstance(weight, nn.Parameter)
        found.append(weight)
    return found


# -------------------------------------------------------------------- PEFT

_EXACT = (torch.float32, torch.float64)
_Pair = tuple[str, nn.Module, str, nn.Module, Any]  # a layer's path, parent and key there; it, and it with an adapter


def need_peft() -> Any:
    """The library of the adapters. Raises ValueError, naming the extra, where it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ValueError('LoRA baselines need PEFT, which is not installed: pip install "locas[peft]"') from error
    return peft


def _lora_config(rank: int, alpha: float, dropout: float, init: str, targets: list[str]) -> Any:
    how = {"default": True, "pissa": "pissa", "eva": True}
    if init not in how:
        raise ValueError(f"a LoRA initialisation of {init!r} is not one of {', '.join(how)}")
    return need_peft().LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, init_lora_weights=how[init]
    )


def _adapted(model: nn.Module, config: Callable[[list[str]], Any]) -> list[_Pair]:
    """An adapter for each linear layer, which knows the layer, while the model does not know it.

    PEFT adapts a stand-in that holds the layers alone, so that the model itself stays out of its hands.
    """
    modules, names = dict(model.named_modules()), linear_layers(model)
    holder = nn.Module()
    for i, name in enumerate(names):
        holder.add_module(f"layer{i}", modules[name])
    weights = {p: (p.data, p.requires_grad) for p in holder.parameters()}
    pairs: list[_Pair] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice is about saving adapters
            need_peft().inject_adapter_in_model(config([f"layer{i}" for i in range(len(names))]), holder)
        for i, name in enumerate(names):
            parent, _, key = name.rpartition(".")
            lora, layer = holder._modules[f"layer{i}"], modules[name]
            if any(p.data is not weights[p][0] for p in layer.parameters()):  # PiSSA: what is left of the weight
                _own_base(lora, layer)
            pairs.append((name, modules[parent], key, layer, lora))
    finally:
        for parameter, (data, trainable) in weights.items():
            parameter.data = data
            parameter.requires_grad_(trainable)
    return pairs


def _own_base(lora: Any, base: nn.Module) -> None:
    """Gives an adapter a copy of its base layer's present weight, so that the layer may have its own back."""
    if hasattr(base, "_hf_hook"):  # its forward is bound to the layer that it was put on
        raise ValueError(
            "PiSSA changes weights, which accelerate's hooks do not allow; load the backbone on one device"
        )
    twin = copy.copy(base)
    twin._parameters = {
        key: None if p is None else nn.Parameter(p.data, requires_grad=False) for key, p in base._parameters.items()
    }
    lora.base_layer = twin


def _adapter_parameters(lora: Any) -> list[nn.Parameter]:
    return [p for part in (lora.lora_A, lora.lora_B) for p in part.parameters()]


def _principal_activations(model: nn.Module, inputs: Tensor, rank: int, targets: list[str]) -> dict[str, Tensor]:
    """EVA's right singular vectors of each layer's inputs on one batch: {path: [rank, d_in]}.

    Raises:
        ValueError: fewer tokens than the rank, or no convergence.
    """
    from peft.tuners.lora.eva import get_eva_state_dict

    if inputs.numel() < rank:
        raise ValueError(
            f"EVA takes {rank} directions from the first chunk, which has {inputs.numel()} tokens; use a longer --chunk"
        )
    config = _lora_config(rank, rank, 0.0, "default", targets)
    config.init_lora_weights, config.eva_config = "eva", need_peft().EvaConfig(rho=1.0)
    passes = itertools.count()

    def forward(of: nn.Module, batch: dict[str, Tensor]) -> None:
        if next(passes) > _EVA_PASSES:
            raise ValueError(f"EVA's directions did not converge in {_EVA_PASSES} passes over the first chunk")
        of(**batch, use_cache=False)

    hooks = {module: list(module._forward_hooks) for module in model.modules()}
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=_cuda(model)):
            warnings.simplefilter("ignore")
            found: dict[str, Tensor] = get_eva_state_dict(
                model,
                [{"input_ids": inputs}],
                peft_config=config,
                forward_fn=forward,
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=_tokens_by_features,
                show_progress_bar=False,
            )
    finally:
        for module, known in hooks.items():
            for key in [k for k in module._forward_hooks if k not in known]:
                del module._forward_hooks[key]
    return found


def _tokens_by_features(layer_input: Any, *_: Any) -> Tensor:
    """A layer's input as [tokens, d_in], whatever it was flattened to before."""
    inputs: Tensor = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    return inputs.flatten(0, -2)


def _cuda(model: nn.Module) -> list[torch.device]:
    device = device_of(model)
    return [device] if device.type == "cuda" else []


def _check_plain(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.is_meta or not parameter.is_floating_point():
            what = "is offloaded" if parameter.is_meta else f"is quantised ({parameter.dtype})"
            raise ValueError(
                f"a weight of shape {tuple(parameter.shape)} {what}; baselines that train weights need the whole "
                "backbone on its devices in a floating-point dtype"
            )
