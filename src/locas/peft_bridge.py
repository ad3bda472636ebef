"""Memories as PEFT adapters (optional: `pip install "locas[peft]"`); importing this module teaches PEFT the type LOCAS.

    from peft import PeftModel, get_peft_model
    from locas.peft_bridge import LocasConfig, from_peft, to_peft

    adapted = to_peft(model, locas.load("book.safetensors", model))      # or get_peft_model(model, LocasConfig(r=16))
    adapted.save_pretrained("adapter")
    adapted = PeftModel.from_pretrained(model, "adapter")
    from_peft(adapted).save("book.safetensors")
    plain = adapted.merge_and_unload()                                   # FFNs widened, an ordinary model

An adapter's tensors and its manifest (`LocasConfig.memory`, as in a memory file) are those of a memory, so that
conversion is exact both ways, and a read is the attached memory's, operation by operation. PEFT's own training works
on them. Frozen slots get no gradient there; an optimiser may still change them (by weight decay), and `from_peft` then
refuses to call them frozen.

PEFT has no public way to add a method: its enum of types is closed. We add a member to it; this, and what else of PEFT
is used, is pinned by `tests/unit/test_peft_bridge.py` for the versions in `PEFT_RANGE`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

try:
    import peft
    from peft import PeftConfig, PeftModel, PeftType, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import register_peft_method
except ImportError as error:  # pragma: no cover - depends on what is installed
    raise ImportError('memories as PEFT adapters need PEFT: pip install "locas[peft]"') from error

from locas.attach import first_input
from locas.bank import ACTIVATIONS
from locas.initialise import InitSettings, create_bank, without_auto
from locas.memory import Memory, Provenance, expected_shapes, from_manifest
from locas.sites import Site, canonical_activation, find_family, find_sites, fingerprint
from locas.widen import longer, matrices, put

PEFT_RANGE = ("0.18", "0.22")  # from, below: the versions that the tests have run with
_NAME = "locas"
_FROM_TEXT = ("top-k", "bottom-k", "activation")


def _register() -> None:
    """Makes LOCAS a PEFT type; twice does no harm."""
    version = tuple(int(part) for part in peft.__version__.split(".")[:2])
    low, high = (tuple(int(part) for part in bound.split(".")) for bound in PEFT_RANGE)
    if not low <= version < high:
        warnings.warn(
            f"the PEFT bridge was tested with PEFT {PEFT_RANGE[0]} up to {PEFT_RANGE[1]}; this is {peft.__version__}",
            stacklevel=3,
        )
    kind = _NAME.upper()
    if kind not in PeftType.__members__:
        member = str.__new__(PeftType, kind)
        member._name_ = member._value_ = kind
        type.__setattr__(PeftType, kind, member)
        PeftType._member_map_[kind] = member
        PeftType._value2member_map_[kind] = member
        PeftType._member_names_.append(kind)
    if PeftType(kind) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=_NAME, config_cls=LocasConfig, model_cls=LocasModel)


@dataclass
class LocasConfig(PeftConfig):
    """Settings of a memory as an adapter, as in `InitSettings`.

    Attributes:
        r: slots for each layer.
        variant: auto, glu or mlp.
        init: random-rows, gaussian, or step-wise (empty slots; PEFT's training does not fill them); auto: random-rows.
            Initialisations that look at a text: `to_peft(model, locas.create(model, ids))`.
        tau_scale, activation, seed: see `InitSettings`.
        layers: which layers get slots; None: all.
        memory: the manifest of the memory that this adapter is; filled in when the adapter is made.
        frozen_sha256: of the rows of its frozen slots, None where there are none; filled in by `to_peft`.
        target_modules: not used; PEFT wants it to be there.
    """

    r: int = 64
    variant: str = "auto"
    init: str = "auto"
    tau_scale: float | None = None
    activation: str = "auto"
    seed: int = 0
    layers: list[int] | None = None
    memory: dict[str, Any] | None = None
    frozen_sha256: str | None = None
    target_modules: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(_NAME.upper())
        self._layer_of: dict[str, int] = {}  # of each module that is wrapped, by its name; set by LocasModel
        self._start: Memory | None = None  # what the adapter's tensors begin with
        if self.init in _FROM_TEXT:
            raise ValueError(
                f"the initialisation {self.init} looks at a text, which a config does not have; make the memory first: "
                "to_peft(model, locas.create(model, ids))"
            )


class LocasLayer(nn.Module, BaseTunerLayer):
    """A layer's FFN (or its last matrix, where it has no module of its own) with memories beside it."""

    adapter_layer_names = ("locas_keys", "locas_values")
    other_param_names = ("locas_tau",)

    def __init__(self, base_layer: nn.Module, site: Site, layer: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer = layer
        self.locas_keys = nn.ParameterDict({})  # gates, if any, then keys: [(parts - 1) * rank, d_model]
        self.locas_values = nn.ParameterDict({})  # [rank, d_model]
        self.locas_tau: dict[str, Tensor] = {}
        self._kinds: dict[str, tuple[str, str]] = {}
        self._frozen: dict[str, int] = {}  # how many of each adapter's slots, the first ones
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._carried: list[Tensor] = []
        self._handles = []
        if site.entry is not site.exit:
            self._handles.append(site.entry.register_forward_pre_hook(self._carry, with_kwargs=True))

    def _carry(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._carried[:] = [first_input(args, kwargs)]

    def __getattr__(self, name: str) -> Any:
        """What the FFN has, the layer has: other code looks for its matrices here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def add(self, adapter: str, start: Memory) -> None:
        """Puts the memory's slots of this layer in, trainable until PEFT says otherwise."""
        bank = start.bank
        slots = bank.slots(self.layer)
        keys = slots.k[0] if slots.g is None else torch.cat([slots.g[0], slots.k[0]])
        # A copy that also works where PEFT makes all tensors on the meta device, to be loaded later.
        self.locas_keys[adapter] = nn.Parameter(torch.empty(keys.shape, dtype=keys.dtype))
        self.locas_values[adapter] = nn.Parameter(torch.empty(slots.v[0].shape, dtype=keys.dtype))
        for parameter, rows in ((self.locas_keys[adapter], keys), (self.locas_values[adapter], slots.v[0])):
            if not parameter.is_meta:
                parameter.data.copy_(rows)
        self.locas_tau[adapter] = bank.tau[0, bank.layers.index(self.layer)].detach().clone().cpu()
        self._kinds[adapter] = (bank.variant, bank.activation)
        self._frozen[adapter] = int(bank.frozen[0, bank.layers.index(self.layer)])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        a = self._carried.pop() if self._carried else first_input(args, kwargs)
        if self.disable_adapters:
            return output
        main, *rest = output if isinstance(output, tuple) else (output,)
        for adapter in self.active_adapters:
            if adapter in self.locas_keys:
                main = main + self._read(adapter, a).to(main.dtype)
        return (main, *rest) if isinstance(output, tuple) else main

    def _read(self, adapter: str, a: Tensor) -> Tensor:
        """tau * V^T(act(G A) * (K A)), operation by operation as `Bank.read`."""
        variant, activation = self._kinds[adapter]
        act = ACTIVATIONS[activation]
        keys, values = self.locas_keys[adapter], self.locas_values[adapter]
        if torch.is_grad_enabled() and (n := self._frozen[adapter]):
            keys, values = (_without_gradient(rows, n, len(values)) for rows in (keys, values))
        keys, values = keys.to(a.device, a.dtype), values.to(a.device, a.dtype)
        both = a @ keys.T
        if variant == "mlp":
            m = act(both)
        else:
            gate, up = both.chunk(2, dim=-1)
            m = act(gate) * up
        return (m * self.locas_tau[adapter].to(a.dtype)) @ values  # tau: a number on the CPU

    def release(self) -> nn.Module:
        """Takes the hooks off; returns the FFN."""
        for handle in self._handles:
            handle.remove()
        base: nn.Module = self.base_layer
        return base

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("a memory widens its FFN and cannot be merged in place; use merge_and_unload()")

    def unmerge(self) -> None:
        raise NotImplementedError("nothing was merged in place; `locas unmerge` undoes `locas merge`")


def _without_gradient(rows: Tensor, n: int, rank: int) -> Tensor:
    """The same rows, [parts * rank, d_model], of which the first `n` of every `rank` get no gradient."""
    return torch.cat([piece for part in rows.split(rank) for piece in (part[:n].detach(), part[n:])])


class LocasModel(BaseTuner):
    """The tuner that PEFT makes for a `LocasConfig`."""

    prefix = f"{_NAME}_"
    tuner_layer_cls = LocasLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's declaration

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Makes the memory that the adapter starts with, and finds the modules to wrap; refuses another backbone."""
        if peft_config.memory is None:
            start = _fresh(model, peft_config)
            peft_config.memory = _as_json(start)
        else:
            start = _blank(peft_config.memory, _dtype_for(model))
            start.check(model)
        sites = find_sites(model, start.bank.layers)
        names = {module: name for name, module in model.named_modules()}
        peft_config._layer_of = {names[site.exit]: layer for layer, site in sites.items()}
        peft_config._start = start

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config._layer_of

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = peft_config._layer_of[current_key]
        if not isinstance(target, LocasLayer):
            new = LocasLayer(target, find_sites(self.model, [layer])[layer], layer)
            setattr(parent, target_name, new)
            target = new
        target.add(adapter_name, peft_config._start)
        if not target.locas_keys[adapter_name].is_meta:
            for parameters in (target.locas_keys, target.locas_values):
                device = next(target.base_layer.parameters()).device
                parameters[adapter_name].data = parameters[adapter_name].data.to(device)
        if adapter_name not in self.active_adapters:
            target.locas_keys[adapter_name].requires_grad_(False)
            target.locas_values[adapter_name].requires_grad_(False)

    def _unload_and_optionally_merge(  # type: ignore[override] # PEFT declares None and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The backbone, without memories or with its FFNs widened by them, every layer equally. NaN is refused whatever
        `safe_merge` says; nothing is changed where a merge is impossible."""
        model: Any = self.model
        layers = {m.layer: (name, m) for name, m in model.named_modules() if isinstance(m, LocasLayer)}
        widened = _widened(model, layers, adapter_names or self.active_adapters) if merge else None
        for name, module in layers.values():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.release())
        if widened is not None:
            put(model, *widened)
        if hasattr(model, "peft_config"):
            del model.peft_config
        return model


def to_peft(model: Any, memory: Memory, adapter_name: str = "default") -> PeftModel:
    """The model with the memory as its adapter; a PeftModel gets it as one more, active only after `set_adapter`.

    Raises:
        ValueError: the memory was made with another backbone, or is kept more finely than an adapter of this one;
            nothing was changed.
    """
    backbone = model.get_base_model() if isinstance(model, PeftModel) else model
    memory.check(backbone)
    if torch.promote_types(kept := memory.bank.rows.dtype, made := _dtype_for(backbone)) != made:
        raise ValueError(
            f"the memory is kept in {str(kept).removeprefix('torch.')}, an adapter of this backbone in "
            f"{str(made).removeprefix('torch.')}, which would round it; round it first: memory.bank = "
            f"memory.bank.to(dtype={made})"
        )
    config = LocasConfig(memory=_as_json(memory), frozen_sha256=_frozen_sha256(memory), task_type="CAUSAL_LM")
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        adapted = model
    else:
        adapted = get_peft_model(model, config, adapter_name)
    for module in adapted.modules():
        if isinstance(module, LocasLayer) and adapter_name in module.locas_keys:
            slots = memory.bank.slots(module.layer)
            keys = slots.k[0] if slots.g is None else torch.cat([slots.g[0], slots.k[0]])
            module.locas_keys[adapter_name].data.copy_(keys)
            module.locas_values[adapter_name].data.copy_(slots.v[0])
    return adapted


def from_peft(adapted: PeftModel, adapter_name: str = "default") -> Memory:
    """The adapter as a memory, with the provenance that it came with.

    Raises:
        ValueError: no such adapter, one of another kind, or one whose frozen slots were changed.
    """
    config = adapted.peft_config.get(adapter_name)
    if not isinstance(config, LocasConfig) or config.memory is None:
        have = [name for name, other in adapted.peft_config.items() if isinstance(other, LocasConfig)]
        raise ValueError(f"{adapter_name!r} is no memory of this model; it has {', '.join(have) or 'none'}")
    memory = _blank(config.memory, _dtype_for(adapted.get_base_model()))
    for module in adapted.modules():
        if isinstance(module, LocasLayer) and adapter_name in module.locas_keys:
            slots, keys = memory.bank.slots(module.layer), module.locas_keys[adapter_name].detach()
            slots.k[0].copy_(keys[-slots.k.shape[1] :])
            if slots.g is not None:
                slots.g[0].copy_(keys[: slots.k.shape[1]])
            slots.v[0].copy_(module.locas_values[adapter_name].detach())
    # Adapters that were saved before this was noted have none.
    if config.frozen_sha256 is not None and config.frozen_sha256 != _frozen_sha256(memory):
        raise ValueError(
            f"training changed frozen slots of the adapter {adapter_name!r} (weight decay does): they are not what the "
            "memory promises. Train without weight decay, or make the adapter of a thawed memory (locas.grow.thaw)"
        )
    return memory


def _frozen_sha256(memory: Memory) -> str | None:
    """Of the rows of frozen slots, whatever the dtype that they are kept in; None where there are none."""
    frozen = memory.bank.frozen_rows()
    if frozen is None:
        return None
    rows = memory.bank.rows[frozen].detach().double().cpu().contiguous()
    return hashlib.sha256(rows.view(torch.uint8).numpy().data).hexdigest()


def _fresh(model: nn.Module, config: LocasConfig) -> Memory:
    init = "random-rows" if config.init == "auto" else config.init
    settings = InitSettings(
        rank=config.r,
        variant=config.variant,  # type: ignore[arg-type]
        init=init,  # type: ignore[arg-type]
        tau_scale=config.tau_scale,
        activation=config.activation,
        seed=config.seed,
    )
    bank = create_bank(model, torch.empty(0, dtype=torch.int64), settings, layers=config.layers)
    name = config.base_model_name_or_path or str(getattr(model, "name_or_path", "")) or type(model).__name__
    return Memory(
        bank,
        Provenance(
            name,
            fingerprint(model),
            settings={"init": asdict(without_auto(settings, next(iter(find_sites(model).values()))))},
        ),
        model,
    )


def _as_json(memory: Memory) -> dict[str, Any]:
    """Its manifest as it comes out of a file: lists for tuples, so that saving and loading change nothing."""
    plain: dict[str, Any] = json.loads(json.dumps(memory.manifest(), allow_nan=False))
    return plain


def _dtype_for(model: nn.Module) -> torch.dtype:
    """Of a memory for this backbone: float64 for a float64 one, else float32."""
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32


def _blank(manifest: dict[str, Any], dtype: torch.dtype) -> Memory:
    """The memory of a manifest, with zeros in it.

    Raises:
        ValueError: the manifest does not describe a memory.
    """
    try:
        ranks = {int(layer): int(rank) for layer, rank in manifest["ranks"].items()}
        shapes = expected_shapes(manifest["variant"], ranks, int(manifest["d_model"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"LocasConfig.memory does not describe a memory ({error!r})") from error
    zeros = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    return Memory(*from_manifest("LocasConfig.memory", zeros, manifest))


# -------------------------------------------------------------------- merging


def _widened(
    model: Any, layers: dict[int, tuple[str, LocasLayer]], adapters: list[str] | str
) -> tuple[int, dict[tuple[int, str], Tensor]]:
    """The new width, and the new tensors by layer and part ("up.weight").

    Raises:
        ValueError: the backbone cannot be widened, or a memory does not compute what its FFN does; nothing was changed.
    """
    family, sites = find_family(model), find_sites(model)
    adapters = [adapters] if isinstance(adapters, str) else list(adapters)
    widths = {site.d_ff for site in sites.values()}
    moe = any(site.experts is not None for site in sites.values())
    if moe or family.width is None or len(widths) != 1:
        why = "it is a mixture of experts" if moe else "its FFNs have no one width that is a setting"
        raise ValueError(f"{type(model).__name__} cannot be widened: {why}. Leave the adapter on, or use unload()")
    for _, wrapped in layers.values():
        for adapter in set(adapters) & wrapped._kinds.keys():
            _check_kind(adapter, wrapped._kinds[adapter], sites[wrapped.layer])
    slots = {layer: _slots(layers[layer][1], adapters, sites[layer]) if layer in layers else [] for layer in sites}
    width = widths.pop()
    most = max(sum(len(part["down"]) for part in parts) for parts in slots.values())
    tensors: dict[tuple[int, str], Tensor] = {}
    for layer, site in sites.items():
        for matrix, module, blocks, axis in matrices(site, width):
            for kind in ("weight", "bias") if matrix != "down" else ("weight",):
                old = getattr(module, kind, None)
                if old is not None:
                    rows = [torch.cat([s[b] for s in slots[layer]]) if slots[layer] else None for b in blocks]
                    at = 0 if kind == "bias" else axis
                    tensors[layer, f"{matrix}.{kind}"] = longer(
                        old, at, width, most, rows if kind == "weight" else None
                    )
    return width + most, tensors


def _check_kind(adapter: str, kind: tuple[str, str], site: Site) -> None:
    own = ("glu" if site.gated else "mlp", canonical_activation(site.activation))
    if (kind[0], canonical_activation(kind[1])) != own:
        raise ValueError(
            f"the adapter {adapter!r} is Locas-{kind[0].upper()} with {kind[1]}, but the backbone's FFN is "
            f"{own[0]} with {own[1]}: one FFN has one form. Leave the adapter on, or make the memory with variant and "
            "activation auto"
        )


def _slots(module: LocasLayer, adapters: list[str], site: Site) -> list[dict[str, Tensor]]:
    """{"up": K, "gate": G, "down": tau V}, [rank, d_model] float64 each, for each adapter."""
    found = []
    for adapter in adapters:
        if adapter in module.locas_keys:
            keys = module.locas_keys[adapter].detach().double()
            values = module.locas_values[adapter].detach().double()
            parts = {"up": keys[-len(values) :], "down": values * module.locas_tau[adapter].to(values)}
            if site.gated:
                parts["gate"] = keys[: len(values)]
            if not all(bool(rows.isfinite().all()) for rows in parts.values()):
                raise ValueError(f"the adapter {adapter!r} holds NaN or infinite numbers; nothing was merged")
            found.append(parts)
    return found


_register()
