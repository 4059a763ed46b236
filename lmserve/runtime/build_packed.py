"""The packed lane with all that makes it fast, proved."""

from __future__ import annotations

from threading import Thread

import torch
from torch import nn
from transformers import PreTrainedModel

from lmserve.config import ModelConfig
from lmserve.images.job import ProcessorError
from lmserve.images.processor import ImageProcessor
from lmserve.runtime.attention import backend_class
from lmserve.runtime.attention.base import CacheLayout
from lmserve.runtime.gpu import check_cache_format, compile_for_serving, rehearse, rework
from lmserve.runtime.kv_cache import KVCache, block_bytes
from lmserve.runtime.latent import wants_latents
from lmserve.runtime.load_job import Fitted, LoadJob, NotExact, off_by, trying
from lmserve.runtime.loader import reads_images
from lmserve.runtime.memory import CacheSize, hold_bytes
from lmserve.runtime.memory_plan import activation_bytes, num_batched_tokens
from lmserve.runtime.native.build import build_program
from lmserve.runtime.native.compiler import NativeUnavailable
from lmserve.runtime.native.program import Limits
from lmserve.runtime.native.trace import NotTraceable
from lmserve.runtime.packed_lane import PackedLane
from lmserve.runtime.prepack import leave_the_files, prepack, tensors_but, tensors_of
from lmserve.runtime.quantization import Quantization, quantize
from lmserve.runtime.rope import pin_rope
from lmserve.runtime.self_check import LONGEST_WINDOW, PACKED
from lmserve.runtime.vision.check import ImageCheck, check_images

MAX_PROMPT_ROWS = 256
"""Rows of logits for prompts' log-probabilities that the scheduler asks for in one step."""


def build_packed(job: LoadJob) -> Fitted:
    """Sizes, makes fast, checks.

    Raises:
        NotExact: the model cannot be served so.
        ModelLoadFailed: it does not fit.
    """
    with trying():
        lane = PackedLane(job.model, keeps_latents=wants_latents(job.config, job.device))
    try:
        with trying():
            lane.probe()
        return _build(job, lane)
    except BaseException:
        lane.detach()
        raise


def _build(job: LoadJob, lane: PackedLane) -> Fitted:
    model, config, device, dtype = job.model, job.config, job.device, job.dtype
    backend_type = backend_class(config.attention_backend, device.type)
    cache_dtype = check_cache_format(config, backend_type, device)
    if not job.on_cpu:
        job.progress("merging products", 0.8)
        rework(lane, job.kind)
        job.are_weights_ready = True
    activations = activation_bytes(model, config, device, dtype)
    if not job.on_cpu or cache_dtype is not None:
        job.progress("trying the largest step", 0.82)
        activations = rehearse(lane, config, dtype, backend_type, job.vocab_size)
    if cache_dtype is not None:  # what 8 bits lose is not to be taken for a fault
        _check(job, lane)
    job.progress("making the KV cache", 0.84)
    bytes_per_block = block_bytes(lane.shapes, config.block_size, cache_dtype or dtype)
    size = job.size_cache(bytes_per_block, job.free_bytes - activations, config.max_num_seqs)
    for sentence in pin_rope(model, size.max_model_len):
        job.tell(sentence)
    layout = CacheLayout(config.block_size, size.num_blocks, device, dtype, cache_dtype)
    backend = backend_type(layout)
    cache = KVCache(lane.shapes, layout)
    getting_ready = _get_ready(cache)  # beside what is to be done with the weights, most of which keeps one core busy
    lane.attach(cache, backend)
    _make_fast(job, lane, cache, layout)
    if cache_dtype is None:
        _check(job, lane)
    images = look_at_pictures(job, lane, size)
    getting_ready.join()
    hold_bytes(device, activations)
    return Fitted(
        lane=lane,
        size=size,
        kv_cache_bytes=size.num_blocks * bytes_per_block,
        max_num_seqs=config.max_num_seqs,
        attention_backend=backend.name if lane.program is None else "native",
        backend=backend,
        context_cost=context_cost(lane),
        images=images,
    )


def _make_fast(job: LoadJob, lane: PackedLane, cache: KVCache, layout: CacheLayout) -> None:
    if job.on_cpu:
        job.progress("packing the weights", 0.85)
        job.tell(_bring_to_the_processor(lane, job.config, cache, layout, job.dtype, job.kind))
        job.are_weights_ready = True
    elif job.device.type == "cuda":
        job.progress("compiling the layers", 0.85)
        job.tell(compile_for_serving(lane, job.config))


def _check(job: LoadJob, lane: PackedLane) -> None:
    """Serves exactly what was seen to be exact: the native program, or compiled layers, else the model as written."""
    result = job.compare(lane, PACKED)
    if result is None or result.passed:
        return
    if lane.program is not None or lane.compiled is not None:
        what = "the native program is" if lane.program is not None else "the compiled layers are"
        job.tell(f"torch runs each operation of a step: {what} off by {result.error:.2g}")
        lane.run_as_written()
        result = job.compare(lane, PACKED)
        assert result is not None
    if not result.passed:
        raise NotExact(off_by(result))


def _get_ready(cache: KVCache) -> Thread:
    def run() -> None:
        while cache.get_ready(0):
            pass

    thread = Thread(target=run, daemon=True)
    thread.start()
    return thread


def look_at_pictures(job: LoadJob, lane: PackedLane, size: CacheSize) -> ImageCheck:
    """Whether the model reads images, and how, of those that could; the lane's first blocks are overwritten."""
    config = job.config
    if not reads_images(job.model.config):
        return ImageCheck("none")
    job.progress("looking at two pictures", 0.95)
    try:
        processor = ImageProcessor.load(
            config.model, trust_remote_code=config.trust_remote_code, revision=config.revision
        )
    except ProcessorError as error:
        return ImageCheck("none", reason=str(error))
    return check_images(lane, processor, config.block_size, size.num_blocks * config.block_size, job.dtype)


def context_cost(lane: PackedLane) -> float:
    """``RunnerInfo.context_cost``, roughly: by the multiplications, those of attention counted twice, for they are
    small products and a softmax in between. ``lane`` has probed its layers."""
    num_parameters = sum(parameter.numel() for parameter in lane.model.parameters())
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
    pack_weights(model, dtype, kind)
    return reason


def pack_weights(model: PreTrainedModel, dtype: torch.dtype, kind: Quantization | None) -> None:
    """In few bits, if wanted so, and in the layout of the processor's products."""
    if kind is not None:
        quantize(model, kind)
    prepack(model, model.device, dtype)
    leave_the_files(tensors_of(model, nn.Linear))
