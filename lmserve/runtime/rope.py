"""Pins rotary embeddings that would look at the whole batch's positions.

transformers' "dynamic" and "longrope" variants choose their frequencies by the longest position in the forward. In a
packed step that is somebody else's: a long neighbour would change a short request's answer. The frequencies are
therefore fixed once, for the longest sequence that the server will run (``max_model_len``), as vLLM does for longrope.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

PINNED = "pinned"


def pin_rope(model: nn.Module, max_model_len: int) -> list[str]:
    """Fixes every length-dependent rotary embedding in place.

    Returns one sentence for each distinct thing that was pinned, for the start-up message.
    """
    said: dict[str, None] = {}
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, str) and _depends_on_length(rope_type):
            said[_pin(module, rope_type, None, max_model_len)] = None
            module.rope_type = PINNED  # type: ignore[assignment]
        elif isinstance(rope_type, dict):
            for layer_type, kind in rope_type.items():
                if _depends_on_length(kind):
                    said[_pin(module, kind, layer_type, max_model_len)] = None
                    rope_type[layer_type] = PINNED
    return list(said)


def _depends_on_length(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


def _pin(module: Any, rope_type: str, layer_type: str | None, max_model_len: int) -> str:
    prefix = "" if layer_type is None else f"{layer_type}_"
    parameters = module.config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    native = parameters.get("original_max_position_embeddings") or module.config.max_position_embeddings
    if max_model_len <= native:
        return f"{rope_type} rotary embedding: {max_model_len} tokens fit its native {native}, nothing is scaled"
    inv_freq = getattr(module, f"{prefix}inv_freq")
    arguments = {} if layer_type is None else {"layer_type": layer_type}
    scaled, attention_scaling = ROPE_INIT_FUNCTIONS[rope_type](
        module.config, inv_freq.device, seq_len=max_model_len, **arguments
    )
    with torch.no_grad():
        inv_freq.copy_(scaled)
    setattr(module, "attention_scaling" if layer_type is None else f"{prefix}attention_scaling", attention_scaling)
    return f"{rope_type} rotary embedding pinned for {max_model_len} tokens (native: {native})"
