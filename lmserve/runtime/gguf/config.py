"""What a GGUF file says of its model where transformers' reader does not listen.

transformers rebuilds a configuration from the file's metadata, and what it does not read stays as its class has it: the
rope base of StarCoder2, the attention scale of Gemma's larger models, Llama 3's and Phi's long-context rope, widths of
experts. Such a model loads, answers, and is another model. So each key of the architecture is brought into the
configuration, or held against it, or known to decide nothing; a key that is none of these is a refusal by its name,
and so is a file whose tensors the model does not all take.

What keys and tensors mean is llama.cpp's: its ``gguf-py/gguf/constants.py``, and what its converters write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.gguf import gemma4, rope
from lmserve.runtime.gguf.file import GGUFFile

_EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
NAMES: Mapping[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": _EPSILONS,
    "attention.layer_norm_epsilon": _EPSILONS,
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.inner_size": ("intermediate_size",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
}
"""What a key is called in configurations: the first name that the model's class has."""
WINDOW = "attention.sliding_window"
"""0 is none: Phi 4 has the key, and no window."""
CONTEXT = "context_length"
"""Models without positions have no name for it; it limits requests all the same."""
SILENT = frozenset({"vocab_size", "tensor_data_layout", "pooling_type", "use_parallel_residual"})
"""Keys that decide nothing, or that transformers finds out from the tensors."""
ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_weights_scale": (0, 1),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "leading_dense_block_count": (0,),
    "ssm.dt_b_c_rms": (False,),
}
"""Keys that may stand in a file if they say what holds anyway."""
REBUILT: Mapping[str, frozenset[str]] = {
    "lfm2": frozenset({"shortconv.l_cache"}),
    "qwen35": frozenset({"full_attention_interval", "nextn_predict_layers", "ssm.group_count"}),
}
"""Architectures whose files transformers reads in full, and the keys that only they have."""
SOFTMAX, SIGMOID = 1, 2
GATES = {"minimax-m2": SIGMOID}
"""How experts are chosen, where not by a softmax."""
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Layers of the one model of each family whose attention is scaled by the width of a head's share of the model."""
TIED = ("falcon", "bloom")
"""Their output layer is the embedding, even where a file has both."""


def gguf_config(path: Path, read: Callable[[], Any]) -> Any:
    """transformers' configuration of a file, with what it leaves out. ``read`` gives the one that it makes itself.

    Raises:
        ModelLoadFailed: the file says something of the model that is not understood.
        Exception: what ``read`` raises.
    """
    file = GGUFFile(path)
    rebuilt = REBUILT.get(file.family.removesuffix("moe"))
    is_gemma4 = file.family == "gemma4"
    known = {*NAMES, *SILENT, *ONLY, *(rebuilt or ()), "attention.value_length", "expert_gating_func"}
    for key in sorted(file.keys):
        if not (key in known or key.startswith("rope.") or (is_gemma4 and key in gemma4.KEYS)):
            raise file.not_understood(key)
    for key, allowed in ONLY.items():
        if (value := file.get(key)) is not None and value not in allowed:
            raise file.not_understood(key)
    if file.get("expert_gating_func") not in (None, GATES.get(file.family, SOFTMAX)):
        raise file.not_understood("expert_gating_func")
    if file.get("attention.value_length") not in (None, file.get("attention.key_length")):
        raise file.not_understood("attention.value_length")
    if is_gemma4:
        return gemma4.gemma4_config(file)
    model_config = _gpt_oss(file) if file.family == "gpt-oss" else read()
    if rebuilt is not None:
        return model_config
    shaped = _with(model_config, {**_named(file, model_config), **_attention_scale(file, model_config)})
    return _with(shaped, rope.rope_changes(file, shaped))


def _gpt_oss(file: GGUFFile) -> Any:
    """To begin with: transformers' reader fails at what the file says of the rope."""
    return AutoConfig.for_model("gpt_oss", num_hidden_layers=file.get("block_count"), **file.vocabulary())


def check_all_read(model: nn.Module, path: Path) -> None:
    """Raises ModelLoadFailed where the file's tensors are not as many numbers as the model's."""
    file = GGUFFile(path)
    has_head = getattr(model, "get_output_embeddings", lambda: None)() is not None
    skipped = {*rope.TENSORS, *(() if has_head and file.family not in TIED else ("output.weight",))}
    further = int(file.get("nextn_predict_layers") or 0)  # blocks that predict further tokens, behind the model's own
    own_blocks = int(file.get("block_count") or 0) - further
    in_file = sum(
        tensor.num_elements
        for name, tensor in file.tensors.items()
        if name not in skipped and (not further or _block(name) < own_blocks)
    )
    weights: dict[int, Tensor] = {each.data_ptr(): each for each in model.state_dict(keep_vars=True).values()}
    in_model = sum(each.numel() for each in weights.values())  # tied ones once: they are the same tensor
    if in_file != in_model:
        raise ModelLoadFailed(
            f"{path.name}: its tensors are {in_file} numbers, and transformers' {type(model).__name__} has {in_model}:"
            " it would be another model"
        )


def _named(file: GGUFFile, config: Any) -> dict[str, Any]:
    """What only has another name."""
    there = {*config.to_dict(), *getattr(config, "attribute_map", {})}
    changes: dict[str, Any] = {}
    for key, names in NAMES.items():
        value = file.get(key)
        if value is None:
            continue
        name = next((name for name in names if name in there), names[0] if key == CONTEXT else None)
        if isinstance(value, tuple) or (name is None and value and value != _without_a_name(file, key, config)):
            raise file.not_understood(key)
        if name is not None:
            changes[name] = None if key == WINDOW and not value else value
    return changes


def _without_a_name(file: GGUFFile, key: str, config: Any) -> Any:
    """What a class is built for that has no name for it."""
    heads = file.get("attention.head_count") or 1
    width = file.get("embedding_length") or config.hidden_size
    return {
        "feed_forward_length": 4 * width,
        "attention.head_count_kv": 1 if file.family == "falcon" else heads,
        "attention.key_length": width // heads,
    }.get(key)


def _attention_scale(file: GGUFFile, config: Any) -> dict[str, Any]:
    """Gemma's, which no key has; as llama.cpp finds it."""
    if file.family not in GEMMA_27B:
        return {}
    if file.get("block_count") == GEMMA_27B[file.family]:
        return {"query_pre_attn_scalar": file.get("embedding_length") // file.get("attention.head_count")}
    return {"query_pre_attn_scalar": file.get("attention.key_length") or config.head_dim}


def _with(config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration with changes, made anew: others of its values may follow from them."""
    if all(getattr(config, name, None) == value for name, value in changes.items()):
        return config
    return type(config).from_dict({**config.to_dict(), **changes})


def _block(name: str) -> int:
    """The block that a tensor belongs to; -1: none."""
    head, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if head == "blk" and number.isdigit() else -1
