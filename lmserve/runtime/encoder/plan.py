"""What an encoder will take, known before any weight is read."""

from __future__ import annotations

from lmserve.config import ModelConfig
from lmserve.runtime.encoder.build import CPU_BATCHED_TOKENS, auto_class, context_length
from lmserve.runtime.encoder.recipe import read_recipe
from lmserve.runtime.interface import MemoryPlan, Task
from lmserve.runtime.loader import dtype_of, read_model_config
from lmserve.runtime.memory import free_bytes
from lmserve.runtime.memory_plan import (
    FIRST_USE_BYTES,
    fixed_bytes,
    hollow_model,
    layer_row_bytes,
    loaded_weight_bytes,
    num_batched_tokens,
    number_format,
)


def plan_encoder(config: ModelConfig, task: Task, reserved_bytes: int = 0) -> MemoryPlan:
    """The terms for this device, as it is now. ``reserved_bytes`` of the free memory are kept for others.

    Raises:
        ModelLoadFailed: there is no such model, or it cannot be served.
    """
    recipe = read_recipe(config, task)
    source = read_model_config(config, recipe.subfolder)
    device, dtype = source.device, dtype_of(config, source)
    model = hollow_model(source.config, auto_class(source.config, task), config.trust_remote_code)
    length = context_length(model, config, recipe.max_seq_length)
    num_tokens = max(length, num_batched_tokens(config, device, CPU_BATCHED_TOKENS))
    weights = loaded_weight_bytes(config, source, model, dtype)
    fixed = fixed_bytes(device)
    free = free_bytes(device) + fixed - reserved_bytes
    return MemoryPlan(
        device=str(device),
        dtype=number_format(dtype, config.quantization),
        max_model_len=length,
        max_num_seqs=1,
        weight_bytes=weights,
        kv_cache_bytes=0,
        kv_cache_tokens=0,
        activation_bytes=num_tokens * layer_row_bytes(source.config.get_text_config(), dtype) + FIRST_USE_BYTES,
        fixed_bytes=fixed,
        free_bytes=max(0, free),
    )
