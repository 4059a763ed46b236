"""Weights in the layout of the native products (``src/gemm.h``), in their own number format or in fewer bits."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmserve.runtime.native.compiler import build_source
from lmserve.runtime.pages import zeros

WeightKind = Literal["float32", "bfloat16", "int8", "int4"]
KINDS: tuple[WeightKind, ...] = ("float32", "bfloat16", "int8", "int4")
TYPES = {torch.float32: 0, torch.bfloat16: 1}
GROUP = 32
"""Numbers along the input that share a scale, with 4 bits."""
PANEL = 32
"""Outputs that lie together: joined layers begin at multiples of it."""


class WeightStruct(ctypes.Structure):
    """``lm::Weight``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "n", "k", "use_amx")),
        *((name, ctypes.c_void_p) for name in ("data", "scales", "bias")),
    ]


@functools.cache
def products() -> ctypes.CDLL:
    """The compiled products. Raises NativeUnavailable."""
    library = build_source((Path(__file__).parent / "src" / "products.cpp").read_text(), "products")
    library.lm_data_bytes.restype = library.lm_prepared_bytes.restype = ctypes.c_int64
    library.lm_linear.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
        *(ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int),
    ]
    return library


@functools.cache
def has_tiles() -> bool:
    """Whether the processor's matrix registers can be used (Intel AMX)."""
    return bool(products().lm_tiles())


def panel_bytes(kind: WeightKind, sizes: Sequence[int], in_features: int, *, use_tiles: bool = True) -> int:
    """What the panels of a ``PackedWeight`` take."""
    struct = _struct(kind, _offsets(sizes)[-1], in_features, use_tiles)
    return int(products().lm_data_bytes(ctypes.byref(struct)))


def _struct(kind: WeightKind, outputs: int, in_features: int, use_tiles: bool) -> WeightStruct:
    return WeightStruct(kind=KINDS.index(kind), n=outputs, k=in_features, use_amx=has_tiles() and use_tiles)


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where each layer's outputs begin, and where the last one's panels end."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // PANEL) * PANEL)
    return offsets


class PackedWeight:
    """Linear layers with the same input, side by side, packed: their outputs follow each other.

    Each layer's outputs begin at a multiple of 32, so that each is a weight of its own, too (``part``).
    """

    def __init__(
        self,
        kind: WeightKind,
        sizes: Sequence[int],
        in_features: int,
        *,
        use_tiles: bool = True,
        room: NDArray[np.uint8] | None = None,
    ) -> None:
        """``room``: where the panels go, ``panel_bytes`` of memory; None: some of its own."""
        self.kind, self.sizes, self.in_features = kind, tuple(sizes), in_features
        self.offsets = _offsets(sizes)
        outputs = self.offsets[-1]
        self.struct = _struct(kind, outputs, in_features, use_tiles)
        self._data = zeros(panel_bytes(kind, sizes, in_features, use_tiles=use_tiles)) if room is None else room
        self.struct.data = self._data.ctypes.data
        self._scales = np.zeros(outputs if kind == "int8" else 0, np.float32)
        if kind == "int8":
            self.struct.scales = self._scales.ctypes.data
        self._bias: NDArray[np.float32] | None = None
        self.parts = [self._part(i) for i in range(len(sizes))]

    def _part(self, i: int) -> WeightStruct:
        """Layer i alone."""
        first = self.offsets[i]
        part = WeightStruct(kind=self.struct.kind, n=self.sizes[i], k=self.in_features, use_amx=self.struct.use_amx)
        bytes_per_output = self._data.size // self.offsets[-1]
        part.data = self._data.ctypes.data + first * bytes_per_output
        if self.kind == "int8":
            part.scales = self._scales[first:].ctypes.data
        return part

    @property
    def num_bytes(self) -> int:
        return self._data.size + self._scales.nbytes

    @property
    def prepared_bytes(self) -> int:
        """Of one row of activations; 0 if rows are read as they are."""
        return int(products().lm_prepared_bytes(ctypes.byref(self.struct)))

    def pack(self, i: int, weight: Tensor, bias: Tensor | None = None, threads: int = 1) -> None:
        """Layer i: weight (size, in_features) float32 or bfloat16, bias (size,)."""
        assert tuple(weight.shape) == (self.sizes[i], self.in_features)
        part, source = self.parts[i], weight.detach().contiguous()
        room: list[Any] = [None, None, None]
        if self.kind == "int4":
            groups = -(-self.in_features // GROUP)
            room = [np.empty(source.numel(), np.uint8), *(np.empty((len(source), groups), np.float32) for _ in "ab")]
        pointers = [None if array is None else ctypes.c_void_p(array.ctypes.data) for array in room]
        products().lm_pack(
            ctypes.byref(part), ctypes.c_void_p(source.data_ptr()), TYPES[source.dtype], *pointers, threads
        )
        self._packed(i, bias)

    def _packed(self, i: int, bias: Tensor | None) -> None:
        first = self.offsets[i]
        if bias is not None:
            if self._bias is None:
                self._bias = np.zeros(self.offsets[-1], np.float32)
                self.struct.bias = self._bias.ctypes.data
            self._bias[first : first + self.sizes[i]] = bias.detach().float().numpy()
            self.parts[i].bias = self._bias[first:].ctypes.data

    def unpack(self, i: int) -> Tensor:
        """(size, in_features) float32: layer i as it counts."""
        weight = torch.empty(self.sizes[i], self.in_features)
        products().lm_unpack(ctypes.byref(self.parts[i]), ctypes.c_void_p(weight.data_ptr()))
        return weight


def linear(weight: WeightStruct, x: Tensor, threads: int) -> Tensor:
    """x (rows, in_features) float32 or bfloat16 -> (rows, out_features) of the same format."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(x.shape[0], weight.n)
    prepared = int(products().lm_prepared_bytes(ctypes.byref(weight)))
    scratch = zeros(prepared * x.shape[0])
    products().lm_linear(
        ctypes.byref(weight), x.data_ptr(), x.stride(0), x.shape[0], out.data_ptr(), TYPES[x.dtype], weight.n,
        scratch.ctypes.data, threads,
    )  # fmt: skip
    return out
