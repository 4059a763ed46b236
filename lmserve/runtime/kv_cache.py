"""The tensors behind the block ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmserve.runtime.attention.base import CacheLayout, LayerCache


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores for a token."""

    num_kv_heads: int
    key_size: int
    value_size: int

    @property
    def elements(self) -> int:
        return self.num_kv_heads * (self.key_size + self.value_size)


class KVCache:
    """Paged K and V for every attention layer of a model.

    A layer's pool is (slots, kv heads, head size), a slot for each token of each block. Pools begin as zeros: masked
    positions are multiplied by a zero probability, so whatever they hold has to be finite.
    """

    def __init__(self, shapes: dict[int, LayerShape], layout: CacheLayout) -> None:
        self.layers = {
            layer: LayerCache(
                k=_zeros(layout, shape.num_kv_heads, shape.key_size),
                v=_zeros(layout, shape.num_kv_heads, shape.value_size),
            )
            for layer, shape in shapes.items()
        }


def _zeros(layout: CacheLayout, num_heads: int, size: int) -> Tensor:
    """On a CPU the operating system's own zero pages, which take memory only once they are written to."""
    shape = (layout.num_slots, num_heads, size)
    if layout.device.type != "cpu":
        return torch.zeros(shape, device=layout.device, dtype=layout.dtype)
    num_bytes = layout.num_slots * num_heads * size * layout.dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(layout.dtype).view(shape)


def block_bytes(shapes: dict[int, LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    return sum(shape.elements for shape in shapes.values()) * block_size * dtype.itemsize
