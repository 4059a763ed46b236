"""Linear layers in 8 bits: weights once, by output channel; activations at each call, by row.

Symmetric, so that a product is integers times two scales (Dettmers et al. 2022, "LLM.int8()", without its separate
outliers). A row has a scale of its own: what stands beside it in a step does not change it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST = 127


class Int8Linear(nn.Module):
    """In place of an ``nn.Linear``. For inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach().float()
        self._scale = (weight.abs().amax(dim=1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        # (in, out), contiguous in memory as (out, in): what the kernel reads fastest.
        self._weight = (weight / self._scale[:, None]).round().to(torch.int8).contiguous().t()
        # A copy: a view would keep the whole mapped file.
        self.bias = None if linear.bias is None else linear.bias.detach().float().clone()

    @property
    def weight(self) -> Tensor:
        """(out, in), as it counts: for code that looks at the weight instead of calling the layer."""
        return self._weight.t().float() * self._scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the input's dtype."""
        rows = x.reshape(-1, self.in_features)
        scale = (rows.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        products = torch._int_mm((rows / scale).round().to(torch.int8), self._weight)
        result = products * (scale * self._scale)
        if self.bias is not None:
            result += self.bias
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)


def quantize(model: nn.Module) -> int:
    """Replaces the model's plain linear layers (a subclass may mean something else). Returns how many."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    for parent, name, linear in places:
        setattr(parent, name, Int8Linear(linear))
    return len(places)
