"""The tensors behind the block ids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lmserve.runtime.attention.base import CacheLayout, LayerCache
from lmserve.runtime.pages import HUGE_PAGE, pieces, populate

READY_BYTES = 512 * 2**20
"""That are ready beyond what has been used: what a burst of some thousand tokens takes."""


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
        self._num_slots = layout.num_slots
        self._memory: list[NDArray[np.uint8]] = []
        """Of the pools, on a CPU: the operating system's own zero pages, which take memory once they are written to."""
        if layout.device.type == "cpu":
            self._memory = pieces([math.prod(shape) * layout.pool_dtype.itemsize for shape in wanted])
            flat = [torch.from_numpy(raw).view(layout.pool_dtype) for raw in self._memory]
        else:
            flat = [torch.zeros(math.prod(shape), device=layout.device, dtype=layout.pool_dtype) for shape in wanted]
        self._num_ready = [0] * len(self._memory)
        """Bytes of each pool whose memory is there."""
        pools = (numbers.view(shape) for numbers, shape in zip(flat, wanted, strict=True))
        self.layers = {layer: LayerCache(k=next(pools), v=next(pools)) for layer in shapes}

    def get_ready(self, num_used: int) -> bool:
        """Takes some of the memory that slots beyond the first ``num_used`` will need; whether there is more to take.

        To be called when nobody waits: it may take milliseconds, and a step that finds no memory takes them for each
        large page of each layer.
        """
        total = sum(memory.size for memory in self._memory)
        if not total:
            return False
        share = min(1.0, num_used / self._num_slots + READY_BYTES / total)
        for i, memory in enumerate(self._memory):
            begin = self._num_ready[i]
            if begin < share * memory.size:
                self._num_ready[i] = begin + HUGE_PAGE
                if populate(memory[begin : begin + HUGE_PAGE]):
                    return True
                self._num_ready = [memory.size for memory in self._memory]  # not on this system
                return False
        return False


def block_bytes(shapes: dict[int, LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    return sum(shape.elements for shape in shapes.values()) * block_size * dtype.itemsize
