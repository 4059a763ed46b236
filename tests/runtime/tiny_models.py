"""Tiny models with random weights, one for each family, built offline from shrunken configurations.

Windows are short and softcaps low, so that a backend which forgot either gives other logits within a few tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 160
EOS_TOKEN_ID = 2

BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
    "tie_word_embeddings": False,
}
WINDOWED = {"head_dim": 16, "sliding_window": 6}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 48,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE),
    "llama3-rope": ("LlamaConfig", {**BASE, "rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2Config", BASE),
    "qwen2-windowed": (
        "Qwen2Config",
        {**BASE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 16}),
    "qwen3-moe": ("Qwen3MoeConfig", {**BASE, "head_dim": 16, **EXPERTS}),
    "gemma2": (
        "Gemma2Config",
        {**BASE, **WINDOWED, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "layer_types": ALTERNATING},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**BASE, **WINDOWED, "query_pre_attn_scalar": 16, "layer_types": ALTERNATING},
    ),
    "mistral": ("MistralConfig", {**BASE, "sliding_window": 6}),
    "mixtral": ("MixtralConfig", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3Config", BASE),
    "gpt2": ("GPT2Config", GPT2),
    "gpt-oss": (
        "GptOssConfig",
        {**BASE, **WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ALTERNATING},
    ),
    "olmo2": ("Olmo2Config", BASE),
    "granite": ("GraniteConfig", {**BASE, "attention_multiplier": 0.3, "residual_multiplier": 0.7}),
    "smollm3": ("SmolLM3Config", {**BASE, "no_rope_layer_interval": 2}),
    "deepseek-v3": ("DeepseekV3Config", {**BASE, **LATENT}),
}


def build_from_config(config: Any, attention: str | None = None) -> PreTrainedModel:
    """A causal model with random weights in float32, the same every time."""
    torch.manual_seed(1)
    make: Any = AutoModelForCausalLM.from_config
    model: PreTrainedModel = make(config, dtype=torch.float32, attn_implementation=attention)
    model.train(False)
    return model


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model in another number format."""
    torch.nn.Module.to(model, dtype)
    return model


def build_tiny(family: str, **overrides: Any) -> PreTrainedModel:
    """The family's tiny model in float32, the same weights every time."""
    config_class, arguments = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**arguments, **overrides})
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = build_from_config(config, attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("sinks", "bias")):  # zero or empty at birth: a test on them would see nothing
                parameter.uniform_(-1.0, 1.0)
    return model
