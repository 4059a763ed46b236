"""A linear layer over packed weights, for code that calls a model's layers one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmserve.runtime.native.weights import PackedWeight, linear


class NativeLinear(nn.Module):
    """In place of an ``nn.Linear``: layer ``index`` of a packed weight. For inference only."""

    def __init__(self, packed: PackedWeight, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.in_features, packed.sizes[index]
        self.bias = None
        self._packed, self._index, self._dtype = packed, index, dtype

    @property
    def weight(self) -> Tensor:
        """(out, in) in the model's number format, as it counts: for code that looks at it. Made anew at each access."""
        return self._packed.unpack(self._index).to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), float32 or bfloat16."""
        rows = x.reshape(-1, self.in_features)
        result = linear(self._packed.parts[self._index], rows, torch.get_num_threads())
        return result.view(*x.shape[:-1], self.out_features)
