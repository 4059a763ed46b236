"""Attention over the compressed cache: the same tokens, and a cache of latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lmserve.config import ModelConfig
from lmserve.runtime import latent
from lmserve.runtime.latent import absorb, expand_again, find_latents, hand_through, release, wants_latents
from lmserve.runtime.memory_plan import _what_is_kept
from tests.runtime import test_exactness as exactness
from tests.runtime.captured_engine import runner_of
from tests.runtime.test_exactness import generated, greedy, prompts, run
from tests.runtime.tiny_models import LATENT, build_tiny

BACKENDS = ("reference", "sdpa", "cpu", "triton")
LATENT_SIZE, ROTARY_SIZE, NUM_LAYERS = LATENT["kv_lora_rank"], LATENT["qk_rope_head_dim"], 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_tokens_are_the_models_own(backend: str) -> None:
    engine = exactness.make_engine("deepseek-v3", attention_backend=backend, max_batched_tokens=16, num_blocks=40)
    assert runner_of(engine).info.lane == "packed"
    assert run(engine, [(p, greedy()) for p in prompts()]) == [generated("deepseek-v3", p) for p in prompts()]


@torch.inference_mode()
def test_a_token_takes_what_its_latent_takes() -> None:
    """Key: the latent and what all heads share; value: the latent. Expanded it would be four heads of 24 and 16."""
    info = runner_of(exactness.make_engine("deepseek-v3", attention_backend="sdpa")).info
    per_token = info.kv_cache_bytes // info.kv_cache_tokens
    assert per_token == NUM_LAYERS * (2 * LATENT_SIZE + ROTARY_SIZE) * 4
    shapes, _ = _what_is_kept(build_tiny("deepseek-v3"), torch.float32, keeps_latents=True)
    assert sum(shape.elements for shape in shapes.values()) * 4 == per_token


def test_what_a_layer_does_with_latents_is_what_it_does_expanded() -> None:
    [layer, *_] = layers = find_latents(build_tiny("deepseek-v3"))
    module: Any = layer
    assert len(layers) == NUM_LAYERS
    latents, rotary = torch.randn(1, 1, 7, LATENT_SIZE), torch.randn(1, 1, 7, ROTARY_SIZE)
    query = torch.randn(5, 4, 24)
    keys, values = (x[0].transpose(0, 1) for x in module.expand_kv(latents, rotary))
    weights = torch.einsum("qhd,khd->hqk", query, keys)
    expected = torch.einsum("hqk,khd->qhd", weights, values)
    hand_through(layers)
    key, value = (x[0, 0] for x in module.expand_kv(latents, rotary))
    got = torch.einsum("qhd,kd->hqk", absorb(module, query), key)
    torch.testing.assert_close(got, weights)
    torch.testing.assert_close(release(module, torch.einsum("hqk,kd->qhd", got, value)), expected)
    expand_again(layers)
    assert module.expand_kv(latents, rotary)[0].shape == (1, 4, 7, 24)
    assert latent.FLAG not in vars(module)


@pytest.mark.parametrize(
    ("device", "options", "wanted"),
    [
        ("cuda", {}, True),
        ("cuda", {"quantization": "int8"}, False),
        ("cpu", {}, False),
        ("cpu", {"attention_backend": "sdpa"}, True),
    ],
)
def test_where_latents_are_kept(device: str, options: dict[str, Any], wanted: bool) -> None:
    assert wants_latents(ModelConfig(model="any", **options), torch.device(device)) is wanted


def test_a_product_that_is_not_plain_keeps_its_layer_as_it_is() -> None:
    model = build_tiny("deepseek-v3")
    [first, *_] = find_latents(model)
    product: Any = first.kv_b_proj
    product.bias = nn.Parameter(torch.zeros(product.out_features))
    assert len(find_latents(model)) == NUM_LAYERS - 1
