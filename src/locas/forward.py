"""Running a frozen backbone over a window: the prefix without gradients, then the chunk that is scored.

                 prefix (context only)            chunk (scored, and learnt from)
    inputs:  [start] x_w ......... x_s-2      x_s-1  x_s ......... x_e-2
    targets:                                  x_s    x_s+1 ....... x_e-1

The prefix leaves keys and values behind; the chunk's pass uses them. With gradients on, only the chunk's pass
has a graph, so a write costs one backward pass over the chunk, not over the window.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from locas.attention import AttentionGradient, ChunkAttention
from locas.head import IGNORED, head_nll, token_nll
from locas.lean import recomputed
from locas.sites import decoder_of

_PROBE_TOKENS = 5
_ROUNDING, _ROUNDING_LOW = 0.01, 0.05  # of a layer's output; positions that are absolute move it by 0.2 and more
_TORCHS: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()  # by the attention that is set
_SEEN: WeakKeyDictionary[nn.Module, dict[Any, int | None]] = WeakKeyDictionary()  # of its masks and keys, on CUDA
_RELATIVE: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()  # what was found out, by reach


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, with no parameter trainable and not compiled; all is put back afterwards.

    Not compiled, because compiled code does not see the hooks that come and go while a text is read.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        model.eval()
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def chunk_logits(model: nn.Module, inputs: Tensor, prefix_tokens: int) -> Tensor:
    """Logits of the positions behind the prefix, with gradients where the caller has them on.

    Args:
        model: a causal language model in evaluation mode.
        inputs: [batch, seq] token ids; positions count from 0. Rows may be padded on the right with any id:
            nothing that is causal sees it.
        prefix_tokens: how many positions are context only.

    Returns:
        [batch, seq - prefix_tokens, vocab] in the model's dtype.
    """
    return call(model, inputs[:, prefix_tokens:], **read_prefix(model, inputs[:, :prefix_tokens])).logits


def chunk_nll(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    prefix: dict[str, Any],
    head: nn.Linear | None,
    gradient: AttentionGradient = "full",
    recompute_ffn: bool = False,
) -> Tensor:
    """Loss in nats of the chunk's targets, with gradients where the caller has them on.

    Args:
        model: a causal language model in evaluation mode.
        inputs: [batch, seq] the chunk's token ids.
        targets: [batch, seq] the ids to be predicted; `IGNORED` where nothing is scored.
        prefix: what `read_prefix` returned.
        head: what `find_head` returned.
        gradient: what of attention the gradients go through, where `attention_is_torchs`.
        recompute_ffn: see `ReadSettings`.

    Returns:
        [batch, seq] float32 or better; 0 where the target is `IGNORED`.
    """
    with (
        ChunkAttention(gradient, _SEEN.setdefault(model, {})),
        recomputed(recompute_ffn) if torch.is_grad_enabled() else nullcontext(),
    ):
        output = call(model if head is None else decoder(model), inputs, **prefix)
    return token_nll(output.logits, targets) if head is None else head_nll(output.last_hidden_state, head, targets)


def read_prefix(model: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """Reads context without gradients: [batch, seq] token ids, possibly none. Returns what the call with the tokens
    after it needs, a cache of keys and values; it goes with one call, which uses it up layer by layer."""
    if inputs.shape[1] == 0:
        return {}
    body = decoder(model)
    past = _sliding_cache(body, inputs.device)
    with torch.no_grad():
        past = call(body, inputs, use_cache=True, past_key_values=past).past_key_values
    for layer in past.layers:
        layer.update = partial(_used_up, layer)
    return {"past_key_values": past, "use_cache": True}


def _sliding_cache(body: nn.Module, device: torch.device) -> DynamicCache | None:
    """The cache that the model would make itself; but what its sliding layers hold of their own lies on the device from
    the beginning, where they would copy it from the host, which cannot be captured. None: it has no such layers."""
    past = DynamicCache(config=body.config)
    sliding = [layer for layer in past.layers if hasattr(layer, "_sliding_window_tensor")]
    for layer in sliding:
        layer._sliding_window_tensor = torch.full((), layer.sliding_window, dtype=torch.long, device=device)
    return past if sliding else None


def _used_up(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """A cache layer's next `update`, after which it holds nothing: what nobody reads again is freed while the layers
    above run, which need the room."""
    del layer.update  # this function, which holds the layer: it would outlive its use
    keys, values = layer.update(*args, **kwargs)
    layer.keys, layer.values = keys.new_empty(0), values.new_empty(0)
    return keys, values


def find_head(model: nn.Module) -> nn.Linear | None:
    """The output matrix, where the model's logits are no more than its product with the decoder's output, bit for bit,
    so that `chunk_nll` need not hold all logits; else None. Found out by running two tokens."""
    base, getter = decoder(model), getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if base is model or type(head) is not nn.Linear or _is_watched(head) or head.weight.device.type == "meta":
        return None
    probe = torch.arange(2, device=device_of(model))[None]
    with torch.no_grad(), frozen(model):
        hidden = getattr(call(base, probe), "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != head.in_features or hidden.device != head.weight.device:
            return None
        return head if torch.equal(call(model, probe).logits, head(hidden)) else None


def _is_watched(module: nn.Module) -> bool:
    """Whether someone else's hooks would be passed over if the module's weight were used without calling it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, getattr(module, "_hf_hook", None))
    return any(hooks)


def call(model: nn.Module, inputs: Tensor, **more: Any) -> Any:
    """One forward pass, by default without a cache."""
    return model(input_ids=inputs, **({"use_cache": False} | more))


def decoder(model: nn.Module) -> nn.Module:
    """The model without its output head: a prefix needs no logits."""
    model = getattr(model, "_orig_mod", model)
    base = getattr(model, "base_model", None)
    return base if isinstance(base, nn.Module) else model


def trained_context(model: nn.Module) -> int | None:
    """The longest window, in tokens, that the backbone was trained for, as its config says; None if it doesn't."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def in_windows(model: nn.Module, ids: Tensor, start_id: int | None, tokens: int = 2048) -> list[Tensor]:
    """A text in windows that lie side by side, each with the start token before it.

    Args:
        model: a window is never longer than the context that it was trained for.
        ids: [n] int64.
        start_id: None: no start token.
        tokens: of a window, start token included.
    """
    lead = ids.new_tensor([] if start_id is None else [start_id])
    size = max(1, min(trained_context(model) or tokens, tokens) - len(lead))
    return [torch.cat([lead, part]) for part in ids.split(size)]


def input_embedding(model: Any) -> nn.Module:
    """The module that token ids go into."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    return embedding


def device_of(model: nn.Module) -> torch.device:
    """Where token ids go in: the device of the input embedding."""
    embedding = input_embedding(model)
    device = next(embedding.parameters()).device
    # accelerate keeps offloaded weights on "meta" and brings them to the execution device for the call.
    hook = getattr(embedding, "_hf_hook", None)
    if device.type == "meta" and hook is not None:
        return torch.device(hook.execution_device)
    return device


def attention_is_torchs(model: nn.Module) -> bool:
    """Whether every decoder layer's attention is torch's `scaled_dot_product_attention`, whose gradients
    `AttentionGradient` chooses: found out by running two tokens. False where a model computes attention itself
    (`attn_implementation="eager"`, BLOOM, GPT-J, Gemma 2) or with other kernels."""
    known, which = _TORCHS.setdefault(model, {}), getattr(getattr(model, "config", None), "_attn_implementation", None)
    if which not in known:
        probe = torch.arange(2, device=device_of(model))[None]
        with torch.no_grad(), frozen(model), ChunkAttention() as seen:
            call(decoder(model), probe)
        known[which] = seen.calls >= len(decoder_of(model))
    return known[which]


def possible_gradient(gradient: AttentionGradient, model: nn.Module) -> AttentionGradient:
    """What was asked for, or the full gradient, with a warning, where the backbone does not leave the choice."""
    if gradient == "full" or attention_is_torchs(model):
        return gradient
    warnings.warn(
        f"{type(model).__name__} does not compute attention with torch's scaled_dot_product_attention, so writes take "
        'the full gradient through it (attention_gradient "full"), which is slower',
        stacklevel=3,
    )
    return "full"


def positions_are_relative(model: nn.Module, reach: int) -> bool:
    """Whether shifting all positions by `reach` leaves the first layer's output as it is, up to rounding: found out by
    running a few tokens. False for learnt or sinusoidal positions, and where there is an end to the positions.

    Args:
        model: a causal language model.
        reach: the largest shift that will occur, in tokens.
    """
    known = _RELATIVE.setdefault(model, {})
    if reach not in known:
        known[reach] = _shifts_freely(model, reach)
    return known[reach]


def _shifts_freely(model: nn.Module, reach: int) -> bool:
    # On copies on the CPU: beyond learnt positions it raises, where CUDA would end every later call of the process.
    body = decoder(model)
    on_many = any(
        hasattr(module, "_hf_hook") for module in body.modules()
    )  # accelerate's: they move tensors themselves
    ids = torch.arange(_PROBE_TOKENS, device=device_of(model) if on_many else "cpu")[None]
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        named = getattr(output, "last_hidden_state", None), getattr(output, "logits", None)  # a whole model's
        found.append(next((x for x in named if x is not None), output[0] if isinstance(output, tuple) else output))
        raise _Seen

    try:
        looked_at, *later = decoder_of(model)  # deeper ones have rounded more often: in bfloat16 by a tenth after 12
    except ValueError:
        looked_at, later = body, []
    unseen = {id(t) for layer in later for t in (*layer.parameters(), *layer.buffers())}
    named = () if on_many else (*body.named_parameters(), *body.named_buffers())
    copies = {name: tensor.cpu() for name, tensor in named if id(tensor) not in unseen}
    handle = looked_at.register_forward_hook(keep)
    with torch.no_grad(), frozen(model):
        try:
            for shift in (0, 1, reach):
                arguments = {"input_ids": ids, "position_ids": ids + shift, "use_cache": False}
                with suppress(_Seen):
                    torch.func.functional_call(body, copies, (), arguments)
                if not _near(found[-1], found[0]):
                    return False
        except (TypeError, IndexError, RuntimeError):
            return False
        finally:
            handle.remove()
    return True


class _Seen(Exception):
    """What was looked for is there: the rest of the model need not run."""


def _near(x: Tensor, other: Tensor) -> bool:
    rounding = _ROUNDING_LOW if x.dtype in (torch.bfloat16, torch.float16) else _ROUNDING
    x, other = x.double(), other.double()
    return bool(((x - other).norm(dim=-1) <= rounding * other.norm(dim=-1)).all())


__all__ = [
    "IGNORED",
    "attention_is_torchs",
    "call",
    "chunk_logits",
    "chunk_nll",
    "decoder",
    "device_of",
    "find_head",
    "frozen",
    "in_windows",
    "input_embedding",
    "positions_are_relative",
    "possible_gradient",
    "read_prefix",
    "token_nll",
    "trained_context",
]
