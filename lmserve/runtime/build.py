"""From a configuration to a model runner that has proved itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.build_in_turn import build_serial, build_state
from lmserve.runtime.build_packed import build_packed
from lmserve.runtime.graphs import CudaGraphs
from lmserve.runtime.interface import RunnerInfo
from lmserve.runtime.load_job import Fitted, LoadJob, NotExact, Progress
from lmserve.runtime.loader import fingerprint, load_model
from lmserve.runtime.memory_plan import num_batched_tokens, number_format, weight_bytes
from lmserve.runtime.model_runner import PackedModelRunner
from lmserve.runtime.native.sampling import first_largest
from lmserve.runtime.packed_lane import PackedLane
from lmserve.runtime.recurrent_state import has_states
from lmserve.runtime.sampler import Sampler
from lmserve.runtime.sampling_state import SamplingState

READING_SHARE = 0.8
"""Of a load's time, in reading the weights: what the progress bar makes of it."""
LANES: dict[str, Callable[[LoadJob], Fitted]] = {
    "packed": build_packed,
    "state": build_state,
    "serial": build_serial,
}
"""In the order of their throughput: the first that is exact is taken."""


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
    weights = Weights.as_served(model, config, dtype)
    fitted = _first_exact(LoadJob(model, config, dtype, progress, reserved_bytes))
    return _make_runner(fitted, _describe(fitted, config, dtype, weights), config)


def _first_exact(job: LoadJob) -> Fitted:
    reasons = {}
    for name, build in LANES.items():
        if name == "packed" and has_states(job.model.config.get_text_config()):
            reasons[name] = "it has recurrent layers, and packed sequences would run into each other"
            continue
        try:
            fitted = build(job)
        except NotExact as error:
            reasons[name] = str(error)
            continue
        if reasons:
            job.tell(f"{name} lane: {_told(reasons)}")
        return replace(fitted, lane_reason=_told(reasons))
    raise ModelLoadFailed(f"{type(job.model).__name__} cannot be served exactly: {_told(reasons)}")


def _told(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _make_runner(fitted: Fitted, info: RunnerInfo, config: ModelConfig) -> PackedModelRunner:
    lane, device = fitted.lane, fitted.lane.model.device
    state = SamplingState(max_num_seqs=info.max_num_seqs, vocab_size=info.vocab_size, device=device)
    sampler = Sampler(state, first_largest if lane.program is not None else None)
    runner = PackedModelRunner(lane, sampler, state, info, fitted.images.reader)
    backend = fitted.backend
    wants_graphs = config.cuda_graphs and device.type == "cuda" and type(lane) is PackedLane
    if wants_graphs and backend is not None and backend.reads_device_lengths:
        runner.use_graphs(backend, CudaGraphs(device))
    return runner


def _describe(fitted: Fitted, config: ModelConfig, dtype: torch.dtype, weights: Weights) -> RunnerInfo:
    lane, size = fitted.lane, fitted.size
    model = lane.model
    vocab_size = model.config.get_text_config().vocab_size
    bits = "" if config.quantization == "none" else config.quantization
    return RunnerInfo(
        architecture=type(model).__name__,
        model_type=str(model.config.get_text_config().model_type),
        device=str(model.device),
        dtype=number_format(dtype, config.quantization),
        attention_backend=fitted.attention_backend,
        lane=lane.name if lane.program is None else "native",
        num_parameters=weights.num_parameters,
        weight_bytes=weights.num_bytes,
        vocab_size=vocab_size,
        max_model_len=size.max_model_len,
        block_size=config.block_size,
        num_blocks=size.num_blocks,
        kv_cache_bytes=fitted.kv_cache_bytes,
        max_num_seqs=fitted.max_num_seqs,
        max_num_batched_tokens=num_batched_tokens(config, model.device),
        launches_ahead=model.device.type == "cuda" and lane.name != "serial",
        context_cost=fitted.context_cost,
        num_saved_states=fitted.num_saved_states,
        whole_prompts=fitted.whole_prompts,
        lane_reason=fitted.lane_reason,
        images=fitted.images.reading,
        no_images=fitted.images.reason,
        fingerprint=fingerprint(config, model, dtype, fitted.attention_backend + bits),
    )
