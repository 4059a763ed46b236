"""A tiny model of every architecture that transformers reads from GGUF files: what is unlike its class's defaults."""

from __future__ import annotations

from typing import Any

from tests.runtime.tiny_models import BASE, EXPERTS, GPT2, LLAMA3_ROPE, VOCAB_SIZE

BASE_FREQUENCY = 500.0
"""No class's default."""
ROPE = {"rope_type": "default", "rope_theta": BASE_FREQUENCY}
WIDE = {**BASE, "head_dim": 16, "rope_parameters": ROPE}
TIED = {"tie_word_embeddings": True}
GEMMA = {**BASE, **TIED, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "num_hidden_layers": 6}
QWEN35 = {
    **WIDE,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "full_attention_interval": 4,
    "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5},
}
GEMMA4_TYPES = [*["sliding_attention"] * 2, "full_attention"] * 2
GEMMA4 = {
    **BASE,
    **TIED,
    "num_hidden_layers": 6,
    "layer_types": GEMMA4_TYPES,
    "sliding_window": 6,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 20.0,
    "rope_parameters": {
        "sliding_attention": ROPE,
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 3000.0},
    },
}
GLOBAL_HEADS = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": BASE_FREQUENCY,
    "long_factor": [1.5] * 6,
    "short_factor": [1.1] * 6,
    "original_max_position_embeddings": 128,
}
LLAMA31_ROPE = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192, "rope_theta": 500_000.0}
LATER = {
    "yarn": {"rope_type": "yarn", "rope_theta": BASE_FREQUENCY, "factor": 4.0, "original_max_position_embeddings": 128},
    "linear": {"rope_type": "linear", "rope_theta": BASE_FREQUENCY, "factor": 3.0},
}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaConfig", {**WIDE, "rope_parameters": ROPE}),
    "llama-3.1": ("llama", "LlamaConfig", {**WIDE, "max_position_embeddings": 65536, "rope_parameters": LLAMA31_ROPE}),
    "llama-linear": ("llama", "LlamaConfig", {**BASE, "rope_parameters": LATER["linear"]}),
    "qwen2": ("qwen2", "Qwen2Config", {**BASE, "rope_parameters": ROPE}),
    "qwen2-yarn": ("qwen2", "Qwen2Config", {**BASE, "rope_parameters": LATER["yarn"]}),
    "qwen2moe": ("qwen2moe", "Qwen2MoeConfig", {**BASE, **EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3": ("qwen3", "Qwen3Config", {**WIDE, **TIED}),
    "qwen3moe": ("qwen3moe", "Qwen3MoeConfig", {**WIDE, **EXPERTS, "norm_topk_prob": True}),
    "qwen35": ("qwen35", "Qwen3_5TextConfig", QWEN35),
    "qwen35moe": ("qwen35moe", "Qwen3_5MoeTextConfig", {**QWEN35, **EXPERTS, "shared_expert_intermediate_size": 40}),
    "gpt-oss": (
        "gpt-oss",
        "GptOssConfig",
        {**BASE, "head_dim": 16, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "falcon": (
        "falcon",
        "FalconConfig",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
    "phi3": (
        "phi3",
        "Phi3Config",
        {**BASE, "sliding_window": 6, "original_max_position_embeddings": 512, "rope_parameters": ROPE},
    ),
    "phi3-long": (
        "phi3",
        "Phi3Config",
        {**BASE, "original_max_position_embeddings": 128, "rope_parameters": LONG_ROPE},
    ),
    "phi4-mini": (
        "phi3",
        "Phi3Config",
        {
            **BASE,
            **TIED,
            "original_max_position_embeddings": 512,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        },
    ),
    "bloom": ("bloom", "BloomConfig", {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "n_layer": 4, "n_head": 4}),
    "stablelm": (
        "stablelm",
        "StableLmConfig",
        {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "gpt2": ("gpt2", "GPT2Config", GPT2),
    "starcoder2": (
        "starcoder2",
        "Starcoder2Config",
        {**BASE, **TIED, "rope_parameters": ROPE, "sliding_window": 6, "use_bias": True},
    ),
    "mamba": (
        "mamba",
        "MambaConfig",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 3, "state_size": 8, **TIED},
    ),
    "nemotron": ("nemotron", "NemotronConfig", {**BASE, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "gemma2": ("gemma2", "Gemma2Config", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3", "Gemma3TextConfig", GEMMA),
    "gemma4-e2b": (
        "gemma4",
        "Gemma4TextConfig",
        {
            **GEMMA4,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
    ),
    "gemma4-31b": ("gemma4", "Gemma4TextConfig", {**GEMMA4, **GLOBAL_HEADS}),
    "gemma4-26b": (
        "gemma4",
        "Gemma4TextConfig",
        {
            **GEMMA4,
            **GLOBAL_HEADS,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "lfm2": (
        "lfm2",
        "Lfm2Config",
        {**BASE, **TIED, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    ),
    "minimax-m2": (
        "minimax-m2",
        "MiniMaxM2Config",
        {**BASE, "head_dim": 16, "rotary_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
"""By name: llama.cpp's architecture, transformers' configuration class, and what is said to it."""
