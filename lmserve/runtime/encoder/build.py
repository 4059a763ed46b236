"""From a configuration to an encoder that has proved itself."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.build import READING_SHARE, Weights
from lmserve.runtime.encoder.batch import make_batch
from lmserve.runtime.encoder.lanes import (
    EncoderLane,
    PackedEncoderLane,
    PaddedEncoderLane,
    max_positions,
    padding_position,
)
from lmserve.runtime.encoder.modules import make_modules, score_activation
from lmserve.runtime.encoder.recipe import Recipe, read_recipe
from lmserve.runtime.encoder.runner import EmbeddingRunner, ScoreRunner
from lmserve.runtime.interface import EncoderInput, RunnerInfo, Task
from lmserve.runtime.load_job import Progress
from lmserve.runtime.loader import fingerprint, load_model
from lmserve.runtime.memory_plan import num_batched_tokens
from lmserve.runtime.prepack import leave_the_files, prepack
from lmserve.runtime.quantization import quantize
from lmserve.runtime.self_check import TOLERANCE

CHECK_LENGTHS = (23, 9, 14, 9)
"""Two of a length, so that a block holds more than one."""
LONGEST_CHECK = 1024
"""A sliding window below it is crossed by the first text."""

DEFAULT_LENGTH = 512
"""Of an input, where neither the files nor the model say."""

CPU_BATCHED_TOKENS = 1024
"""Tokens of a step on a CPU: the products are faster than at 512, and at 2,048 only short texts wait longer."""
PREPACKED = (torch.bfloat16, torch.float32)
"""In float32 a text's vector may have other last bits in another step, within the bound that every vector is held to;
the products are faster."""

AUTO_CLASSES: dict[Task, Any] = {"embed": AutoModel, "score": AutoModelForSequenceClassification}


def build_encoder(
    config: ModelConfig, task: Task, progress: Progress = lambda stage, fraction: None
) -> EmbeddingRunner | ScoreRunner:
    """Loads and checks.

    Raises:
        ModelLoadFailed: the model cannot be loaded, or would not be served exactly.
    """
    began = time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    recipe = read_recipe(config, task)
    progress("loading weights", 0.0)
    model, dtype = load_model(
        config,
        lambda share: progress("loading weights", READING_SHARE * share),
        auto_class=AUTO_CLASSES[task],
        subfolder=recipe.subfolder,
        # What a pooler makes of the first token is not what is pooled here.
        may_lack=lambda name: task == "embed" and "pooler" in name.split("."),
    )
    runner = assemble_encoder(model, config, recipe, dtype, progress)
    runner.info = replace(runner.info, load_seconds=time.monotonic() - began)
    return runner


@torch.inference_mode()
def assemble_encoder(
    model: PreTrainedModel,
    config: ModelConfig,
    recipe: Recipe,
    dtype: torch.dtype,
    progress: Progress = lambda stage, fraction: None,
) -> EmbeddingRunner | ScoreRunner:
    """A runner around a model that is on its device. Raises as ``build_encoder`` does."""
    weights = Weights.of(model)
    progress("comparing with the stock forward", READING_SHARE)
    lane = choose_lane(model, dtype) if recipe.task == "embed" else PaddedEncoderLane(model)
    if config.quantization != "none":
        if model.device.type != "cpu" or config.quantization != "int8":
            raise ModelLoadFailed(
                f"{config.quantization} on {model.device}: embedding and reranking models have int8 on the CPU only"
            )
        quantize(model, "int8")
    else:
        prepack(model, model.device, dtype, PREPACKED)
    if model.device.type == "cpu":
        leave_the_files((*model.parameters(), *model.buffers()))
    info = _describe(model, config, recipe, weights, lane)
    if recipe.pooling is None:
        assert isinstance(lane, PaddedEncoderLane)
        return ScoreRunner(lane, score_activation(model.config, info.row_size), info)
    modules = make_modules(config, recipe.modules, model.device)
    runner = EmbeddingRunner(lane, recipe.pooling, modules, info, recipe.truncate_dim)
    first = runner.encode([EncoderInput([0])])[0]
    runner.info = replace(info, row_size=len(first) // 4)
    return runner


def choose_lane(model: PreTrainedModel, dtype: torch.dtype) -> EncoderLane:
    """The packed lane if it is exact for this model, else the padded one.

    Raises:
        ModelLoadFailed: the stock forward itself cannot run.
    """
    inputs = _check_inputs(model)
    try:
        alone = [_stock(model, each) for each in inputs]
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelLoadFailed(f"the model's own forward fails on a short text: {error}") from error
    lane: PackedEncoderLane | None = None
    try:
        lane = PackedEncoderLane(model)
        batch = make_batch(inputs, model.device)
        packed = torch.split(lane.hidden_states(batch), batch.lengths)
    except Exception:  # whatever a model stumbles over in one row, it may do well in several
        packed = ()
    stock = [alone[index] for index in batch.order] if packed else []
    errors = [((p.float() - s).abs().mean() / s.std()).item() for p, s in zip(packed, stock, strict=True)]
    if lane is not None and errors and all(error <= TOLERANCE[dtype] for error in errors):
        return lane
    if lane is not None:
        lane.give_back()
    return PaddedEncoderLane(model)


def _stock(model: PreTrainedModel, text: EncoderInput) -> Tensor:
    forward: Any = model
    states: Tensor = forward(input_ids=torch.tensor([text.token_ids], device=model.device)).last_hidden_state
    return states[0].float()


def _check_inputs(model: PreTrainedModel) -> list[EncoderInput]:
    text: Any = model.config.get_text_config()
    window = getattr(text, "sliding_window", None) or 0
    limit = max_positions(model) or LONGEST_CHECK
    longest = window + 8 if isinstance(window, int) and window + 8 <= min(LONGEST_CHECK, limit) else 0
    lengths = [min(limit, length) for length in (max(longest, CHECK_LENGTHS[0]), *CHECK_LENGTHS[1:])]
    generator = torch.Generator().manual_seed(0)
    # From 3 on: the first few are special tokens, which some models see in their own way. Padding is among the tokens
    # of the texts that are served if it counts for the positions.
    low = min(3, text.vocab_size - 1)
    inputs = [torch.randint(low, text.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    padding = padding_position(model)
    if padding is not None and len(inputs[1]) > 1:
        inputs[1][1] = padding
    return [EncoderInput(token_ids) for token_ids in inputs]


def context_length(model: PreTrainedModel, config: ModelConfig, said: int | None) -> int:
    """Tokens that one input may have: what the files say, or less.

    ``max_model_len`` is most often meant for the language models beside it: it lowers the limit only.
    """
    limits = (said, max_positions(model), config.max_model_len)
    return min((limit for limit in limits if limit), default=DEFAULT_LENGTH)


def _describe(
    model: PreTrainedModel, config: ModelConfig, recipe: Recipe, weights: Weights, lane: EncoderLane
) -> RunnerInfo:
    dtype = str(model.dtype).removeprefix("torch.")
    int8 = config.quantization == "int8"
    backend = "sdpa" if lane.name == "packed" else str(model.config._attn_implementation)
    return RunnerInfo(
        architecture=type(model).__name__,
        model_type=str(model.config.get_text_config().model_type),
        device=str(model.device),
        dtype=f"int8 and {dtype}" if int8 else dtype,
        attention_backend=backend,
        lane=lane.name,
        num_parameters=weights.num_parameters,
        weight_bytes=weights.num_bytes,
        vocab_size=model.config.get_text_config().vocab_size,
        max_model_len=context_length(model, config, recipe.max_seq_length),
        block_size=0,
        num_blocks=0,
        kv_cache_bytes=0,
        max_num_seqs=1,
        max_num_batched_tokens=num_batched_tokens(config, model.device, CPU_BATCHED_TOKENS),
        task=recipe.task,
        row_size=len(model.config.id2label or ()) if recipe.task == "score" else 0,
        fingerprint=fingerprint(config, model, model.dtype, backend + "int8" * int8),
    )
