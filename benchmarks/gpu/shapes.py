"""Models of real shapes: their configurations, and random weights for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.gpu.roofline import ModelSize

CONFIGS = Path(__file__).parent / "configs"
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SEED = 20260101


def model_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def read_config(name: str, *, tiny: bool = False) -> Any:
    """transformers' configuration of a model. ``tiny``: the same architecture, shrunken.

    Raises:
        ValueError: there is no such model.
    """
    if name not in model_names():
        raise ValueError(f"no model {name}; there are {', '.join(model_names())}")
    facts: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    if tiny:
        facts |= TINY
        facts |= TINY_EXPERTS if "num_experts" in facts else {}
    return AutoConfig.for_model(**facts)


def make_model(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> PreTrainedModel:
    """With random weights, made on the device: nothing is read from a disk. On "meta" it has no weights at all."""
    config = read_config(name, tiny=tiny)
    torch.manual_seed(SEED)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype
        )
    model.train(False).requires_grad_(False)
    return model


def size_of(model: PreTrainedModel) -> ModelSize:
    """What the roofline wants to know of it."""
    config = model.config
    every: Any = model  # transformers annotates its models loosely
    embeddings, head = every.get_input_embeddings().weight, every.get_output_embeddings().weight
    total = sum(p.numel() for p in model.parameters())
    outside = sum(p.numel() for p in model.parameters() if p is embeddings or p is head)
    in_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    num_experts = int(getattr(config, "num_experts", 0) or 0)
    return ModelSize(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        body=total - outside - in_experts,
        head=head.numel(),
        expert=in_experts // num_experts if num_experts else 0,
        num_experts=num_experts,
        experts_per_token=int(config.num_experts_per_tok) if num_experts else 0,
        num_bytes=head.element_size(),
    )
