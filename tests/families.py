"""Tiny random models of every family, for tests: real architectures, a forward takes milliseconds.

All sizes are distinct, and prime where heads and rotary embeddings allow it, so that a transpose cannot hide;
biases and norms are random too, so that a forgotten one cannot.
"""

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
D_FF = 37
MAX_POSITIONS = 131

# hidden_size must be a multiple of the 2 heads, and rotary embeddings need an even head size.
_COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = {**_COMMON, "num_attention_heads": 2, "max_position_embeddings": MAX_POSITIONS}
_ROTARY = {**_BASE, "hidden_size": 20, "intermediate_size": D_FF, "num_key_value_heads": 1}
_HEAD_DIM = {**_ROTARY, "hidden_size": 22, "head_dim": 6}
_GEMMA = {**_HEAD_DIM, "query_pre_attn_scalar": 6, "sliding_window": 29}
_OPT = {**_BASE, "hidden_size": 22, "ffn_dim": D_FF, "dropout": 0.0}
_N = {**_COMMON, "n_embd": 22, "n_head": 2, "n_positions": MAX_POSITIONS, "n_inner": D_FF}
_EXPERTS = {"num_experts_per_tok": 2}
_SIGLIP = {"hidden_size": 6, "intermediate_size": 7, "num_hidden_layers": 1, "num_attention_heads": 1}

_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {**_HEAD_DIM, "mlp_bias": True, "attention_bias": True},
    "mistral": {**_HEAD_DIM, "sliding_window": 29},
    "qwen2": _ROTARY,
    "qwen3": _HEAD_DIM,
    "gemma": _HEAD_DIM,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _ROTARY,
    "olmo2": _ROTARY,
    "smollm3": {**_ROTARY, "mlp_bias": True},
    "glm": {**_HEAD_DIM, "head_dim": 8},
    "glm4": {**_HEAD_DIM, "head_dim": 8},
    "granite": _ROTARY,
    "gpt2": _N,
    "opt": {**_OPT, "word_embed_proj_dim": 22},
    "opt_post_norm": {**_OPT, "word_embed_proj_dim": 13, "do_layer_norm_before": False},  # as OPT-350M is
    "gpt_neox": {**_ROTARY, "rotary_pct": 0.4},
    "gptj": {**_N, "rotary_dim": 4},
    "phi": {**_ROTARY, "hidden_size": 24},
    "starcoder2": _ROTARY,
    "apertus": {**_ROTARY, "hidden_act": "relu", "pad_token_id": None},
    "falcon": {**_BASE, "hidden_size": 20, "ffn_hidden_size": D_FF, "bias": True},
    "bloom": {**_COMMON, "hidden_size": 22, "n_head": 2},
    "qwen3_moe": {
        **_HEAD_DIM,
        **_EXPERTS,
        "num_experts": 5,
        "moe_intermediate_size": 13,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {**_HEAD_DIM, **_EXPERTS, "intermediate_size": 13, "num_local_experts": 5},
    "gemma3": {
        "text_config": {**_GEMMA, "model_type": "gemma3_text"},
        "vision_config": {**_SIGLIP, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
        "image_token_index": 96,
        "boi_token_index": 95,
        "eoi_token_index": 94,
    },
}

GATED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3"]
GATED += ["glm", "glm4", "granite"]
MLP = ["gpt2", "opt", "opt_post_norm", "gpt_neox", "gptj", "phi", "starcoder2", "apertus", "falcon", "bloom"]
MOE = ["qwen3_moe", "mixtral"]
ABSOLUTE = {"gpt2", "opt", "opt_post_norm"}  # positions by number, learnt
MULTIMODAL = ["gemma3"]  # tiny_model makes it, but it is not in FAMILY_NAMES: only its text half is ours
FAMILY_NAMES: list[str] = GATED + MLP + MOE


def tiny_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, layers: int = 3) -> PreTrainedModel:
    """A random model of a family, in eval mode: the same weights for every dtype.

    Args:
        name: one of FAMILY_NAMES or MULTIMODAL.
        dtype: of the weights, which are drawn in float64 and rounded.
        seed: of the weights; the global generator is left as it was.
        layers: how many decoder layers. In qwen3_moe layer 1 is dense.
    """
    settings = copy.deepcopy(_SETTINGS[name])
    settings.get("text_config", settings)["num_hidden_layers"] = layers
    config = AutoConfig.for_model("opt" if name == "opt_post_norm" else name, **settings)
    # The default experts implementation, grouped_mm, has no float64 and wants rows in multiples of 16 bytes.
    extra = {"experts_implementation": "eager"} if name in MOE else {}
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **extra)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        _randomise(parameter, generator)
    return model.eval()


@torch.no_grad()
def _randomise(parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Matrices of standard deviation 1/sqrt(last size); vectors (norms, biases) 0.3 around what they are."""
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if parameter.dim() > 1:
        parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    else:
        parameter.copy_(parameter.double().round() + 0.3 * noise)
