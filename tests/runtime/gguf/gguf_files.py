"""Tiny models of every architecture, written into GGUF files as llama.cpp's converters write them.

Names come from the gguf package. What converters do to weights and what they say of a model is their own
(``convert_hf_to_gguf.py`` and ``conversion/``), and written out here: not the inverse of what is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from tests.runtime.gguf.gguf_cases import CASES
from tests.runtime.tiny_models import VOCAB_SIZE, build_from_config


def build(case: str, **overrides: Any) -> PreTrainedModel:
    """The case's model, with norms, biases and scales that are not what they are at birth."""
    _, config_class, arguments = CASES[case]
    config = getattr(transformers, config_class)(**{**arguments, **overrides})
    model = build_from_config(config, "eager" if getattr(config, "attn_logit_softcapping", None) else None)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("sinks", "layer_scalar")) or (tensor.dim() == 1 and "A_log" not in name):
                tensor.add_(0.3 * torch.rand_like(tensor))
    return model


Also = Callable[[gguf.GGUFWriter], None]


def some_words(writer: gguf.GGUFWriter) -> None:
    """A vocabulary for models that are read by their logits."""
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB_SIZE)])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB_SIZE)
    writer.add_token_merges(["t 1"])
    for add, number in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_pad_token_id, 0)):
        add(number)


def write(path: Path, case: str, model: PreTrainedModel, also: Also | None = None, words: Also = some_words) -> None:
    """The model as a file. ``also`` may say more; ``words`` says the vocabulary."""
    architecture = CASES[case][0]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    _say(writer, architecture, model.config)
    words(writer)
    if also is not None:
        also(writer)
    for name, array in _tensors(architecture, model):
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _say(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    writer.add_context_length(getattr(config, "max_position_embeddings", 512))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    epsilons = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    epsilon = next(getattr(config, name) for name in epsilons if hasattr(config, name))
    by_layer_norm = architecture in ("falcon", "bloom", "gpt2", "starcoder2", "stablelm", "nemotron")
    (writer.add_layer_norm_eps if by_layer_norm else writer.add_layer_norm_rms_eps)(epsilon)
    if architecture == "mamba":
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(config.conv_kernel)
        writer.add_ssm_inner_size(config.intermediate_size)
        writer.add_ssm_state_size(config.state_size)
        writer.add_ssm_time_step_rank(config.time_step_rank)
        return
    heads = config.num_attention_heads
    writer.add_head_count(heads)
    if architecture == "gemma4":
        _say_gemma4(writer, config)
        return
    if not architecture.startswith("qwen35moe"):
        writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    if architecture == "lfm2":
        writer.add_head_count_kv([config.num_key_value_heads * (kind != "conv") for kind in config.layer_types])
        writer.add_shortconv_l_cache(config.conv_L_cache)
    else:
        kv_heads = 1 if architecture == "falcon" else getattr(config, "num_key_value_heads", None)
        writer.add_head_count_kv(kv_heads or heads)
    _say_attention(writer, architecture, config)
    _say_experts(writer, architecture, config)
    if architecture.startswith("qwen35"):
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
        writer.add_full_attention_interval(4)
        writer.add_rope_dimension_sections([*config.rope_parameters["mrope_section"], 0])


def _say_attention(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture in (
        "qwen3",
        "qwen3moe",
        "qwen35",
        "qwen35moe",
        "gemma2",
        "gemma3",
        "gpt-oss",
        "minimax-m2",
        "llama",
    ):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if architecture == "phi3" or getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window or 0)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    rope = getattr(config, "rope_parameters", None)
    if rope is None or architecture == "falcon":
        return
    rope = rope.get("full_attention", rope)
    if architecture != "stablelm":
        writer.add_rope_freq_base(rope["rope_theta"])
    if architecture != "gemma3":
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1)))
    kind = rope["rope_type"]
    if kind in ("yarn", "linear"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if kind == "longrope":
        scale, original = config.max_position_embeddings / 128, 128
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(scale) / np.log(original))))


def _say_experts(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    count = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if not count:
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if architecture == "minimax-m2":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _say_gemma4(writer: gguf.GGUFWriter, config: Any) -> None:
    said = CASES_BY_LAYERS[config.num_kv_shared_layers, config.attention_k_eq_v, config.enable_moe_block]
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    shared = config.num_kv_shared_layers
    width, heads = said["intermediate_size"], said["num_key_value_heads"]
    layers = range(config.num_hidden_layers)
    writer.add_feed_forward_length([width * (1 + (i >= len(sliding) - shared)) for i in layers] if shared else width)
    global_heads = said.get("num_global_key_value_heads")
    writer.add_head_count_kv([heads if each else global_heads for each in sliding] if global_heads else heads)
    writer.add_sliding_window(config.sliding_window)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_sliding_window_pattern(sliding)
    for add, number in (
        (writer.add_key_length, 32),
        (writer.add_value_length, 32),
        (writer.add_key_length_swa, 16),
        (writer.add_value_length_swa, 16),
        (writer.add_rope_dimension_count, 32),
        (writer.add_rope_dimension_count_swa, 16),
    ):
        add(number)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.enable_moe_block:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


CASES_BY_LAYERS = {
    (
        said.get("num_kv_shared_layers", 0),
        said.get("attention_k_eq_v", False),
        said.get("enable_moe_block", False),
    ): said
    for architecture, _, said in CASES.values()
    if architecture == "gemma4"
}
"""What was said of a Gemma 4, whose configuration does not keep it."""


def _tensors(architecture: str, model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    config: Any = model.config
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    yield from _rope_tensors(config)
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name.startswith("lm_head"):
            continue
        array = tensor.float().numpy()
        if (special := _special(architecture, name, array)) is not None:
            yield from special
            continue
        array = _converted(architecture, name, array, config)
        if architecture == "bloom":
            name = name.removeprefix("transformer.")
        name = name.replace("dt_bias", "dt_proj.bias")
        key, _, suffix = name.rpartition(".")
        mapped = names.get_name(key) if suffix in ("weight", "bias") else None
        if mapped is None:  # no weight of a layer within: the name as a whole
            key, suffix = name, ""
            mapped = names.get_name(key)
        assert mapped is not None, name
        yield mapped + f".{suffix}".rstrip("."), array


def _rope_tensors(config: Any) -> Iterator[tuple[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type == "gemma4_text":
        yield "rope_freqs.weight", np.array([1.0] * 4 + [1e30] * 12)
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(rope["long_factor"])
        yield "rope_factors_short.weight", np.array(rope["short_factor"])
    if rope.get("rope_type") == "llama3":
        width = config.head_dim
        frequencies = 1 / rope["rope_theta"] ** (np.arange(0, width, 2) / width)
        original, factor = rope["original_max_position_embeddings"], rope["factor"]
        divisors = []
        for wavelength in 2 * np.pi / frequencies:
            if wavelength < original / rope["high_freq_factor"]:
                divisors.append(1.0)
            elif wavelength > original / rope["low_freq_factor"]:
                divisors.append(factor)
            else:
                smooth = (original / wavelength - rope["low_freq_factor"]) / (
                    rope["high_freq_factor"] - rope["low_freq_factor"]
                )
                divisors.append(1 / ((1 - smooth) / factor + smooth))
        yield "rope_freqs.weight", np.array(divisors)


def _special(architecture: str, name: str, array: Any) -> list[tuple[str, Any]] | None:
    """What the package's table of names does not cover."""
    block = f"blk.{name.split('.')[2]}" if name.count(".") > 2 else ""
    if name.endswith("sinks"):
        return [(f"{block}.attn_sinks.weight", array)]
    if name.endswith("e_score_correction_bias"):
        return [(f"{block}.exp_probs_b.bias", array)]
    if name.endswith("layer_scalar"):
        return [(f"{block}.layer_output_scale.weight", array)]
    if name.endswith("router.scale"):
        return [(f"{block}.ffn_gate_inp.scale", array)]
    if name.endswith("per_expert_scale"):
        return [(f"{block}.ffn_down_exps.scale", array)]
    if "experts." not in name:
        return None
    kind = "bias" if name.endswith("_bias") else "weight"
    if architecture == "gpt-oss" and kind == "weight":
        array = array.swapaxes(1, 2)
    if "down_proj" in name:
        return [(f"{block}.ffn_down_exps.{kind}", array)]
    if architecture == "gemma4":
        return [(f"{block}.ffn_gate_up_exps.{kind}", array)]
    gate, up = (array[:, ::2], array[:, 1::2]) if architecture == "gpt-oss" else np.split(array, 2, axis=1)
    return [(f"{block}.ffn_gate_exps.{kind}", gate), (f"{block}.ffn_up_exps.{kind}", up)]


def _converted(architecture: str, name: str, array: Any, config: Any) -> Any:
    if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        array = array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
    offset = architecture in ("gemma2", "gemma3", "nemotron", "qwen35", "qwen35moe")
    if offset and name.endswith("norm.weight") and "linear_attn" not in name:
        array = array + 1
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        array = array.T
    if architecture == "bloom" and "query_key_value" in name:
        parts = array.reshape(config.n_head, 3, -1, *array.shape[1:])
        array = parts.swapaxes(0, 1).reshape(array.shape)
    if name.endswith("A_log"):
        array = -np.exp(array)
    if architecture.startswith("qwen35") and "linear_attn" in name:
        array = _tiled(name, array, config)
    return array if array.ndim == 1 else np.squeeze(array)


def _tiled(name: str, array: Any, config: Any) -> Any:
    """Qwen 3.5's value heads in llama.cpp's order: one of each key head, then the next of each."""
    keys, width = config.linear_num_key_heads, config.linear_value_head_dim
    per_key = config.linear_num_value_heads // keys

    def reorder(rows: Any, size: int) -> Any:
        return rows.reshape(keys, per_key, size, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)

    if name.endswith(("A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight")):
        return reorder(array, 1)
    if name.endswith("in_proj_z.weight"):
        return reorder(array, width)
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        first = 2 * keys * config.linear_key_head_dim
        return np.concatenate([array[:first], reorder(array[first:], width)])
    if name.endswith("out_proj.weight"):
        return reorder(array.T, width).T
    return array
