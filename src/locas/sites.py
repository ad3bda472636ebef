"""Where each model family keeps its FFN: the one module of locas that knows.

A *site* is one layer's FFN. Everything else in locas sees only `Site`: two modules to put forward hooks on
(`entry`, whose first positional input is the FFN's input A, and `exit`, whose output is the FFN block's
output), and the FFN's matrices as rows, one row per basis vector, however the family stores them.

A family that is not listed is described from outside and found first (later entries win):

    from locas.sites import FAMILIES, Family
    FAMILIES.append(Family(model_types=("mymodel",), layers="model.layers", entry="mlp", exit="mlp",
                           gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"))

What `exit` returns differs, and a hook on it must know: a plain tensor in every family here (a tuple in no
transformers 5 release we read; whoever hooks should still take a tuple's first element). OPT's is flattened,
`[batch * seq, d_model]`. BLOOM's is the FFN's output PLUS the residual. Falcon then adds the attention's
output to it IN PLACE, so a hook that keeps it must clone. Gemma 2 and 3, OLMo 2 and GLM-4 normalise it
afterwards: the site ends before that norm, which is where widening the FFN adds, too.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from locas.bank import ACTIVATIONS

# What configs call the activations of `locas.bank.ACTIVATIONS` besides.
ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    # The formula of gelu_pytorch_tanh with full-precision constants: apart only in rounding (tested in float64).
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
}

FINGERPRINT_SAMPLE = 65_536  # elements hashed of each weight, at most
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # float8 is storage: it needs scales


@dataclass(frozen=True)
class Family:
    """How one model family stores its FFN.

    All paths are dotted. `layers` starts at the causal LM (several candidates: the first that exists), the
    others at one decoder layer.
    """

    model_types: tuple[str, ...]  # values of config.model_type
    layers: str | tuple[str, ...]  # e.g. "model.layers"
    entry: str  # module whose first positional input is A, the FFN's input (e.g. "mlp"; OPT: "fc1")
    exit: str  # module whose output is the FFN block's output (e.g. "mlp"; OPT: "fc2")
    up: str  # module of the first matrix (fused: the gate/up module)
    down: str  # module of the second matrix
    gate: str | None = None  # module of the gate matrix; equal to `up` where one matrix is both, gate first
    conv1d: bool = False  # weights are stored [in, out] (GPT-2's Conv1D)
    activation: str = "hidden_act"  # config attribute with the activation's name; "=silu": that name itself
    # Module with 3-D parameters gate_up_proj [experts, 2 m, d_model] and down_proj [experts, d_model, m], and
    # the attribute act_fn. Layers that lack it (dense ones, mixed in) are read by the paths above.
    experts: str | None = None
    # Key in config.json (its text_config, if it has one) of the FFN's width m, which merging enlarges; None: the
    # width is no setting.
    width: str | None = "intermediate_size"


def _in_mlp(up: str, down: str, gate: str | None = None) -> dict[str, Any]:
    """The usual case: a module `mlp` that is entry and exit, and holds the matrices."""
    paths = {"entry": "mlp", "exit": "mlp", "up": f"mlp.{up}", "down": f"mlp.{down}"}
    return paths if gate is None else paths | {"gate": f"mlp.{gate}"}


_GATED = _in_mlp("up_proj", "down_proj", gate="gate_proj")
_FUSED = _in_mlp("gate_up_proj", "down_proj", gate="gate_up_proj")
_4H = _in_mlp("dense_h_to_4h", "dense_4h_to_h")
_OPT: dict[str, Any] = {"entry": "fc1", "exit": "fc2", "up": "fc1", "down": "fc2"}  # no FFN module
_GEMMA_LAYERS = ("model.layers", "model.language_model.layers")  # the second: Gemma 3 with its vision tower
_ACT_FN = "activation_function"

FAMILIES: list[Family] = [
    Family(("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo2"), "model.layers", **_GATED),
    Family(("smollm3", "granite"), "model.layers", **_GATED),
    Family(("gemma2", "gemma3_text", "gemma3"), _GEMMA_LAYERS, **_GATED, activation="hidden_activation"),
    Family(("phi3", "glm", "glm4"), "model.layers", **_FUSED),
    Family(("qwen3_moe", "mixtral"), "model.layers", **_GATED, experts="mlp.experts"),
    Family(("gpt2",), "transformer.h", **_in_mlp("c_fc", "c_proj"), conv1d=True, activation=_ACT_FN, width="n_inner"),
    Family(("opt",), "model.decoder.layers", **_OPT, activation=_ACT_FN, width="ffn_dim"),
    Family(("gpt_neox",), "gpt_neox.layers", **_4H),
    Family(("gptj",), "transformer.h", **_in_mlp("fc_in", "fc_out"), activation=_ACT_FN, width="n_inner"),
    Family(("phi",), "model.layers", **_in_mlp("fc1", "fc2")),
    Family(("starcoder2",), "model.layers", **_in_mlp("c_fc", "c_proj")),
    # Its own activation, xielu, has weights that are learned; with one of ACTIVATIONS it is Qwen3 without gates.
    Family(("apertus",), "model.layers", **_in_mlp("up_proj", "down_proj")),
    Family(("falcon",), "transformer.h", **_4H, activation="activation", width="ffn_hidden_size"),
    # mlp(A, residual) returns the sum. Under pretraining_tp > 1 with slow_but_exact it never calls the down
    # module, so that is no exit, and observe_intermediate sees nothing in that mode. The width is 4 d_model in code.
    Family(("bloom",), "transformer.h", **_4H, activation="=gelu_bloom", width=None),
]


@dataclass(frozen=True)
class Site:
    """One layer's FFN: `d_ff` basis vectors of width `d_model` (mixture of experts: experts * m of them).

    Rows are detached and, where storage allows, views: read them, never write to them. Only the rows of a
    mixture of experts are copies (one matrix of one layer at a time).
    """

    layer: int
    d_model: int
    d_ff: int
    gated: bool
    activation: str  # one of ACTIVATIONS
    entry: nn.Module
    exit: nn.Module
    # The modules that hold the matrices; with experts, all three are the experts module.
    up: nn.Module
    down: nn.Module
    gate: nn.Module | None = None
    conv1d: bool = False
    experts: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        """The weights' device; where accelerate offloaded them, the device that it will run them on."""
        name = "weight" if self.experts is None else "down_proj"
        weight = getattr(self.down, name, None)
        if weight is None:  # quantisation packed it into tensors of other names
            weight = next(iter(self.down.state_dict().values()))
        for hook in _offload_hooks(self.down) if weight.is_meta else []:
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
        return weight.device

    def up_rows(self) -> Tensor:
        """Rows of the first matrix, `[d_ff, d_model]`. Raises TypeError if the weights are quantised."""
        if self.experts is not None:
            return self._expert_matrix("gate_up_proj").chunk(2, dim=1)[1].reshape(self.d_ff, self.d_model)
        rows = self._matrix(self.up)
        return rows[self.d_ff :] if self.up is self.gate else rows

    def gate_rows(self) -> Tensor:
        """Rows of the gate matrix, `[d_ff, d_model]`. Raises ValueError without a gate, else as up_rows."""
        if self.gate is None:
            raise ValueError(f"layer {self.layer} has no gate: its FFN is a two-matrix MLP")
        if self.experts is not None:
            return self._expert_matrix("gate_up_proj").chunk(2, dim=1)[0].reshape(self.d_ff, self.d_model)
        return self._matrix(self.gate)[: self.d_ff]

    def down_rows(self) -> Tensor:
        """The value vectors v_j (columns of W_down) as rows, `[d_ff, d_model]`. Raises as up_rows."""
        if self.experts is not None:
            return self._expert_matrix("down_proj").mT.reshape(self.d_ff, self.d_model)
        return self._matrix(self.down).T

    def observe_intermediate(self, callback: Callable[[Tensor, int], None]) -> list[RemovableHandle]:
        """Call `callback(sums, tokens)` at every forward, until the returned handles are removed.

        `sums`: `[d_ff]` float32, the sum over the forward's tokens (padding included) of |M_j|, where M is
        the second matrix's input; `tokens`: how many there were. A dense FFN's M is read as it passes. A
        mixture of experts recomputes it, one expert at a time and only those that fired: basis j of expert e
        is number `e * m + j`, weighted by the routing weight, and zero on the tokens that did not choose e.
        """

        def dense(module: nn.Module, args: tuple[Any, ...]) -> None:
            intermediate = args[0].detach().reshape(-1, self.d_ff)
            callback(intermediate.abs().sum(0, dtype=torch.float32), intermediate.shape[0])

        def routed(module: nn.Module, args: tuple[Any, ...]) -> None:
            hidden, index, weights = args[:3]
            callback(self._routed_sums(hidden, index, weights), hidden.shape[0])

        return [self.down.register_forward_pre_hook(dense if self.experts is None else routed)]

    @torch.no_grad()
    def _routed_sums(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Sum |M| from the experts module's inputs `[tokens, d_model]`, `[tokens, k]` twice: `[d_ff]`."""
        matrices, experts = self._expert_matrix("gate_up_proj"), cast(Any, self.experts)
        sums = torch.zeros(self.d_ff, dtype=torch.float32, device=hidden.device).view(len(matrices), -1)
        for expert in index.unique().tolist():
            if expert >= len(matrices):  # expert parallelism marks another rank's experts this way
                continue
            token, choice = torch.where(index == expert)
            gate, up = F.linear(hidden[token], matrices[expert].to(hidden)).chunk(2, dim=-1)
            intermediate = experts.act_fn(gate) * up * weights[token, choice, None]
            sums[expert] = intermediate.abs().sum(0, dtype=torch.float32)
        return sums.flatten()

    def _expert_matrix(self, name: str) -> Tensor:
        """One 3-D parameter of the experts module."""
        return self._readable(_tensor(self.down, name), None)

    def _matrix(self, module: nn.Module) -> Tensor:
        """The matrix of a linear module as `[out, in]`."""
        size = _size(module, self.conv1d)
        weight = self._readable(_tensor(module, "weight"), size[::-1] if self.conv1d else size)
        return weight.T if self.conv1d else weight

    def _readable(self, weight: Tensor | None, shape: tuple[int, ...] | None) -> Tensor:
        """`weight`, detached, if it is a plain floating-point tensor (of this shape, if given)."""
        plain = type(weight) in (Tensor, nn.Parameter)
        if weight is None or not plain or weight.dtype not in _FLOATS or shape not in (None, weight.shape):
            what = f"{type(weight).__name__} {getattr(weight, 'dtype', '')} {[*getattr(weight, 'shape', ())]}"
            raise TypeError(
                f"layer {self.layer}: the FFN's weights are quantised ({what}): no rows to read. "
                "The initialisations 'gaussian' and 'activation' do not need them; the others need the model "
                "loaded in float32, bfloat16 or float16"
            )
        if weight.is_meta:
            raise RuntimeError(f"layer {self.layer}: its weights are on the meta device; load a checkpoint")
        return weight.detach()


def find_family(model: nn.Module) -> Family:
    """Return the last entry of FAMILIES whose `model_types` has the model's. ValueError: none does."""
    model_type = getattr(getattr(_unwrap(model), "config", None), "model_type", None)
    for family in reversed(FAMILIES):
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise ValueError(
        f"locas does not know where {type(_unwrap(model)).__name__} keeps its FFN: no entry of "
        f"locas.sites.FAMILIES has its config.model_type, {model_type!r}. Supported: {known}. To describe "
        f"a new family: locas.sites.FAMILIES.append(Family(model_types=({model_type!r},), "
        "layers='model.layers', entry='mlp', exit='mlp', gate='mlp.gate_proj', up='mlp.up_proj', "
        "down='mlp.down_proj')), with the module paths that print(model) shows"
    )


def decoder_of(model: nn.Module) -> nn.ModuleList:
    """Return a causal LM's decoder layers. ValueError: the family is unknown, or has them elsewhere."""
    paths = find_family(model).layers
    paths = (paths,) if isinstance(paths, str) else paths
    backbone = _unwrap(model)
    for path in paths:
        if (layers := _lookup(backbone, path)) is not None:
            return layers
    raise ValueError(
        f"{type(backbone).__name__} (config.model_type {backbone.config.model_type!r}) has no decoder layers "
        f"at {' or '.join(paths)}. Load it with its language-model head (AutoModelForCausalLM) and without "
        "wrappers, or describe it as a Family of its own in locas.sites.FAMILIES"
    )


def find_sites(model: nn.Module, layers: Iterable[int] | None = None) -> dict[int, Site]:
    """Find the FFNs of a causal LM, seen through `torch.compile`: `{layer: site}`, in layer order.

    Args:
        model: a causal LM of a family in FAMILIES.
        layers: layer indices from 0; None: all.

    Raises:
        ValueError: the family or its activation is unknown, the model is not built as its Family says, or a
            requested layer does not exist.
    """
    family, decoder = find_family(model), decoder_of(model)
    chosen = range(len(decoder)) if layers is None else _check_layers(layers, len(decoder))
    activation = _activation(model, family)
    return {index: _site(index, decoder[index], family, activation) for index in chosen}


def canonical_activation(name: str) -> str:
    """The name in ACTIVATIONS of an activation as a transformers config calls it. ValueError: unsupported."""
    canonical = ALIASES.get(name, name) if isinstance(name, str) else name
    if canonical not in ACTIVATIONS:
        raise ValueError(
            f"the FFN's activation {name!r} is not supported; supported: {', '.join(sorted({*ACTIVATIONS, *ALIASES}))}"
        )
    return canonical


def stored_names(family: Family, names: Iterable[str]) -> dict[tuple[int, str], str]:
    """Which of a checkpoint's names are FFN tensors: {(layer, "up.weight"): name}; the parts are up, gate, down.

    A fused gate/up matrix is "up". Names are known by their ends, since old checkpoints lack the beginning
    ("h.0.mlp.c_fc.weight"). Mixtures of experts have no such names.

    Raises:
        ValueError: two names for one tensor.
    """
    holders = (family.layers,) if isinstance(family.layers, str) else family.layers
    holder = "|".join(sorted({re.escape(path.rsplit(".", 1)[-1]) for path in holders}))
    parts = {family.gate: "gate", family.down: "down", family.up: "up"}  # the last wins where gate is up
    paths = "|".join(re.escape(path) for path in parts if path)
    pattern = re.compile(rf"(?:^|\.)(?:{holder})\.(\d+)\.({paths})\.(weight|bias)$")
    found: dict[tuple[int, str], str] = {}
    for name in names:
        if match := pattern.search(name):
            key = int(match[1]), f"{parts[match[2]]}.{match[3]}"
            if key in found:
                raise ValueError(f"the checkpoint has two tensors for one FFN matrix: {found[key]!r} and {name!r}")
            found[key] = name
    return found


def fingerprint(model: nn.Module, stored: Callable[[int, str], Tensor] | None = None) -> str:
    """Identify a backbone: 64 hex digits, SHA-256 over the shapes of its FFNs and a sample of their weights.

    Hashed are the model type, sizes and activation, and of every FFN weight its shape and at most
    FINGERPRINT_SAMPLE evenly strided elements, rounded to bfloat16: the float32 and the bfloat16 load of one
    bfloat16 checkpoint agree, a fine-tuned or quantised one does not. Hooks, devices and requires_grad do not
    count; a change of elements outside the sample goes unseen.

    Args:
        model: the backbone; it may be on the meta device if `stored` is given.
        stored: gives the weights in the model's place, by layer and part ("up.weight"), e.g. from a checkpoint.
    """
    sites = find_sites(model)
    facts = {
        "model_type": _unwrap(model).config.model_type,
        "layers": len(sites),
        "d_model": [site.d_model for site in sites.values()],
        "d_ff": [site.d_ff for site in sites.values()],
        "activation": [site.activation for site in sites.values()],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for site in sites.values():
        for name, weight in _weights(site):
            weight = weight if stored is None else stored(site.layer, name)
            if weight.is_meta:
                raise RuntimeError(f"layer {site.layer}: weights on the meta device have no fingerprint")
            digest.update(f"{site.layer} {name} {[*weight.shape]}".encode())
            digest.update(_sample_bytes(weight))
    return digest.hexdigest()


def _unwrap(model: nn.Module) -> Any:
    """See through torch.compile's wrappers."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def _lookup(module: nn.Module, path: str) -> Any:
    """The submodule at a dotted path, or None."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _check_layers(layers: Iterable[int], count: int) -> list[int]:
    """The requested layer indices, sorted and each once."""
    chosen = list(layers)
    wrong = [index for index in chosen if type(index) is not int or not 0 <= index < count]
    if wrong or not chosen:
        what = f"this model has no layers {wrong}" if wrong else "layers is empty"
        raise ValueError(
            f"{what}; allowed are integers from 0 to {count - 1} (negative ones do not count from the end), "
            "or None for all"
        )
    return sorted(set(chosen))


def _activation(model: nn.Module, family: Family) -> str:
    """The canonical name of the model's FFN activation."""
    if family.activation.startswith("="):
        return canonical_activation(family.activation[1:])
    config = _unwrap(model).config
    config = getattr(config, "text_config", config)  # where multimodal models keep the decoder's settings
    if not hasattr(config, family.activation):
        raise ValueError(
            f"{type(config).__name__} has no attribute {family.activation!r} with the FFN activation's name; "
            'set Family.activation to the right attribute, or to the name itself after "=", such as "=silu"'
        )
    return canonical_activation(getattr(config, family.activation))


def _site(index: int, layer: nn.Module, family: Family, activation: str) -> Site:
    """Describe one decoder layer's FFN."""

    def at(path: str) -> Any:
        return _required(layer, path, index)

    entry, exit_ = at(family.entry), at(family.exit)
    experts = _lookup(layer, family.experts) if family.experts else None
    if experts is not None:
        count, d_model, width = experts.down_proj.shape
        transposed = getattr(experts, "is_transposed", False) or not getattr(experts, "is_concatenated", True)
        if transposed or experts.gate_up_proj.shape != (count, 2 * width, d_model):
            raise ValueError(
                f"layer {index}: {family.experts} must hold gate_up_proj [experts, 2 m, d_model], gate first "
                f"and not interleaved, and down_proj [experts, d_model, m], not "
                f"{[*experts.gate_up_proj.shape]} and {[*experts.down_proj.shape]} (or stored transposed or "
                "interleaved, as is_transposed and is_concatenated say)"
            )
        sizes = (index, d_model, count * width, True, activation)
        return Site(*sizes, entry, exit_, up=experts, down=experts, gate=experts, experts=experts)
    up, down, gate = at(family.up), at(family.down), at(family.gate) if family.gate else None
    d_model, d_ff = _size(down, family.conv1d)
    wanted = (2 * d_ff if up is gate else d_ff, d_model)
    for path in (family.up, family.gate or family.up):
        if _size(at(path), family.conv1d) != wanted:
            raise ValueError(
                f"layer {index}: {family.down} maps {d_ff} to {d_model}, so {path} must have (out, in) = "
                f"{wanted}, not {_size(at(path), family.conv1d)}; check up, down, gate and conv1d of the "
                f"Family for {', '.join(family.model_types)}"
            )
    sizes = (index, d_model, d_ff, gate is not None, activation)
    return Site(*sizes, entry, exit_, up=up, down=down, gate=gate, conv1d=family.conv1d)


def _required(layer: nn.Module, path: str, index: int) -> nn.Module:
    """The module at a path of a Family; ValueError if the layer has none."""
    module = _lookup(layer, path)
    if module is None:
        names = ", ".join(name for name, _ in layer.named_modules() if name)
        raise ValueError(
            f"layer {index}, a {type(layer).__name__}, has no module at {path!r}; it has {names}. "
            "Describe this model as a Family of its own in locas.sites.FAMILIES"
        )
    return module


def _size(module: Any, conv1d: bool) -> tuple[int, int]:
    """(out, in) of a linear module: its attributes before its weight, which quantisation packs."""
    if hasattr(module, "out_features") and hasattr(module, "in_features"):
        return module.out_features, module.in_features
    rows, columns = module.weight.shape
    return (columns, rows) if conv1d else (rows, columns)


def _offload_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks that bring this module's offloaded weights in for its forward."""
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if getattr(one, "weights_map", None) is not None]


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """A module's tensor, fetched from where accelerate offloaded it to; None if it has none of that name."""
    value = getattr(module, name, None)
    if isinstance(value, Tensor) and value.is_meta:
        for hook in _offload_hooks(module):
            return hook.weights_map[name]
    return value if isinstance(value, Tensor) else None


def _tensors(module: nn.Module, *names: str) -> list[tuple[str, Tensor]]:
    """A module's tensors of these names; if quantisation packed them into others, all that it saves."""
    found = [(name, tensor) for name in names if (tensor := _tensor(module, name)) is not None]
    return found if len(found) == len(names) else sorted(module.state_dict().items())


def _weights(site: Site) -> Iterator[tuple[str, Tensor]]:
    """Every matrix of a site, as stored and named by its part, without biases; fused ones once."""
    if site.experts is not None:
        yield from _tensors(site.experts, "gate_up_proj", "down_proj")
        return
    for part, module in {"down": site.down, "up": site.up, "gate": site.gate}.items():
        if module is not None and not (part == "gate" and module is site.up):
            yield from ((f"{part}.{name}", tensor) for name, tensor in _tensors(module, "weight"))


def _sample_bytes(weight: Tensor) -> bytes:
    """At most FINGERPRINT_SAMPLE evenly strided elements; floats as bfloat16, anything else as stored."""
    # An odd stride is coprime to the powers of two that rows are long: the sample meets every column.
    stride = -(-weight.numel() // FINGERPRINT_SAMPLE) | 1
    sample = weight.detach().reshape(-1)[::stride].contiguous().cpu()
    sample = sample.to(torch.bfloat16) if sample.dtype in _FLOATS else sample
    return sample.view(torch.uint8).numpy().tobytes()
