"""What a model is given on a GPU before it serves: fewer and larger products, layers of few operations, and as much
KV cache as its largest step leaves.

Nothing here is done on a CPU, where a native program has reasons of its own (``native/``); all of it runs there, too,
and is tested so.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.attention.base import AttentionBackend, CacheLayout
from lmserve.runtime.compiled import compile_layers, keep_compiled_code
from lmserve.runtime.kv_cache import KVCache
from lmserve.runtime.memory import peak_bytes
from lmserve.runtime.memory_plan import (
    FIRST_USE_BYTES,
    activation_bytes,
    cache_format,
    num_batched_tokens,
    sampler_bytes,
)
from lmserve.runtime.merged_linear import hand_over_products, merge_linears
from lmserve.runtime.packed_lane import PackedLane
from lmserve.runtime.quantization import Quantization, quantize_by_torchao
from lmserve.runtime.self_check import LONGEST_WINDOW

CONVERTS_FP8 = (8, 0)
"""Capability of the GPUs that Triton is for: below Ada its kernels take 8-bit floats apart themselves."""
SAMPLERS = 2
"""That hold their matrices: the one of any step, and the one whose operations are captured."""


def rework(lane: PackedLane, kind: Quantization | None) -> None:
    """Merges what reads the same input, and quantizes. The lane has probed its layers. Raises ModelLoadFailed."""
    model: PreTrainedModel = lane.model
    merge_linears(model, lane.probe)
    if kind is not None:
        hand_over_products(model)
        quantize_by_torchao(model, kind)


def rehearse(
    lane: PackedLane, config: ModelConfig, dtype: torch.dtype, backend: type[AttentionBackend], vocab_size: int
) -> int:
    """Runs the largest step in a cache of its own; what a step takes of the memory, in bytes, sampling included.

    Where the device does not tell, what is expected. The lane stays attached to that cache, which holds as much as the
    self-check needs and is in the model's own number format.
    """
    device = lane.model.device
    num_tokens = num_batched_tokens(config, device)
    num_blocks = -(-max(num_tokens, 4 * (LONGEST_WINDOW + 64)) // config.block_size)
    layout = CacheLayout(config.block_size, num_blocks, device, dtype)
    lane.attach(KVCache(lane.shapes, layout), backend(layout))
    peak = peak_bytes(device, lambda: lane.rehearse(num_tokens))
    if peak is None:
        return activation_bytes(lane.model, config, device, dtype)
    return peak + SAMPLERS * sampler_bytes(config, vocab_size, dtype) + FIRST_USE_BYTES


def check_cache_format(
    config: ModelConfig, backend: type[AttentionBackend], device: torch.device
) -> torch.dtype | None:
    """In which keys and values are kept; None: as the model has them.

    Raises:
        ModelLoadFailed: the attention backend or the GPU cannot read them so.
    """
    wanted = cache_format(config)
    if wanted is not None and not backend.keeps_fp8:
        raise ModelLoadFailed(f"kv_cache_dtype fp8 is not for the attention backend {backend.name}; triton has it")
    if wanted is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) < CONVERTS_FP8:
        raise ModelLoadFailed("kv_cache_dtype fp8 needs a GPU of capability 8.0 or more (Ampere and later)")
    return wanted


def compile_for_serving(lane: PackedLane, config: ModelConfig) -> str:
    """Compiles the layers if they are to be. What is to be said about it; nothing if all is well."""
    if not config.compile:
        return ""
    keep_compiled_code()
    return compile_layers(lane, most_rows=num_batched_tokens(config, lane.model.device))
