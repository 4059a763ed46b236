"""From a configuration to an encoder that has proved itself."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.build import READING_SHARE, Weights
from lmserve.runtime.encoder.check import check_inputs, choose_lane
from lmserve.runtime.encoder.lanes import EncoderLane, PaddedEncoderLane, max_positions
from lmserve.runtime.encoder.modules import make_modules, score_activation
from lmserve.runtime.encoder.recipe import Recipe, read_recipe
from lmserve.runtime.encoder.runner import EmbeddingRunner, ScoreRunner
from lmserve.runtime.interface import RunnerInfo, Task
from lmserve.runtime.load_job import Progress
from lmserve.runtime.loader import fingerprint, load_model, read_model_config
from lmserve.runtime.memory_plan import num_batched_tokens
from lmserve.runtime.prepack import leave_the_files, prepack
from lmserve.runtime.quantization import quantize

DEFAULT_LENGTH = 512
"""Of an input, where neither the files nor the model say."""

CPU_BATCHED_TOKENS = 1024
"""Tokens of a step on a CPU: the products are faster than at 512, and at 2,048 only short texts wait longer."""
PREPACKED = (torch.bfloat16, torch.float32)
"""In float32 a text's vector may have other last bits in another step, within the bound that every vector is held to;
the products are faster."""


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
        auto_class=auto_class(read_model_config(config, recipe.subfolder).config, task),
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
    most = num_batched_tokens(config, model.device, CPU_BATCHED_TOKENS)
    lane, reason = choose_lane(model, dtype, recipe.task, most)
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
    info = replace(_describe(model, config, recipe, weights, lane), lane_reason=reason)
    if recipe.pooling is None:
        assert isinstance(lane, PaddedEncoderLane)
        return ScoreRunner(lane, score_activation(model.config, info.row_size), info)
    modules = make_modules(config, recipe.modules, model.device)
    runner = EmbeddingRunner(lane, recipe.pooling, modules, info, recipe.truncate_dim)
    first = runner.encode(check_inputs(model)[:1])[0]
    runner.info = replace(info, row_size=len(first) // 4)
    return runner


def auto_class(model_config: Any, task: Task) -> Any:
    """Which of transformers' classes of the architecture it takes, as sentence-transformers has it: of T5 and its kin
    the encoder alone, whether the files hold a decoder or not.

    Raises:
        ModelLoadFailed: transformers has none.
    """
    if task == "score":
        return AutoModelForSequenceClassification
    if MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(model_config.model_type, "").endswith("EncoderModel"):
        return AutoModelForTextEncoding
    if type(model_config) not in MODEL_MAPPING and not getattr(model_config, "auto_map", None):
        raise ModelLoadFailed(f"transformers has no class that makes vectors of the type {model_config.model_type}")
    return AutoModel


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
