"""Gemma 4's configuration. Its layers have two kinds of everything, which transformers' reader refuses or passes over.

As llama.cpp's converter writes it (``conversion/gemma.py``).
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from lmserve.runtime.gguf.file import GGUFFile
from lmserve.runtime.gguf.rope import FREQUENCIES

KEYS = frozenset(
    {
        "attention.shared_kv_layers",
        "embedding_length_per_layer_input",
        "attention.sliding_window_pattern",
        "attention.key_length_swa",
        "attention.value_length_swa",
    }
)
"""That no other architecture has."""
PER_LAYER = "per_layer_token_embd.weight"
NO_ROTATION = 1e30
"""By this the frequencies are divided that are not to turn."""


def gemma4_config(file: GGUFFile) -> Any:
    """transformers' configuration, from the file alone.

    Raises:
        ModelLoadFailed: the file says something that is not understood.
    """
    sliding = [bool(each) for each in file.keys.get("attention.sliding_window_pattern") or ()]
    layers = file.get("block_count")
    if len(sliding) != layers or all(sliding) or not any(sliding):
        raise file.not_understood("attention.sliding_window_pattern")
    full = sliding.index(False)
    widths = _by_layer(file, "feed_forward_length", layers)
    heads = _by_layer(file, "attention.head_count_kv", layers)
    shared = file.get("attention.shared_kv_layers") or 0
    doubled = max(widths) == 2 * widths[0]
    if widths != [widths[0] * (2 if doubled and i >= layers - shared else 1) for i in range(layers)]:
        raise file.not_understood("feed_forward_length")
    if heads != [heads[sliding.index(True)] if each else heads[full] for each in sliding]:
        raise file.not_understood("attention.head_count_kv")
    experts = file.get("expert_count") or 0
    per_layer = file.tensors.get(PER_LAYER)
    vocabulary = file.vocabulary()
    return AutoConfig.for_model(
        "gemma4_text",
        **vocabulary,
        max_position_embeddings=file.get("context_length"),
        hidden_size=file.get("embedding_length"),
        num_hidden_layers=layers,
        num_attention_heads=file.get("attention.head_count"),
        num_key_value_heads=heads[sliding.index(True)],
        num_global_key_value_heads=heads[full],
        head_dim=file.get("attention.key_length_swa"),
        global_head_dim=file.get("attention.key_length"),
        attention_k_eq_v=f"blk.{full}.attn_v.weight" not in file.tensors,
        layer_types=["sliding_attention" if each else "full_attention" for each in sliding],
        sliding_window=file.get("attention.sliding_window"),
        intermediate_size=widths[0],
        use_double_wide_mlp=doubled,
        num_kv_shared_layers=shared,
        hidden_size_per_layer_input=file.get("embedding_length_per_layer_input") or 0,
        vocab_size_per_layer_input=per_layer.shape[1] if per_layer else vocabulary["vocab_size"],
        enable_moe_block=experts > 0,
        num_experts=experts or None,
        top_k_experts=file.get("expert_used_count") or None,
        moe_intermediate_size=file.get("expert_feed_forward_length"),
        rms_norm_eps=file.get("attention.layer_norm_rms_epsilon"),
        final_logit_softcapping=file.get("final_logit_softcapping"),
        rope_parameters=_rope(file),
    )


def _by_layer(file: GGUFFile, key: str, layers: int) -> list[int]:
    value: Any = file.keys.get(key)
    if isinstance(value, tuple):
        if len(value) != layers:
            raise file.not_understood(key)
        return [int(each) for each in value]
    return [value] * layers


def _rope(file: GGUFFile) -> dict[str, Any]:
    """Sliding layers turn all of a head, full ones a part of it, the first frequencies."""
    known = {"freq_base", "freq_base_swa", "dimension_count", "dimension_count_swa", "scaling.finetuned"}
    for key in file.keys:
        if key.startswith("rope.") and key.removeprefix("rope.") not in known:
            raise file.not_understood(key)
    for width, head in (("", ""), ("_swa", "_swa")):
        if file.get(f"rope.dimension_count{width}") != file.get(f"attention.key_length{head}"):
            raise file.not_understood(f"rope.dimension_count{width}")
    turned = 1.0
    if FREQUENCIES in file.tensors:
        divisors = file.read(FREQUENCIES).tolist()
        count = divisors.count(1.0)
        if any(each != 1.0 for each in divisors[:count]) or any(each < NO_ROTATION / 10 for each in divisors[count:]):
            raise file.not_understood("rope.dimension_count")
        turned = count / len(divisors)
    return {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": turned,
            "rope_theta": file.get("rope.freq_base"),
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": file.get("rope.freq_base_swa")},
    }
