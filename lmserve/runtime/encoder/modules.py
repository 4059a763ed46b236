"""Makes the modules behind the pooling, and a cross-encoder's activation, from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.encoder.pooling import Dense, LayerNorm, Normalize
from lmserve.runtime.encoder.recipe import Module
from lmserve.runtime.loader import find_file


def make_modules(config: ModelConfig, modules: tuple[Module, ...], device: torch.device) -> list[nn.Module]:
    """On the device, in float32.

    Raises:
        ModelLoadFailed: a file is not there, or names something unknown.
    """
    made: list[nn.Module] = []
    for module in modules:
        if module.kind == "Normalize":
            made.append(Normalize())
        elif module.kind == "LayerNorm":
            made.append(LayerNorm(_weights(config, module.folder, device)))
        elif module.kind == "Dense":
            made.append(_dense(config, module, device))
    return made


def score_activation(model_config: PretrainedConfig, num_labels: int) -> nn.Module:
    """What a cross-encoder's logits go through: its configuration's, else sentence-transformers' default."""
    own = getattr(model_config, "sentence_transformers", None)
    name = own.get("activation_fn") if isinstance(own, dict) else None
    name = name or getattr(model_config, "sbert_ce_default_activation_function", None)
    if name is None:
        return nn.Sigmoid() if num_labels == 1 else nn.Identity()
    return activation(str(name))


def activation(name: str) -> nn.Module:
    """One of torch's, by its full name.

    Raises:
        ModelLoadFailed: it is none of them. Code that a file names is not run.
    """
    kind: Any = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if kind is not nn.Identity and getattr(kind, "__module__", "") != nn.ReLU.__module__:
        raise ModelLoadFailed(f"the activation function {name} is not served")
    made: nn.Module = kind()
    return made


def _dense(config: ModelConfig, module: Module, device: torch.device) -> Dense:
    name = str(module.config.get("activation_function") or "torch.nn.modules.activation.Tanh")
    weights = _weights(config, module.folder, device)
    return Dense(weights, activation(name), is_residual=bool(module.config.get("use_residual")))


def _weights(config: ModelConfig, folder: str, device: torch.device) -> dict[str, Tensor]:
    file = find_file(config, f"{folder}/model.safetensors")
    if file is not None:
        found = load_file(file)
    else:
        file = find_file(config, f"{folder}/pytorch_model.bin")
        if file is None:
            raise ModelLoadFailed(f"{config.model}: {folder} has no weights")
        found = torch.load(Path(file), map_location="cpu", weights_only=True)
    return {name: tensor.to(device, torch.float32) for name, tensor in found.items()}
