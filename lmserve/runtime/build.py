"""From a configuration to a model runner that has proved itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.images.job import ProcessorError
from lmserve.images.processor import ImageProcessor
from lmserve.runtime.attention import backend_class
from lmserve.runtime.attention.base import CacheLayout
from lmserve.runtime.interface import RunnerInfo
from lmserve.runtime.kv_cache import KVCache, block_bytes
from lmserve.runtime.loader import fingerprint, load_model, native_context_length, reads_images
from lmserve.runtime.memory import CacheSize, free_bytes, size_cache
from lmserve.runtime.memory_plan import activation_bytes, num_batched_tokens
from lmserve.runtime.model_runner import PackedModelRunner
from lmserve.runtime.packed_lane import PackedLane, UnsupportedModel
from lmserve.runtime.prepack import leave_the_files, prepack
from lmserve.runtime.rope import pin_rope
from lmserve.runtime.sampler import Sampler
from lmserve.runtime.sampling_state import SamplingState
from lmserve.runtime.self_check import check_packed_lane
from lmserve.runtime.vision.check import ImageCheck, check_images

READING_SHARE = 0.8
"""Of a load's time, in reading the weights: what the progress bar makes of it."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Weights:
    """What was loaded, counted before any weight is brought into another layout."""

    num_parameters: int
    num_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Weights:
        return cls(
            sum(p.numel() for p in model.parameters()), sum(p.numel() * p.element_size() for p in model.parameters())
        )


def build_runner(
    config: ModelConfig, progress: Progress = lambda stage, fraction: None, *, reserved_bytes: int = 0
) -> PackedModelRunner:
    """Loads, sizes, checks. ``reserved_bytes`` of the free memory are kept for others.

    Raises:
        ModelLoadFailed: the model cannot be loaded, does not fit, or would not be served exactly.
    """
    began = time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    progress("loading weights", 0.0)
    model, dtype = load_model(config, lambda share: progress("loading weights", READING_SHARE * share))
    runner = assemble_runner(model, config, dtype, progress, reserved_bytes=reserved_bytes)
    runner.info = replace(runner.info, load_seconds=time.monotonic() - began)
    return runner


@torch.inference_mode()
def assemble_runner(
    model: PreTrainedModel,
    config: ModelConfig,
    dtype: torch.dtype,
    progress: Progress = lambda stage, fraction: None,
    *,
    reserved_bytes: int = 0,
) -> PackedModelRunner:
    """A runner around a model that is on its device. Raises as ``build_runner`` does."""
    weights = Weights.of(model)
    prepack(model, model.device, dtype)
    if model.device.type == "cpu":
        leave_the_files(model)
    lane = PackedLane(model)
    try:
        shapes = lane.probe()
    except UnsupportedModel as error:
        raise ModelLoadFailed(f"{type(model).__name__} cannot be served: {error}") from error
    progress("making the KV cache", READING_SHARE)
    bytes_per_block = block_bytes(shapes, config.block_size, dtype)
    size = size_cache(
        block_bytes=bytes_per_block,
        block_size=config.block_size,
        budget=config.kv_cache_memory,
        asked_len=config.max_model_len,
        native_len=native_context_length(model),
        max_num_seqs=config.max_num_seqs,
        free=free_bytes(model.device) - reserved_bytes - activation_bytes(model, config, model.device, dtype),
        device_type=model.device.type,
    )
    for sentence in pin_rope(model, size.max_model_len):
        progress(sentence, READING_SHARE)
    layout = CacheLayout(config.block_size, size.num_blocks, model.device, dtype)
    backend = backend_class(config.attention_backend, model.device.type)(layout)
    lane.attach(KVCache(shapes, layout), backend)
    vocab_size = model.config.get_text_config().vocab_size
    if config.self_check:
        progress("comparing with the stock forward", 0.9)
        _check(lane, config, vocab_size, size.num_blocks * config.block_size, dtype)
    images = _check_images(lane, config, size, dtype, progress) if reads_images(model.config) else ImageCheck("none")
    info = replace(
        _describe(model, config, weights, size, backend.name, size.num_blocks * bytes_per_block),
        images=images.reading,
        no_images=images.reason,
    )
    state = SamplingState(max_num_seqs=config.max_num_seqs, vocab_size=vocab_size, device=model.device)
    return PackedModelRunner(lane, Sampler(state), state, info, images.reader)


def _check_images(
    lane: PackedLane, config: ModelConfig, size: CacheSize, dtype: torch.dtype, progress: Progress
) -> ImageCheck:
    progress("looking at two pictures", 0.95)
    try:
        processor = ImageProcessor.load(
            config.model, trust_remote_code=config.trust_remote_code, revision=config.revision
        )
    except ProcessorError as error:
        return ImageCheck("none", reason=str(error))
    return check_images(lane, processor, config.block_size, size.num_blocks * config.block_size, dtype)


def _describe(
    model: PreTrainedModel,
    config: ModelConfig,
    weights: Weights,
    size: CacheSize,
    backend: str,
    kv_cache_bytes: int,
) -> RunnerInfo:
    dtype = model.dtype
    return RunnerInfo(
        architecture=type(model).__name__,
        model_type=str(model.config.get_text_config().model_type),
        device=str(model.device),
        dtype=str(dtype).removeprefix("torch."),
        attention_backend=backend,
        lane="packed",
        num_parameters=weights.num_parameters,
        weight_bytes=weights.num_bytes,
        vocab_size=model.config.get_text_config().vocab_size,
        max_model_len=size.max_model_len,
        block_size=config.block_size,
        num_blocks=size.num_blocks,
        kv_cache_bytes=kv_cache_bytes,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=num_batched_tokens(config, model.device),
        fingerprint=fingerprint(config, model, dtype, backend),
    )


def _check(lane: PackedLane, config: ModelConfig, vocab_size: int, num_slots: int, dtype: torch.dtype) -> None:
    needed = 3 * -(-64 // config.block_size) * config.block_size
    if num_slots < needed:
        return  # a cache for toys: nothing to compare in
    try:
        result = check_packed_lane(lane, vocab_size, config.block_size, num_slots // 4, dtype)
    except UnsupportedModel as error:
        raise ModelLoadFailed(f"{type(lane.model).__name__} cannot be served: {error}") from error
    if not result.passed:
        raise ModelLoadFailed(
            f"{type(lane.model).__name__} cannot be served exactly: packed logits differ from the stock ones by "
            f"{result.error:.2g} of their spread, {result.tolerance:.2g} is allowed"
        )
