"""The states of recurrent and convolution layers, a row for each sequence.

transformers keeps them in the layers of its cache object, batch first, in place of keys and values that grow. Here they
lie in one tensor for each state of each layer, (rows, ...): the rows of a step's sequences are gathered into a cache
object, and what the model made of them is written back. Their shapes are learnt from one forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from lmserve.runtime.transfer import send_list

KINDS = ("conv_states", "recurrent_states")


@dataclass(frozen=True, slots=True)
class StateKey:
    """Which state: of a layer's, of one kind."""

    layer: int
    kind: str
    index: int


@dataclass(frozen=True, slots=True)
class StateShape:
    """Of one sequence's state, and the width of the convolution that it is for."""

    size: tuple[int, ...]
    dtype: torch.dtype
    kernel_size: int | None


States = dict[StateKey, Tensor]
"""(sequences, ...) each."""


def new_cache(text_config: Any) -> DynamicCache:
    """A cache object that keeps recurrent states and hands keys and values through, for those lie elsewhere."""
    cache = DynamicCache(config=text_config)
    layers: list[Any] = cache.layers
    for layer in layers:
        if hasattr(layer, "update"):
            layer.update = _hand_through
    return cache


def has_states(text_config: Any) -> bool:
    """Whether the model has layers with such states, by what transformers would keep for it."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=text_config).layers)


def read_states(cache: DynamicCache) -> States:
    """All that the model has left in a cache object. The tensors are its own."""
    return {
        StateKey(i, kind, n): tensor
        for i, layer in enumerate(cache.layers)
        if isinstance(layer, LinearAttentionCacheLayerMixin)
        for kind in KINDS
        for n, tensor in getattr(layer, kind).items()
        if tensor is not None
    }


def learn_shapes(cache: DynamicCache) -> dict[StateKey, StateShape]:
    """From a cache object that the model has filled for one sequence."""
    shapes = {}
    for key, tensor in read_states(cache).items():
        layer: Any = cache.layers[key.layer]
        shapes[key] = StateShape(tuple(tensor.shape[1:]), tensor.dtype, layer.conv_kernel_size[key.index])
    return shapes


def row_bytes(
    shapes: dict[StateKey, StateShape], *, seen_in: torch.dtype | None = None, will_be: torch.dtype | None = None
) -> int:
    """What one sequence's states take. Where the model was seen in another format than it ``will_be`` in, those states
    that were in that, too, will change with it."""

    def itemsize(dtype: torch.dtype) -> int:
        return (will_be if will_be is not None and dtype == seen_in else dtype).itemsize

    return sum(math.prod(shape.size) * itemsize(shape.dtype) for shape in shapes.values())


def fill_cache(cache: DynamicCache, states: States, shapes: dict[StateKey, StateShape]) -> None:
    """Gives a new cache object states to go on from. It overwrites them."""
    for key, tensor in states.items():
        layer: Any = cache.layers[key.layer]
        getattr(layer, key.kind)[key.index] = tensor
        getattr(layer, f"is_{key.kind}_initialized")[key.index] = True
        layer.has_previous_state[key.index] = True
        layer.conv_kernel_size[key.index] = shapes[key].kernel_size
        layer.dtype, layer.device = tensor.dtype, tensor.device


class StateRows:
    """Owns the rows."""

    def __init__(self, shapes: dict[StateKey, StateShape], num_rows: int, device: torch.device) -> None:
        self._device = device
        self._rows = {
            key: torch.zeros((num_rows, *shape.size), dtype=shape.dtype, device=device) for key, shape in shapes.items()
        }

    def gather(self, rows: Sequence[int]) -> States:
        """Copies of the rows."""
        index = send_list(rows, torch.int64, self._device)
        return {key: tensor.index_select(0, index) for key, tensor in self._rows.items()}

    def write(self, rows: Sequence[int], states: States, which: Sequence[int]) -> None:
        """Writes ``states[...][which[i]]`` to ``rows[i]``."""
        into, out_of = (send_list(index, torch.int64, self._device) for index in (rows, which))
        for key, tensor in self._rows.items():
            tensor.index_copy_(0, into, states[key].index_select(0, out_of))

    def copy(self, source: int, target: int) -> None:
        """One row over another."""
        for tensor in self._rows.values():
            tensor[target].copy_(tensor[source])


def _hand_through(keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return keys, values
