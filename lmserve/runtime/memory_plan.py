"""What a model will take, known from its configuration before any weight is read.

The model is made without memory (torch's meta device), so parameters and KV cache are counted on the very modules that
will run, not guessed from names in the configuration. What no count tells was measured: see the constants.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.image_parts import IMAGE_PARTS
from lmserve.runtime.checkpoint_formats import checkpoint_quantization, is_widened
from lmserve.runtime.interface import MemoryPlan
from lmserve.runtime.kv_cache import LayerShape, block_bytes
from lmserve.runtime.latent import wants_latents
from lmserve.runtime.loader import (
    ModelSource,
    dtype_of,
    generating_class,
    native_context_length,
    read_model_config,
    reads_images,
)
from lmserve.runtime.memory import (
    CONTEXT_BYTES,
    CacheSize,
    graph_bytes,
    num_states,
    share_bytes,
    size_cache,
    usable_bytes,
)
from lmserve.runtime.native.compiler import NativeUnavailable, check_available
from lmserve.runtime.packed_lane import PackedLane
from lmserve.runtime.prepack import linears_to_prepack
from lmserve.runtime.quantization import Quantization, check_quantization, kind_of, quantized_bytes
from lmserve.runtime.recurrent_state import has_states, row_bytes
from lmserve.runtime.state_lane import StateLane
from lmserve.runtime.vision.encoder import CACHE_BYTES

CPU_BATCHED_TOKENS = 512
GPU_BATCHED_TOKENS = 4096
FIRST_USE_BYTES = 48 * 2**20
"""What the libraries take once they are used: model code, thread buffers, the allocator's reserves. Measured on a CPU
with the starter model, beyond what the terms below count."""
SAMPLER_COPIES = 4
"""Matrices in float32 as large as the logits that one step of the sampler holds."""
LARGE_IMAGE_PATCHES = 4096
"""Of an image whose encoding is provided for."""
LEAST_CONTEXT = 2048
"""A context that was not asked for may be cut to what fits, but not below this (or the model's own, if shorter)."""


def plan_memory(config: ModelConfig, reserved_bytes: int = 0) -> MemoryPlan:
    """A language model's terms, for this device as it is now. ``reserved_bytes`` of what is free are kept for others.

    Raises:
        ModelLoadFailed: there is no such model, or it cannot be served.
    """
    source = read_model_config(config)
    device, dtype = source.device, dtype_of(config, source)
    check_quantization(config.quantization, device, None if source.is_gguf else source.config)
    model = hollow_model(source.config, generating_class(source.config), config.trust_remote_code)
    weights = loaded_weight_bytes(config, source, model, dtype)
    graphs = graph_bytes(device) if config.cuda_graphs else 0
    activations = activation_bytes(model, config, device, dtype) + graphs
    fixed = fixed_bytes(device)
    free = usable_bytes(device, config.gpu_memory_utilization, graphs=False, others=reserved_bytes) + fixed
    rest = free - weights - activations - fixed
    size, kv_cache_bytes = _cache_size(model, config, dtype, rest, device)
    return MemoryPlan(
        device=str(device),
        dtype=number_format(dtype, config.quantization),
        max_model_len=size.max_model_len,
        max_num_seqs=config.max_num_seqs,
        weight_bytes=weights,
        kv_cache_bytes=kv_cache_bytes,
        kv_cache_tokens=size.num_blocks * config.block_size,
        activation_bytes=activations,
        fixed_bytes=fixed,
        free_bytes=max(0, free),
        share_bytes=share_bytes(device, config.gpu_memory_utilization),
        loading_bytes=loading_bytes(model, config, device, dtype),
    )


def loading_bytes(model: nn.Module, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Of the weights before torchao brings them into fewer bits, which it does on the device; 0 where nothing does.

    On a CPU they are read layer by layer.
    """
    if device.type == "cpu" or config.quantization == "none":
        return 0
    return weight_bytes(model, device, dtype) + FIRST_USE_BYTES


def loaded_weight_bytes(config: ModelConfig, source: ModelSource, model: nn.Module, dtype: torch.dtype) -> int:
    """As ``weight_bytes``, of a quantized checkpoint too."""
    quantized = checkpoint_quantization(source.config) != "" and not source.is_gguf
    stays_so = quantized and not is_widened(source.config, source.device)
    in_files = _file_bytes(Path(config.model)) if stays_so else 0
    return in_files or weight_bytes(model, source.device, dtype, config.quantization)


def weight_bytes(model: nn.Module, device: torch.device, dtype: torch.dtype, quantization: str = "none") -> int:
    """Of the weights as they will stand in memory: a packed one whose tensor others use too is there twice."""
    if getattr(model, "is_quantized", False):  # loaded, and in the files' format still
        if not is_widened(model.config, device):
            return sum(map(_bytes_of, (*model.parameters(), *model.buffers())))
        with torch.device("meta"):
            model = type(model)(copy.deepcopy(model.config))
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    kind: Quantization | None = None if quantization == "none" else quantization  # type: ignore[assignment]
    packed: dict[int, nn.Linear] = {}
    if kind is not None or native_is_available(device):
        packed = {id(module.weight): module for module in model.modules() if type(module) is nn.Linear}
    else:
        packed = {id(linear.weight): linear for _, _, linear in linears_to_prepack(model, device, dtype)}
    plain = sum(p.numel() * dtype.itemsize for p in model.parameters() if id(p) not in packed or owners[id(p)] > 1)
    for linear in packed.values():
        numbers = linear.weight.numel() * dtype.itemsize
        plain += numbers if kind is None else quantized_bytes(linear, kind_of(linear, model, kind), dtype)
    return plain


def native_is_available(device: torch.device) -> bool:
    """Whether weights are likely to be packed for native products: for models that can be traced they are."""
    if device.type != "cpu":
        return False
    try:
        check_available()
    except NativeUnavailable:
        return False
    return True


def activation_bytes(model: nn.Module, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> int:
    """The tensors of the largest step, and the sampler's."""
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]  # a transformers model
    layers = num_batched_tokens(config, device) * layer_row_bytes(text, dtype) + image_bytes(model.config, dtype)
    return layers + sampler_bytes(config, int(text.vocab_size), dtype) + FIRST_USE_BYTES


def sampler_bytes(config: ModelConfig, vocab_size: int, dtype: torch.dtype) -> int:
    """Logits, and the matrices that are made of them."""
    return config.max_num_seqs * vocab_size * (dtype.itemsize + SAMPLER_COPIES * 4)


def cache_format(config: ModelConfig) -> torch.dtype | None:
    """In which keys and values are kept; None: as the model has them."""
    return torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else None


def image_bytes(model_config: Any, dtype: torch.dtype) -> int:
    """What encoding a large image takes, and the images that are kept encoded. Not measured on a real model yet."""
    if not reads_images(model_config):
        return 0
    part = next(found for name in IMAGE_PARTS if (found := getattr(model_config, name, None)) is not None)
    return LARGE_IMAGE_PATCHES * layer_row_bytes(part, dtype) + CACHE_BYTES


def layer_row_bytes(text_config: Any, dtype: torch.dtype) -> int:
    """What the widest layer holds for one token."""
    hidden = int(getattr(text_config, "hidden_size", 0) or 0)
    inner = getattr(text_config, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, list | tuple) else int(inner)
    return (6 * hidden + 4 * inner) * dtype.itemsize


def num_batched_tokens(config: ModelConfig, device: torch.device, on_cpu: int = CPU_BATCHED_TOKENS) -> int:
    """Tokens that one step computes at most. ``on_cpu``: where the configuration leaves it to the device."""
    return config.max_num_batched_tokens or (on_cpu if device.type == "cpu" else GPU_BATCHED_TOKENS)


def _bytes_of(tensor: torch.Tensor) -> int:
    parts = getattr(tensor, "__tensor_flatten__", None)  # of those whose numbers are in others (torchao)
    return tensor.nbytes if parts is None else sum(_bytes_of(getattr(tensor, name)) for name in parts()[0])


def hollow_model(model_config: Any, auto_class: Any, trust_remote_code: bool) -> PreTrainedModel:
    """Without memory. In bfloat16, whatever it will run in: torch's grouped products without data know no other."""
    try:
        with torch.device("meta"):
            if hasattr(auto_class, "from_config"):
                auto_class = partial(auto_class.from_config, trust_remote_code=trust_remote_code)
            else:
                auto_class = auto_class._from_config  # a class that is named, and no table of classes
            model: PreTrainedModel = auto_class(model_config, dtype=torch.bfloat16)
    except (ValueError, ImportError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelLoadFailed(f"{type(model_config).__name__}: {error}") from error
    model.train(False)
    return model


def number_format(dtype: torch.dtype, quantization: str) -> str:
    """As people read it."""
    name = str(dtype).removeprefix("torch.")
    return name if quantization == "none" else f"{quantization} and {name}"


def _cache_size(
    model: PreTrainedModel, config: ModelConfig, dtype: torch.dtype, rest: int, device: torch.device
) -> tuple[CacheSize, int]:
    """The KV cache that the rest allows, and its bytes, recurrent states included. Where the rest allows none that is
    worth it, the least one that is asked for."""
    shapes, state_bytes = _what_is_kept(model, dtype, keeps_latents=wants_latents(config, device))
    bytes_of_states = state_bytes
    with contextlib.suppress(ModelLoadFailed):
        bytes_of_states = sum(num_states(config.max_num_seqs, state_bytes, rest)) * state_bytes
    rest -= bytes_of_states
    bytes_per_block = block_bytes(shapes, config.block_size, cache_format(config) or dtype)
    native = native_context_length(model)
    least = config.max_model_len or min(native or LEAST_CONTEXT, LEAST_CONTEXT)
    try:
        size = size_cache(
            block_bytes=bytes_per_block,
            block_size=config.block_size,
            budget=config.kv_cache_memory,
            asked_len=config.max_model_len,
            native_len=native,
            max_num_seqs=config.max_num_seqs,
            free=rest,
            device_type=device.type,
        )
    except ModelLoadFailed:
        size = None
    if size is None or (size.max_model_len < least and not config.kv_cache_memory):
        blocks = max(-(-least // config.block_size), config.kv_cache_memory // max(1, bytes_per_block))
        size = CacheSize(blocks, min(least, blocks * config.block_size))
    return size, size.num_blocks * bytes_per_block + bytes_of_states


def _what_is_kept(
    model: PreTrainedModel, dtype: torch.dtype, *, keeps_latents: bool
) -> tuple[dict[int, LayerShape], int]:
    """Of each token, by layer, and of each sequence whatever its length, in bytes. In which lane is not known yet."""
    try:
        with torch.inference_mode():
            kind = StateLane if has_states(model.config.get_text_config()) else PackedLane
            lane = kind(model, keeps_latents=keeps_latents)
            shapes = lane.probe()
            states = lane.state_shapes if isinstance(lane, StateLane) else {}
            return shapes, row_bytes(states, seen_in=model.dtype, will_be=dtype)
    except Exception:  # a model whose forward wants real numbers, or a lane of its own: its configuration has to do
        return _usual_shapes(model), 0


def _usual_shapes(model: PreTrainedModel) -> dict[int, LayerShape]:
    """As most configurations say it."""
    text: Any = model.config.get_text_config()
    all_heads = getattr(text, "num_attention_heads", None)
    if not isinstance(all_heads, int):
        return {}
    heads = getattr(text, "num_key_value_heads", None) or all_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // all_heads
    return dict.fromkeys(range(text.num_hidden_layers), LayerShape(heads, head_size, head_size))


def fixed_bytes(device: torch.device) -> int:
    """What this process has taken by now: of a GPU what it takes whatever it does there."""
    if device.type == "cpu":
        return int(psutil.Process().memory_info().rss)
    return CONTEXT_BYTES if device.type == "cuda" else 0


def _file_bytes(folder: Path) -> int:
    """Of the weight files: quantized weights have the size that they have there."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
