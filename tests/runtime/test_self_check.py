"""A model that a lane would serve wrongly does not get it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import FalconConfig, Lfm2Config, LlamaConfig, PreTrainedModel

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.attention.base import AttentionBackend, LayerCache, LayerOptions
from lmserve.runtime.attention.cpu import CpuBackend
from lmserve.runtime.build import assemble_runner
from lmserve.runtime.build_in_turn import build_state
from lmserve.runtime.build_packed import build_packed
from lmserve.runtime.load_job import Fitted, LoadJob, NotExact
from lmserve.runtime.packed_lane import PackedLane
from lmserve.runtime.self_check import CHUNKED, PACKED, WHOLE, _longest_prompt, _steps
from lmserve.runtime.state_lane import StateLane
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


def packed(model: PreTrainedModel) -> Fitted:
    return build_packed(LoadJob(model, CONFIG, torch.float32, lambda sentence, share: None, 0))


def test_packed_recurrent_layers_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ["conv", "full_attention", "conv", "full_attention"]
    config = Lfm2Config(**{**BASE, "layer_types": layers, "block_auto_adjust_ff_dim": False})
    with pytest.raises(NotExact, match="layers of the kind conv"):
        packed(build_from_config(config))
    monkeypatch.setattr(PackedLane, "known_layers", StateLane.known_layers)
    with pytest.raises(NotExact, match=r"logits differ .* of their spread"):
        packed(build_from_config(config))


def test_a_model_outside_the_attention_interface_is_not_packed() -> None:
    model = build_from_config(
        FalconConfig(vocab_size=160, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1)
    )
    with pytest.raises(NotExact, match="attention interface"):
        packed(model)


@pytest.mark.parametrize("kind", ["chunked_attention", "indexed_attention"])
def test_kinds_of_layers_that_differ_only_in_long_prompts_are_not_packed(kind: str) -> None:
    model = build_tiny("llama")
    model.config.layer_types = [kind, "full_attention"] * 2
    with pytest.raises(NotExact, match=f"layers of the kind {kind}"):
        packed(model)


def test_a_window_that_only_a_mask_would_know_is_not_packed() -> None:
    model = build_tiny("gemma3")
    for layer in model.get_submodule("model.layers").children():
        layer.self_attn.sliding_window = None  # type: ignore[union-attr]
    with pytest.raises(NotExact, match="2 of its layers have a window, and only 0 say so"):
        packed(model)


@pytest.mark.parametrize("how", ["packed", "state"])
def test_a_lane_that_fails_leaves_the_models_own_attention(how: str) -> None:
    """Else the next one would be compared with it."""
    model = build_tiny("llama")
    with torch.no_grad():
        model.get_submodule("model.norm").weight.fill_(float("nan"))  # type: ignore[operator]
    before = model.config._attn_implementation
    build = build_packed if how == "packed" else build_state
    with pytest.raises(NotExact):
        build(LoadJob(model, CONFIG, torch.float32, lambda sentence, share: None, 0))
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("said", "manner", "longest"),
    [
        ({}, PACKED, 23),
        ({"sliding_window": 40}, PACKED, 48),
        ({"sliding_window": 4096}, PACKED, 23),
        ({}, CHUNKED, 144),
        ({"chunk_size": 8}, CHUNKED, 32),
        ({"mamba_chunk_size": 256}, WHOLE, 528),
        ({"chunk_size": 4096}, CHUNKED, 528),
        ({"max_position_embeddings": 100}, CHUNKED, 100),
    ],
)
def test_the_first_prompt_crosses_what_layers_compute_at_once(said: dict[str, int], manner: str, longest: int) -> None:
    """Two chunks, each longer than that, or the difference would not show."""
    text_config = SimpleNamespace(**said)
    assert _longest_prompt(text_config, 1000, manner) == longest
    chunks = [n for step in _steps([longest, 9, 14], manner) for prompt, n in step if prompt == 0]
    assert sum(chunks) == longest
    assert _longest_prompt(text_config, 30, manner) <= 30


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
    said: list[str] = []
    config = replace(CONFIG, attention_backend="cpu")
    info = assemble_runner(build_tiny(family), config, torch.float32, lambda stage, _: said.append(stage)).info
    assert info.lane == "serial", "where the model attends by itself"
    assert [sentence for sentence in said if sentence.startswith("serial lane: packed: logits differ")]


def test_not_a_number_is_refused() -> None:
    model = build_from_config(LlamaConfig(**BASE))
    with torch.no_grad():
        model.get_submodule("model.norm").weight.fill_(float("nan"))  # type: ignore[operator]
    with pytest.raises(ModelLoadFailed):
        assemble_runner(model, CONFIG, torch.float32)


def test_backends_are_abstract() -> None:
    with pytest.raises(TypeError):
        AttentionBackend(None)  # type: ignore[abstract, arg-type]
