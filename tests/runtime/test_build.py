from __future__ import annotations

import pytest
import torch

from lmserve.config import ModelConfig
from lmserve.runtime.build import assemble_runner
from tests.runtime.tiny_models import FAMILIES, build_tiny


def context_cost(family: str) -> tuple[float, int]:
    """What is told of the family's tiny model, and its parameters."""
    model = build_tiny(family)
    config = ModelConfig(
        model="tiny",
        kv_cache_memory=2**20,
        max_model_len=64,
        max_num_seqs=4,
        attention_backend="sdpa",
        self_check=False,
    )
    info = assemble_runner(model, config, torch.float32).info
    return info.context_cost, info.num_parameters


def test_what_a_token_of_context_costs() -> None:
    """By the multiplications: two products of each head with each layer's keys and values, counted twice."""
    cost, num_parameters = context_cost("llama")
    config = build_tiny("llama").config
    others = num_parameters - config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * 2 * config.head_dim
    assert cost == pytest.approx(2 * attention / others)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_one(family: str) -> None:
    assert 0 < context_cost(family)[0] < 1
