"""A model that a packed forward would serve wrongly is refused, not served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import FalconConfig, Lfm2Config, LlamaConfig

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.attention.base import AttentionBackend, LayerCache, LayerOptions
from lmserve.runtime.attention.cpu import CpuBackend
from lmserve.runtime.build import assemble_runner
from tests.runtime.tiny_models import BASE, FAMILIES, build_from_config, build_tiny, in_dtype

CONFIG = ModelConfig(model="tiny", kv_cache_memory=2**20, block_size=4, max_model_len=64, max_num_seqs=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_rounding_passes(family: str, dtype: torch.dtype) -> None:
    if family in ("gpt-oss", "mixtral", "qwen3-moe", "deepseek-v3"):
        pytest.skip(
            "with random weights a rounding flips the choice of an expert: the stock forward differs from itself"
        )
    assemble_runner(in_dtype(build_tiny(family), dtype), CONFIG, dtype)


def test_recurrent_layers_are_refused() -> None:
    layers = ["conv", "full_attention", "conv", "full_attention"]
    model = build_from_config(Lfm2Config(**{**BASE, "layer_types": layers, "block_auto_adjust_ff_dim": False}))
    with pytest.raises(ModelLoadFailed, match=r"cannot be served exactly: packed logits differ .* of their spread"):
        assemble_runner(model, CONFIG, torch.float32)


def test_a_model_outside_the_attention_interface_is_refused() -> None:
    model = build_from_config(
        FalconConfig(vocab_size=160, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1)
    )
    with pytest.raises(ModelLoadFailed, match="FalconForCausalLM cannot be served"):
        assemble_runner(model, CONFIG, torch.float32)


def forgets_window(options: LayerOptions) -> LayerOptions:
    return LayerOptions(options.scaling, None, options.softcap, options.sinks)


def forgets_softcap(options: LayerOptions) -> LayerOptions:
    return LayerOptions(options.scaling, options.window, None, options.sinks)


def forgets_sinks(options: LayerOptions) -> LayerOptions:
    return LayerOptions(options.scaling, options.window, options.softcap, None)


@pytest.mark.parametrize(
    ("family", "forget"),
    [("mistral", forgets_window), ("gemma2", forgets_softcap), ("gpt-oss", forgets_sinks)],
    ids=["window", "softcap", "sinks"],
)
def test_a_backend_that_forgets_an_option_is_caught(
    family: str, forget: Callable[[LayerOptions], LayerOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = CpuBackend.attend

    def wrong(
        self: CpuBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, plan: Any, options: Any
    ) -> torch.Tensor:
        return right(self, q, k, v, cache, plan, forget(options))

    monkeypatch.setattr(CpuBackend, "attend", wrong)
    with pytest.raises(ModelLoadFailed, match="cannot be served exactly"):
        assemble_runner(build_tiny(family), replace(CONFIG, attention_backend="cpu"), torch.float32)


def test_not_a_number_is_refused() -> None:
    model = build_from_config(LlamaConfig(**BASE))
    with torch.no_grad():
        model.get_submodule("model.norm").weight.fill_(float("nan"))  # type: ignore[operator]
    with pytest.raises(ModelLoadFailed):
        assemble_runner(model, CONFIG, torch.float32)


def test_backends_are_abstract() -> None:
    with pytest.raises(TypeError):
        AttentionBackend(None)  # type: ignore[abstract, arg-type]
