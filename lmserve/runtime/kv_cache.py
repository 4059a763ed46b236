"""The tensors behind the block ids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmserve.runtime.attention.base import CacheLayout, LayerCache
from lmserve.runtime.pages import pieces


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
        wanted = [
            (layout.num_slots, shape.num_kv_heads, size)
            for shape in shapes.values()
            for size in (shape.key_size, shape.value_size)
        ]
        pools = iter(_zeros(wanted, layout))
        self.layers = {layer: LayerCache(k=next(pools), v=next(pools)) for layer in shapes}


def _zeros(shapes: list[tuple[int, int, int]], layout: CacheLayout) -> list[Tensor]:
    """On a CPU the operating system's own zero pages, which take memory only once they are written to."""
    if layout.device.type != "cpu":
        return [torch.zeros(shape, device=layout.device, dtype=layout.dtype) for shape in shapes]
    arrays = pieces([math.prod(shape) * layout.dtype.itemsize for shape in shapes])
    return [torch.from_numpy(raw).view(layout.dtype).view(shape) for raw, shape in zip(arrays, shapes, strict=True)]


def block_bytes(shapes: dict[int, LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    return sum(shape.elements for shape in shapes.values()) * block_size * dtype.itemsize
