"""From the vectors of a text's tokens to the text's: sentence-transformers' pooling and the modules behind it.

Everything is done in float32, whatever the model runs in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, normalize

from lmserve.runtime.encoder.batch import EncoderBatch
from lmserve.runtime.encoder.recipe import Pooling


def pool(states: Tensor, batch: EncoderBatch, pooling: Pooling) -> Tensor:
    """(T, hidden) -> (inputs, hidden x modes) float32, in the order of the batch's rows."""
    vectors = []
    for block in batch.blocks:
        tokens = states[block.rows].view(block.count, block.length, -1).float()
        first = 0 if pooling.include_prompt else min(block.num_prompt_tokens, block.length - 1)
        vectors.append(torch.cat([_pool(mode, tokens, first) for mode in pooling.modes], dim=-1))
    return torch.cat(vectors)


def _pool(mode: str, tokens: Tensor, first: int) -> Tensor:
    """(count, length, hidden) -> (count, hidden), of the tokens from ``first`` on."""
    counted = tokens[:, first:]
    if mode == "cls":
        return counted[:, 0]
    if mode == "lasttoken":
        return counted[:, -1]
    if mode == "max":
        return counted.amax(dim=1)
    if mode == "weightedmean":
        weights = torch.arange(first + 1, tokens.shape[1] + 1, dtype=torch.float32, device=tokens.device)
        return (counted * weights[:, None]).sum(dim=1) / weights.sum()
    total, number = counted.sum(dim=1), counted.shape[1]
    return total / (number if mode == "mean" else number**0.5)


class Normalize(nn.Module):
    """To length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        return normalize(x, p=2.0, dim=-1)


class Dense(nn.Module):
    """A linear layer and an activation, with the input added to the output if that is asked for."""

    def __init__(self, weights: dict[str, Tensor], activation: nn.Module, *, is_residual: bool) -> None:
        super().__init__()
        self.weight, self.bias = weights["linear.weight"], weights.get("linear.bias")
        self.projection = weights.get("residual.weight")
        self.activation = activation
        self.is_residual = is_residual

    def forward(self, x: Tensor) -> Tensor:
        """(n, in) -> (n, out)."""
        result: Tensor = self.activation(linear(x, self.weight, self.bias))
        if self.is_residual:
            result = result + (x if self.projection is None else linear(x, self.projection))
        return result


class LayerNorm(nn.Module):
    """Layer normalisation of the vector."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = weights["norm.weight"], weights["norm.bias"]

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        return layer_norm(x, self.weight.shape, self.weight, self.bias)
