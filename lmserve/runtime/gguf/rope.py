"""Rotary embedding as a GGUF file says it: base, width, and how it reaches beyond the length that was trained first."""

from __future__ import annotations

import math
from typing import Any

import torch

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.gguf.file import GGUFFile

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQUENCIES, LONG, SHORT)
"""Part of the rope, and of no weight."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every Llama 3. A file has only what comes of them, which is held against them."""


def rope_changes(file: GGUFFile, config: Any) -> dict[str, Any]:
    """What the configuration has to say instead; ``config`` has the model's shape already.

    Raises:
        ModelLoadFailed: the file says something that is not understood.
    """
    keys = {key.removeprefix("rope."): file.get(key) for key in file.keys if key.startswith("rope.")}
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        if keys:
            raise file.not_understood("rope." + next(iter(keys)))
        return {}
    by_kind = "full_attention" in parameters
    rope = dict(parameters["full_attention"] if by_kind else parameters)
    if (base := keys.pop("freq_base", None)) is not None:
        rope["rope_theta"] = base
    if (width := keys.pop("dimension_count", None)) is not None:
        _set_width(file, config, rope, width)
    local = dict(parameters["sliding_attention"]) if by_kind else {}
    if by_kind and (base := keys.pop("freq_base_swa", None)) is not None:
        local["rope_theta"] = base
    rope.update(_scaling(file, config, keys))
    if keys:
        raise file.not_understood("rope." + next(iter(keys)))
    if by_kind:
        return {"rope_parameters": {**parameters, "full_attention": rope, "sliding_attention": local}}
    changes: dict[str, Any] = {"rope_parameters": rope}
    if rope.get("rope_type") == "longrope":
        changes["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return changes


def _set_width(file: GGUFFile, config: Any, rope: dict[str, Any], width: int) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factor = width / head
    if width > head or int(head * factor) != width:
        raise file.not_understood("rope.dimension_count")
    if factor != 1 or rope.get("partial_rotary_factor") is not None:
        rope["partial_rotary_factor"] = factor


def _scaling(file: GGUFFile, config: Any, keys: dict[str, Any]) -> dict[str, Any]:
    """Takes what it understands out of ``keys``."""
    said = {key: keys.pop(key) for key in list(keys) if key.startswith("scaling.")}
    said.pop("scaling.finetuned", None)
    factor, original = said.pop("scaling.factor", None), said.pop("scaling.original_context_length", None)
    kind = said.pop("scaling.type", "linear" if factor else "none")
    attention = said.pop("scaling.attn_factor", None)
    scaling: dict[str, Any] = {}
    if FREQUENCIES in file.tensors:
        scaling = _llama3(file, config)
    elif LONG in file.tensors:
        scaling = {
            "rope_type": "longrope",
            "long_factor": file.read(LONG).tolist(),
            "short_factor": file.read(SHORT).tolist(),
            "original_max_position_embeddings": original or config.max_position_embeddings,
        }
        if attention:
            scaling["attention_factor"] = attention
            attention = None
    elif kind == "linear" and factor not in (None, 0, 1):
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for name in ("beta_fast", "beta_slow"):
            if (value := said.pop(f"scaling.yarn_{name}", None)) is not None:
                scaling[name] = value
    elif kind not in ("none", "linear"):
        raise file.not_understood("rope.scaling.type")
    if attention not in (None, 0, 1) or said:
        raise file.not_understood("rope." + next(iter(said), "scaling.attn_factor"))
    return scaling


def _llama3(file: GGUFFile, config: Any) -> dict[str, Any]:
    """Llama 3's way (transformers' rope type of that name): wavelengths beyond the trained length are stretched by a
    factor, short ones are left, and those between lie between.

    A file has by what each frequency is divided. The rest is the same for all of these models.
    """
    found = file.read(FREQUENCIES).double()
    low, high, original = LLAMA3.values()
    factor = float(found.max())
    base = file.get("rope.freq_base") or config.rope_parameters["rope_theta"]
    wavelengths = 2 * math.pi * base ** (torch.arange(len(found), dtype=torch.float64) / len(found))
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ModelLoadFailed(f"{file.path.name}: its {FREQUENCIES} is not that of a Llama 3, and is not understood")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}
