"""From a configuration to a model runner that has proved itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Thread

import torch
from torch import nn
from transformers import PreTrainedModel

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.images.job import ProcessorError
from lmserve.images.processor import ImageProcessor
from lmserve.runtime.attention import backend_class
from lmserve.runtime.attention.base import AttentionBackend, CacheLayout
from lmserve.runtime.gpu import check_cache_format, compile_for_serving, rehearse, rework
from lmserve.runtime.graphs import CudaGraphs
from lmserve.runtime.interface import RunnerInfo
from lmserve.runtime.kv_cache import KVCache, block_bytes
from lmserve.runtime.loader import fingerprint, load_model, native_context_length, reads_images
from lmserve.runtime.memory import CacheSize, hold_bytes, size_cache, usable_bytes
from lmserve.runtime.memory_plan import activation_bytes, num_batched_tokens, number_format, weight_bytes
from lmserve.runtime.model_runner import PackedModelRunner
from lmserve.runtime.native.build import build_program
from lmserve.runtime.native.compiler import NativeUnavailable
from lmserve.runtime.native.program import Limits
from lmserve.runtime.native.sampling import first_largest
from lmserve.runtime.native.trace import NotTraceable
from lmserve.runtime.packed_lane import PackedLane, UnsupportedModel
from lmserve.runtime.prepack import leave_the_files, prepack, tensors_but, tensors_of
from lmserve.runtime.quantization import Quantization, quantize
from lmserve.runtime.rope import pin_rope
from lmserve.runtime.sampler import Sampler
from lmserve.runtime.sampling_state import SamplingState
from lmserve.runtime.self_check import LONGEST_WINDOW, check_packed_lane
from lmserve.runtime.vision.check import ImageCheck, check_images

READING_SHARE = 0.8
"""Of a load's time, in reading the weights: what the progress bar makes of it."""

MAX_PROMPT_ROWS = 256
"""Rows of logits for prompts' log-probabilities that the scheduler asks for in one step."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Weights:
    """Of a model: how many numbers, and the memory that they take."""

    num_parameters: int
    num_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Weights:
        """As they are."""
        numbers = [(p.numel(), p.element_size()) for p in model.parameters()]
        return cls(sum(count for count, _ in numbers), sum(count * size for count, size in numbers))

    @classmethod
    def as_served(cls, model: PreTrainedModel, config: ModelConfig, dtype: torch.dtype) -> Weights:
        """As they will be."""
        weights = cls.of(model)
        if model.device.type != "cpu" and config.quantization == "none":
            return weights
        return replace(weights, num_bytes=weight_bytes(model, model.device, dtype, config.quantization))


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
    device, on_cpu = model.device, model.device.type == "cpu"
    weights = Weights.as_served(model, config, dtype)
    kind: Quantization | None = None if config.quantization == "none" else config.quantization  # type: ignore[assignment]
    backend_type = backend_class(config.attention_backend, device.type)
    cache_dtype = check_cache_format(config, backend_type, device)
    vocab_size = model.config.get_text_config().vocab_size
    lane = _make_lane(model)
    if not on_cpu:
        progress("merging products", 0.8)
        rework(lane, kind)
    activations = activation_bytes(model, config, device, dtype)
    if not on_cpu or cache_dtype is not None:
        progress("trying the largest step", 0.82)
        activations = rehearse(lane, config, dtype, backend_type, vocab_size)
    if cache_dtype is not None:  # what 8 bits lose is not to be taken for a fault
        _check_and_tell(lane, config, vocab_size, lane.num_slots, dtype, progress)
    progress("making the KV cache", 0.84)
    bytes_per_block = block_bytes(lane.shapes, config.block_size, cache_dtype or dtype)
    size = size_cache(
        block_bytes=bytes_per_block,
        block_size=config.block_size,
        budget=config.kv_cache_memory,
        asked_len=config.max_model_len,
        native_len=native_context_length(model),
        max_num_seqs=config.max_num_seqs,
        free=_free(device, config, reserved_bytes) - activations,
        device_type=device.type,
    )
    for sentence in pin_rope(model, size.max_model_len):
        progress(sentence, READING_SHARE)
    layout = CacheLayout(config.block_size, size.num_blocks, device, dtype, cache_dtype)
    backend = backend_type(layout)
    cache = KVCache(lane.shapes, layout)
    getting_ready = _get_ready(cache)  # beside what is to be done with the weights, most of which keeps one core busy
    lane.attach(cache, backend)
    if on_cpu:
        progress("packing the weights", 0.85)
        _tell(_bring_to_the_processor(lane, config, cache, layout, dtype, kind), progress)
    elif device.type == "cuda":
        _compile_and_tell(lane, config, progress)
    if cache_dtype is None:
        _check_and_tell(lane, config, vocab_size, lane.num_slots, dtype, progress)
    images = _check_images(lane, config, size, dtype, progress) if reads_images(model.config) else ImageCheck("none")
    info = replace(
        _describe(lane, config, weights, size, backend.name, size.num_blocks * bytes_per_block),
        images=images.reading,
        no_images=images.reason,
    )
    getting_ready.join()
    hold_bytes(device, activations)
    return _make_runner(lane, backend, info, config, images)


def _free(device: torch.device, config: ModelConfig, reserved_bytes: int) -> int:
    return usable_bytes(device, config.gpu_memory_utilization, graphs=config.cuda_graphs, others=reserved_bytes)


def _make_runner(
    lane: PackedLane, backend: AttentionBackend, info: RunnerInfo, config: ModelConfig, images: ImageCheck
) -> PackedModelRunner:
    device = lane.model.device
    state = SamplingState(max_num_seqs=info.max_num_seqs, vocab_size=info.vocab_size, device=device)
    sampler = Sampler(state, first_largest if lane.program is not None else None)
    runner = PackedModelRunner(lane, sampler, state, info, images.reader)
    if config.cuda_graphs and device.type == "cuda" and backend.reads_device_lengths:
        runner.use_graphs(backend, CudaGraphs(device))
    return runner


def _make_lane(model: PreTrainedModel) -> PackedLane:
    """The lane, which has seen the model's layers."""
    lane = PackedLane(model)
    try:
        lane.probe()
    except UnsupportedModel as error:
        raise ModelLoadFailed(f"{type(model).__name__} cannot be served: {error}") from error
    return lane


def _tell(sentence: str, progress: Progress) -> None:
    if sentence:
        progress(sentence, 0.88)


def _compile_and_tell(lane: PackedLane, config: ModelConfig, progress: Progress) -> None:
    progress("compiling the layers", 0.85)
    _tell(compile_for_serving(lane, config), progress)


def _check_and_tell(
    lane: PackedLane, config: ModelConfig, vocab_size: int, num_slots: int, dtype: torch.dtype, progress: Progress
) -> None:
    if config.self_check:
        progress("comparing with the stock forward", 0.9)
        _tell(_check(lane, config, vocab_size, num_slots, dtype), progress)


def _get_ready(cache: KVCache) -> Thread:
    def run() -> None:
        while cache.get_ready(0):
            pass

    thread = Thread(target=run, daemon=True)
    thread.start()
    return thread


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
    lane: PackedLane,
    config: ModelConfig,
    weights: Weights,
    size: CacheSize,
    backend: str,
    kv_cache_bytes: int,
) -> RunnerInfo:
    model = lane.model
    dtype = model.dtype
    if lane.program is not None:
        backend = "native"
    bits = "" if config.quantization == "none" else config.quantization
    return RunnerInfo(
        architecture=type(model).__name__,
        model_type=str(model.config.get_text_config().model_type),
        device=str(model.device),
        dtype=number_format(dtype, config.quantization),
        attention_backend=backend,
        lane="packed" if lane.program is None else "native",
        num_parameters=weights.num_parameters,
        weight_bytes=weights.num_bytes,
        vocab_size=model.config.get_text_config().vocab_size,
        max_model_len=size.max_model_len,
        block_size=config.block_size,
        num_blocks=size.num_blocks,
        kv_cache_bytes=kv_cache_bytes,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=num_batched_tokens(config, model.device),
        launches_ahead=model.device.type == "cuda",
        context_cost=_context_cost(lane, weights.num_parameters),
        fingerprint=fingerprint(config, model, dtype, backend + bits),
    )


def _context_cost(lane: PackedLane, num_parameters: int) -> float:
    """``RunnerInfo.context_cost``, roughly: by the multiplications, those of attention counted twice, for they are
    small products and a softmax in between. ``lane`` has probed its layers."""
    text = lane.model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)  # some configurations have a list: then at least the cache's
    attention = sum(
        (heads if isinstance(heads, int) else shape.num_kv_heads) * (shape.key_size + shape.value_size)
        for shape in lane.shapes.values()
    )
    return float(2 * attention / max(1, num_parameters - text.vocab_size * getattr(text, "hidden_size", 0)))


def _bring_to_the_processor(
    lane: PackedLane,
    config: ModelConfig,
    cache: KVCache,
    layout: CacheLayout,
    dtype: torch.dtype,
    kind: Quantization | None,
) -> str:
    """Weights in the layout of the processor's products, and the step as one native program where there can be one.

    Returns why there is none, for the start-up message; nothing if there is one, or was not to be.
    """
    model = lane.model
    leave_the_files(tensors_but(model, nn.Linear))
    reason = ""
    if config.attention_backend == "auto":
        num_tokens = max(num_batched_tokens(config, model.device), LONGEST_WINDOW + 64)
        limits = Limits(num_tokens, max(config.max_num_seqs + MAX_PROMPT_ROWS, num_tokens))
        try:
            assert kind != "fp8", "refused on a CPU"
            lane.program = build_program(lane, cache, layout, limits, kind)
        except (NotTraceable, NativeUnavailable) as error:
            reason = f"torch runs each operation of a step: {error}"
    if kind is not None:
        quantize(model, kind)
    prepack(model, model.device, dtype)
    leave_the_files(tensors_of(model, nn.Linear))
    return reason


def _check(lane: PackedLane, config: ModelConfig, vocab_size: int, num_slots: int, dtype: torch.dtype) -> str:
    """Serves exactly what was seen to be exact: the native program, else the packed lane.

    Returns what is to be said about it.
    """
    needed = 3 * -(-64 // config.block_size) * config.block_size
    if num_slots < needed:
        return ""  # a cache for toys: nothing to compare in
    said = ""
    try:
        result = check_packed_lane(lane, vocab_size, config.block_size, num_slots // 4, dtype)
        if not result.passed and (lane.program is not None or lane.compiled is not None):
            what = "the native program is" if lane.program is not None else "the compiled layers are"
            said = f"torch runs each operation of a step: {what} off by {result.error:.2g}"
            lane.run_as_written()
            result = check_packed_lane(lane, vocab_size, config.block_size, num_slots // 4, dtype)
    except UnsupportedModel as error:
        raise ModelLoadFailed(f"{type(lane.model).__name__} cannot be served: {error}") from error
    if not result.passed:
        raise ModelLoadFailed(
            f"{type(lane.model).__name__} cannot be served exactly: packed logits differ from the stock ones by "
            f"{result.error:.2g} of their spread, {result.tolerance:.2g} is allowed"
        )
    return said
