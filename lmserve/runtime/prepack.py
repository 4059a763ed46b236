"""Weights in the layout that the processor's matrix kernels read, made once at load.

torch's CPU products in bfloat16 rearrange the weight on every call. oneDNN can keep it rearranged: the same kernels on
the same numbers (the results have the same bits, which the tests hold it to), 1.2 to 2 times faster at the row counts
of decoding. In float32 torch goes another library's way; oneDNN's results differ from it in the last bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from lmserve.runtime.checkpoint_formats import is_plain


class PrepackedLinear(nn.Module):
    """A linear layer whose weight is kept in oneDNN's blocked layout. For inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    @property
    def weight(self) -> Tensor:
        """(out, in), converted back at each access: for code that looks at the weight instead of calling the layer."""
        plain: Tensor = self._packed.to_dense()
        return plain

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return result


Place = tuple[nn.Module, str, nn.Linear]
"""A layer's parent, its name there, the layer."""


SAME_BITS = frozenset((torch.bfloat16,))
"""Number formats in which prepacking changes no result."""


def linears_to_prepack(
    model: nn.Module, device: torch.device, dtype: torch.dtype, dtypes: Collection[torch.dtype] = SAME_BITS
) -> list[Place]:
    """The layers that ``prepack`` replaces: plain ones only."""
    if device.type != "cpu" or dtype not in dtypes or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return []
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if is_plain(child)
    ]


def prepack(
    model: nn.Module, device: torch.device, dtype: torch.dtype, dtypes: Collection[torch.dtype] = SAME_BITS
) -> int:
    """Replaces the model's linear layers where that is faster (on a CPU with oneDNN's kernels for it).

    ``dtypes``: the number formats in which the caller wants it. Returns how many were replaced.
    """
    linears = linears_to_prepack(model, device, dtype, dtypes)
    for parent, name, linear in linears:
        setattr(parent, name, PrepackedLinear(linear))
    return len(linears)


def leave_the_files(tensors: Iterable[Tensor]) -> None:
    """Copies weights that are still a mapped checkpoint file.

    Each of them keeps the whole file mapped, replaced weights and all; and memory that the system may take back at any
    time cannot be counted on, neither by the model nor by whoever asks how much is free.
    """
    for tensor in tensors:
        parts = getattr(tensor, "__tensor_flatten__", None)
        if parts is None:
            tensor.data = tensor.data.clone()
        else:  # its numbers are in others (torchao), and its own data cannot be replaced
            leave_the_files(getattr(tensor, name) for name in parts()[0])


def tensors_of(model: nn.Module, kind: type[nn.Module]) -> list[Tensor]:
    """The parameters and buffers that only modules of this very class own, each once."""
    others = set(map(id, tensors_but(model, kind)))
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in others]


def tensors_but(model: nn.Module, kind: type[nn.Module]) -> list[Tensor]:
    """The parameters and buffers that modules of other classes own, too, each once."""
    owned = {
        id(tensor): tensor
        for module in model.modules()
        if type(module) is not kind
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return list(owned.values())
