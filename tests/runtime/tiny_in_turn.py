"""Tiny models that no packed forward can serve, and what lane each is to get."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.runtime.tiny_models import BASE, EOS_TOKEN_ID, EXPERTS, VOCAB_SIZE, build_from_config

LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
GATED_DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": LINEAR,
}
MAMBA2 = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8}
PLAIN = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
    "tie_word_embeddings": False,
}

STATE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-next": ("Qwen3NextConfig", {**BASE, **GATED_DELTA, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3.5": ("Qwen3_5TextConfig", {**BASE, **GATED_DELTA}),
    "lfm2": (
        "Lfm2Config",
        {
            **BASE,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "falcon-h1": ("FalconH1Config", {**BASE, **MAMBA2, "mamba_d_ssm": 96}),
    "granite-hybrid": (
        "GraniteMoeHybridConfig",
        {
            **BASE,
            **MAMBA2,
            "layer_types": ["mamba", "attention", "mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
        },
    ),
    "bamba": ("BambaConfig", {**BASE, **MAMBA2, "attn_layer_indices": [1, 3]}),
    "nemotron-h": (
        "NemotronHConfig",
        {
            **BASE,
            "head_dim": 16,
            "mamba_num_heads": 6,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {**PLAIN, "num_heads": 6, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 8},
    ),
}
"""Whose prompts go on in chunks."""
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {**PLAIN, "state_size": 8}),
    "jamba": (
        "JambaConfig",
        {
            **BASE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
}
"""Whose prompts have to be read at once."""
SERIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("FalconConfig", {**PLAIN, "num_attention_heads": 4}),
    "bloom": ("BloomConfig", {**PLAIN, "n_head": 4, "n_layer": 3}),
    "gptj": ("GPTJConfig", {**PLAIN, "n_embd": 48, "n_head": 4, "n_layer": 3, "rotary_dim": 8, "n_positions": 512}),
    "rwkv": ("RwkvConfig", {**PLAIN, "attention_hidden_size": 48, "context_length": 512}),
}
"""That keep a cache of their own, or attend by themselves."""
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax": (
        "MiniMaxConfig",
        {
            **BASE,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 16,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
}
"""Whose own cache gives other logits than their own forward without it, once a prompt is longer than a block."""
ALL = {**STATE, **WHOLE, **SERIAL}


def build_in_turn(family: str, **overrides: Any) -> PreTrainedModel:
    """The family's tiny model in float32, the same weights every time."""
    config_class, arguments = {**ALL, **WRONG}[family]
    model = build_from_config(getattr(transformers, config_class)(**{**arguments, **overrides}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at birth: a test on them would see nothing
                parameter.uniform_(-0.5, 0.5, generator=generator)
    return model
