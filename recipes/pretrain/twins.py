"""The two backbones: stock architectures of transformers, as alike as they can be but for the FFN.

* `tiny-glu`: Qwen3 (gated SiLU FFN).
* `tiny-mlp`: Apertus (FFN of two matrices) with ReLU.

Both: RMSNorm, norms on queries and keys, rotary positions, grouped key heads, tied embeddings. An FFN of width 1.5 f
with two matrices has the weights of one of width f with three, so the twins have equally many, and differ by the FFN
alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    ApertusConfig,
    AttentionInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from pretrain.settings import MODELS, Preset

ROPE_THETA = 10_000.0
_CAUSAL = "locas_pretrain_causal"


def config_of(name: str, preset: Preset, vocab: int) -> PretrainedConfig:
    """The configuration of one twin.

    Raises:
        ValueError: there is no twin of that name.
    """
    both = {
        "vocab_size": vocab,
        "hidden_size": preset.d_model,
        "num_hidden_layers": preset.n_layers,
        "num_attention_heads": preset.n_heads,
        "num_key_value_heads": preset.n_kv_heads,
        "max_position_embeddings": preset.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
    }
    if name == "tiny-glu":
        return Qwen3Config(
            **both, head_dim=preset.d_model // preset.n_heads, intermediate_size=preset.d_ff_glu, hidden_act="silu",
            sliding_window=None,
        )  # fmt: skip
    if name == "tiny-mlp":
        return ApertusConfig(**both, intermediate_size=preset.d_ff_glu * 3 // 2, hidden_act="relu", pad_token_id=None)
    raise ValueError(f"there is no twin {name!r}; choose one of {', '.join(MODELS)}")


def build(name: str, preset: Preset, vocab: int) -> PreTrainedModel:
    """A twin with fresh float32 weights, the same for the same seed; torch's global random state stays as it was.

    Its attention is the stock one, told that it is causal. Transformers' own, under torch.compile, builds the mask as
    a tensor, and with one there is no flash attention. Which attention a model has is no part of what is saved.
    """
    config = config_of(name, preset, vocab)
    AttentionInterface.register(_CAUSAL, _causal_attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(preset.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=_CAUSAL)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    return model


def _causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Attention in the form that transformers asks for. query, key, value: [batch, heads, seq, d_head]."""
    assert attention_mask is None
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=module.scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def n_parameters(model: nn.Module) -> int:
    """Numbers in a model, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def flops_a_token(preset: Preset, n: int, context: int) -> int:
    """Of training: 6 a weight (the tied embedding counts once, as the head), and the attention's, half of it masked."""
    return 6 * n + 6 * preset.n_layers * preset.d_model * context
