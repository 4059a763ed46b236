"""A pinned rotary embedding gives a position the same angles in any company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from lmserve.runtime.rope import pin_rope
from tests.runtime.tiny_models import BASE, build_from_config, build_tiny

NATIVE = 32
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 6,
    "long_factor": [4.0] * 6,
    "factor": 4.0,
    "original_max_position_embeddings": NATIVE,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": NATIVE}


def model_with(rope: dict[str, Any]) -> PreTrainedModel:
    config = LlamaConfig(**{**BASE, "max_position_embeddings": NATIVE, "rope_parameters": dict(rope)})
    return build_from_config(config)


def angles(model: PreTrainedModel, positions: list[int]) -> torch.Tensor:
    cos, _ = model.get_submodule("model.rotary_emb")(torch.zeros(1), torch.tensor([positions]))
    assert isinstance(cos, torch.Tensor)
    return cos[0].clone()


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_unpinned_a_long_neighbour_changes_a_short_one(rope: dict[str, Any]) -> None:
    model = model_with(rope)
    alone = angles(model, [0, 1, 2])
    assert not torch.equal(alone, angles(model, [0, 1, 2, 90])[:3])


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
@pytest.mark.parametrize("max_model_len", [NATIVE, 100])
def test_pinned_it_does_not(rope: dict[str, Any], max_model_len: int) -> None:
    model = model_with(rope)
    said = pin_rope(model, max_model_len)
    assert len(said) == 1
    alone = angles(model, [0, 1, 2])
    assert torch.equal(alone, angles(model, [0, 1, 2, 90])[:3])


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
@pytest.mark.parametrize("max_model_len", [NATIVE, 100])
def test_pinned_angles_are_the_stock_ones_of_a_sequence_that_long(rope: dict[str, Any], max_model_len: int) -> None:
    positions = list(range(max_model_len))
    stock = angles(model_with(rope), positions)
    model = model_with(rope)
    pin_rope(model, max_model_len)
    torch.testing.assert_close(angles(model, positions), stock)


def test_a_fixed_rope_is_left_alone() -> None:
    model = build_tiny("llama3-rope")
    before = angles(model, [0, 5, 90])
    assert pin_rope(model, 4096) == []
    assert torch.equal(angles(model, [0, 5, 90]), before)
