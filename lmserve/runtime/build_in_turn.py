"""The lanes that compute prompts one after the other: for recurrent layers, and for models that are all their own."""

from __future__ import annotations

from torch import nn

from lmserve.runtime.attention import backend_class
from lmserve.runtime.attention.base import AttentionBackend, CacheLayout
from lmserve.runtime.build_packed import context_cost, look_at_pictures, pack_weights
from lmserve.runtime.gpu import check_cache_format, rework
from lmserve.runtime.kv_cache import KVCache, block_bytes
from lmserve.runtime.latent import wants_latents
from lmserve.runtime.load_job import Fitted, LoadJob, NotExact, off_by, trying
from lmserve.runtime.loader import reads_images
from lmserve.runtime.memory import num_states
from lmserve.runtime.memory_plan import activation_bytes
from lmserve.runtime.prepack import leave_the_files, tensors_but
from lmserve.runtime.quantization import quantize_by_torchao
from lmserve.runtime.rope import pin_rope
from lmserve.runtime.self_check import CHUNKED, WHOLE, tokens_to_check
from lmserve.runtime.serial_lane import SerialLane
from lmserve.runtime.state_lane import StateLane
from lmserve.runtime.vision.check import ImageCheck


def build_state(job: LoadJob) -> Fitted:
    """Sizes, checks. Raises as ``build_packed`` does."""
    with trying():
        lane = StateLane(job.model, keeps_latents=wants_latents(job.config, job.device))
    try:
        with trying():
            lane.probe()
        return _build_state(job, lane)
    except BaseException:
        lane.detach()
        raise


def _build_state(job: LoadJob, lane: StateLane) -> Fitted:
    config, device, dtype = job.config, job.device, job.dtype
    backend_type = backend_class(config.attention_backend, device.type)
    cache_dtype = check_cache_format(config, backend_type, device)
    _get_weights_ready(job, lane)
    whole = _needs_whole_prompts(job, _in_a_small_cache(job, lane, backend_type))
    free = job.free_bytes - activation_bytes(job.model, config, device, dtype)
    max_num_seqs, num_saved = num_states(config.max_num_seqs, lane.state_bytes, free)
    num_saved = 0 if whole or not config.prefix_caching else num_saved
    if max_num_seqs < config.max_num_seqs:
        job.tell(f"max_num_seqs is {max_num_seqs}: a sequence's recurrent state takes {lane.state_bytes:,} bytes")
    bytes_of_states = (max_num_seqs + num_saved) * lane.state_bytes
    bytes_per_block = block_bytes(lane.shapes, config.block_size, cache_dtype or dtype)
    size = job.size_cache(bytes_per_block, free - bytes_of_states, max_num_seqs)
    for sentence in pin_rope(job.model, size.max_model_len):
        job.tell(sentence)
    layout = CacheLayout(config.block_size, size.num_blocks, device, dtype, cache_dtype)
    backend = backend_type(layout)
    lane.attach(KVCache(lane.shapes, layout), backend)
    lane.make_rows(max_num_seqs, num_saved)
    images = _no_images(job, "its prompts have to be read at once") if whole else look_at_pictures(job, lane, size)
    lane.forget()
    return Fitted(
        lane=lane,
        size=size,
        kv_cache_bytes=size.num_blocks * bytes_per_block + bytes_of_states,
        max_num_seqs=max_num_seqs,
        attention_backend=backend.name if lane.shapes else "none",
        backend=backend,
        context_cost=context_cost(lane),
        images=images,
        num_saved_states=num_saved,
        whole_prompts=whole,
    )


def build_serial(job: LoadJob) -> Fitted:
    """Sizes, checks. Raises as ``build_packed`` does."""
    config = job.config
    if config.kv_cache_dtype != "auto":
        raise NotExact("it has a cache of its own, which is kept as the model has it")
    with trying():
        lane = SerialLane(job.model)
    _get_weights_ready(job, None)
    with trying():
        per_token, per_sequence = lane.measure()
    free = job.free_bytes - activation_bytes(job.model, config, job.device, job.dtype)
    free -= config.max_num_seqs * per_sequence
    bytes_per_block = per_token * config.block_size
    size = job.size_cache(bytes_per_block, free, config.max_num_seqs)
    lane.num_slots = tokens_to_check(job.model.config.get_text_config(), CHUNKED)  # it grows as it has to
    for sentence in pin_rope(job.model, size.max_model_len):
        job.tell(sentence)
    whole = _needs_whole_prompts(job, lane)
    lane.forget()
    return Fitted(
        lane=lane,
        size=size,
        kv_cache_bytes=size.num_blocks * bytes_per_block + config.max_num_seqs * per_sequence,
        max_num_seqs=config.max_num_seqs,
        attention_backend="its own",
        backend=None,
        images=_no_images(job, "each sequence has the model's own cache"),
        num_saved_states=0,
        whole_prompts=whole,
    )


def _in_a_small_cache(job: LoadJob, lane: StateLane, backend_type: type[AttentionBackend]) -> StateLane:
    """As large as the comparison wants it, in the model's own format."""
    block_size = job.config.block_size
    num_blocks = -(-tokens_to_check(job.model.config.get_text_config(), CHUNKED) // block_size)
    layout = CacheLayout(block_size, num_blocks, job.device, job.dtype)
    lane.attach(KVCache(lane.shapes, layout), backend_type(layout))
    lane.make_rows(num_slots=3, num_saved=0)
    return lane


def _needs_whole_prompts(job: LoadJob, lane: StateLane | SerialLane) -> bool:
    """Whether it is exact only if prompts are read at once, as far as is known. Raises NotExact if not even then."""
    result = job.compare(lane, CHUNKED)
    if result is not None and not result.passed:
        result = job.compare(lane, WHOLE)
        if result is not None and not result.passed:
            raise NotExact(off_by(result))
        return True
    return result is None


def _get_weights_ready(job: LoadJob, lane: StateLane | None) -> None:
    """As the packed lane would have done, less what only that can do."""
    if job.are_weights_ready:
        return
    model, kind = job.model, job.kind
    job.are_weights_ready = True
    if job.on_cpu:
        job.progress("packing the weights", 0.85)
        leave_the_files(tensors_but(model, nn.Linear))
        pack_weights(model, job.dtype, kind)
    elif lane is not None:
        rework(lane, kind)
    elif kind is not None:
        quantize_by_torchao(model, kind)


def _no_images(job: LoadJob, reason: str) -> ImageCheck:
    return ImageCheck("none", reason=reason if reads_images(job.model.config) else "")
