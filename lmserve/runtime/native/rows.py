"""C++ for the row operations of one stage: a function that takes a range of tokens and computes, for each, every array
that somebody needs.

An array is *stored* (in a buffer that outlives the function, or in a local one) or *inlined* into the only loop that
reads it. A loop runs over an array's shape with neighbouring dimensions merged wherever all arrays in it allow that;
the compiler makes vectors of the innermost one. Layers with the same arithmetic give the same text: one function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lmserve.runtime.native.graph import Value, View
from lmserve.runtime.native.operations import C_TYPES, expression, literal

EXACT: frozenset[str] = frozenset(("neg", "abs", "relu", "maximum", "minimum"))
"""Of rounded operands they give results that need no rounding."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Where a stored value lies between stages: ``pitch`` elements from one token to the next."""

    pitch: int
    dtype: torch.dtype
    offset: int = 0
    """Elements before the value's first one in a row: products with one input share a buffer."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The text of a stage's function without its name, and what its pointers are."""

    body: str
    pointers: list[Value]
    """In the order of the function's first argument; constants are themselves, others their buffers."""


@dataclass(slots=True)
class _Leaf:
    """An array in a loop: its name in C++, and how far apart its numbers are along each dimension of the loop."""

    name: str
    dtype: torch.dtype | None
    """None: a local array of floats."""
    offset: int
    strides: list[int]


@dataclass(slots=True)
class SegmentWriter:
    """Writes one segment. ``buffers``: of every value that is stored between stages; ``is_inlined``: of the others."""

    buffers: Mapping[int, Buffer]
    is_inlined: Callable[[Value], bool]
    _pointers: list[Value] = field(default_factory=list)
    _names: dict[int, str] = field(default_factory=dict)
    _declared: list[str] = field(default_factory=list)
    _lines: list[str] = field(default_factory=list)

    def write(self, values: Sequence[Value]) -> Segment | None:
        """The function for these values, in their order; None if there is nothing to compute."""
        for value in values:
            if not self.is_inlined(value):
                self._write_value(value)
        if not self._lines:
            return None
        lines = [f"  {line}" for line in self._declared]
        lines += ["  for (long row = begin; row < end; ++row) {"]
        for i, value in enumerate(self._pointers):
            if value.kind != "const":
                lines.append(f"    auto* __restrict x{i} = b{i} + row * {self.buffers[id(value)].pitch}L;")
        lines += [f"    {line}" for line in self._lines] + ["  }"]
        return Segment("\n".join(lines), self._pointers)

    def _write_value(self, value: Value) -> None:
        if value.kind == "row":
            self._write_loop(value, value.shape, _contiguous(value.shape), 0, lambda leaves: self._row(value, leaves))
        elif value.kind == "reduce":
            self._write_reduction(value)
        elif value.kind == "cat":
            self._write_cat(value)
        elif value.kind == "embed":
            self._write_lookup(value)
        else:
            raise AssertionError(value.kind)

    def _write_loop(
        self,
        value: Value,
        shape: Sequence[int],
        out_strides: Sequence[int],
        out_offset: int,
        make: Callable[[list[_Leaf]], str],
    ) -> None:
        """``value[...] = expression`` over ``shape``."""
        leaves: list[_Leaf] = []
        text = make(leaves)
        out = self._array(value)
        target = _Leaf(out.name, out.dtype, out.offset + out_offset, list(out_strides))
        sizes = _merge(list(shape), [*leaves, target])
        store = _stored(text, out.dtype)
        place = f"{target.name}[{_index(target, len(sizes))}]"
        self._lines += _nest(sizes, f"{place} = {_filled(store, leaves, len(sizes))};")

    def _row(self, value: Value, leaves: list[_Leaf], *, rounded: bool = True) -> str:
        operands = [self._operand(arg, leaves) if isinstance(arg, View) else literal(arg) for arg in value.args]
        text = expression(value.name, value.options, operands)
        return _rounded(text, value) if rounded else text

    def _operand(self, view: View, leaves: list[_Leaf]) -> str:
        if self.is_inlined(view.value):
            return self._row(view.value, leaves)
        array = self._array(view.value)
        strides = [0 if size == 1 else stride for size, stride in zip(view.shape, view.meta.stride(), strict=True)]
        leaves.append(_Leaf(array.name, array.dtype, array.offset + view.offset, strides))
        return f"@{len(leaves) - 1}@"

    def _write_reduction(self, value: Value) -> None:
        (source,) = value.views
        dims: list[int] = value.options["dims"]
        leaves: list[_Leaf] = []
        text = self._operand(source, leaves)
        out = self._array(value)
        kept = [i for i in range(len(source.shape)) if i not in dims]
        shape = [source.shape[i] for i in [*kept, *dims]]
        strides = _contiguous([source.shape[i] for i in kept])
        for leaf in leaves:
            leaf.strides = [leaf.strides[i] for i in [*kept, *dims]]
        count = math.prod(source.shape[i] for i in dims)
        outer, inner = shape[: len(kept)], shape[len(kept) :]
        inner_sizes = _merge_inner(inner, leaves, len(kept))
        start, step, end = {
            "sum": ("0.0f", "total += {};", "total"),
            "mean": ("0.0f", "total += {};", f"total / {count}.0f"),
            "amax": ("-INFINITY", "total = larger(total, {});", "total"),
        }[value.name]
        names = [f"i{d}" for d in range(len(outer) + len(inner_sizes))]
        body = step.format(_filled(text, leaves, len(names)))
        clause = " reduction(max:total)" if value.name == "amax" else " reduction(+:total)"
        place = " + ".join([str(out.offset), *(f"i{d} * {s}L" for d, s in enumerate(strides))])
        final = _stored(_rounded(end, value), out.dtype)
        lines = [f"float total = {start};", *_nest(inner_sizes, body, first=len(outer), clause=clause)]
        lines.append(f"{out.name}[{place}] = {final};")
        for d in reversed(range(len(outer))):
            lines = [f"for (long i{d} = 0; i{d} < {outer[d]}; ++i{d}) {{", *(f"  {line}" for line in lines), "}"]
        self._lines += ["{", *(f"  {line}" for line in lines), "}"]

    def _write_cat(self, value: Value) -> None:
        dim: int = value.options["dim"]
        strides, at = _contiguous(value.shape), 0
        for part in value.views:

            def make(leaves: list[_Leaf], part: View = part) -> str:
                return self._operand(part, leaves)

            self._write_loop(value, part.shape, strides, at * strides[dim], make)
            at += part.shape[dim]

    def _write_lookup(self, value: Value) -> None:
        (ids,) = value.views
        leaves: list[_Leaf] = []
        where = _filled(self._operand(ids, leaves), leaves, 0)
        assert value.data is not None
        table = self._pointer(value.options["table"], "const ")
        out = self._array(value)
        kind = C_TYPES[value.data.dtype]
        size = value.data.shape[1]
        read = "widen(entry[i0])"
        self._lines += [
            "{",
            f"  const {kind}* __restrict entry = {table} + (long)({where}) * {size}L;",
            *(f"  {line}" for line in _nest([size], f"{out.name}[{out.offset} + i0] = {_stored(read, out.dtype)};")),
            "}",
        ]

    def _array(self, value: Value) -> _Leaf:
        """How the value's numbers are called in the function."""
        buffer = self.buffers.get(id(value))
        if value.kind == "const":
            return _Leaf(self._pointer(value, "const "), value.dtype, 0, [])
        if buffer is not None:
            return _Leaf("x" + self._pointer(value, "")[1:], buffer.dtype, buffer.offset, [])
        name = self._names.get(id(value))
        if name is None:
            name = self._names[id(value)] = f"t{len(self._names)}"
            self._declared.append(f"alignas(64) float {name}[{value.numel}];")
        return _Leaf(name, None, 0, [])

    def _pointer(self, value: Value, qualifier: str) -> str:
        for i, known in enumerate(self._pointers):
            if known is value:
                return f"b{i}"
        i = len(self._pointers)
        self._pointers.append(value)
        kind = C_TYPES[value.dtype if value.kind == "const" else self.buffers[id(value)].dtype]
        self._declared.append(f"auto* __restrict b{i} = static_cast<{qualifier}{kind}*>(pointers[{i}]);")
        return f"b{i}"


def _contiguous(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _merge(sizes: list[int], leaves: Sequence[_Leaf]) -> list[int]:
    """Drops dimensions of size one and merges neighbours where every array allows it; changes the leaves' strides."""
    return _merge_inner(sizes, leaves, 0)


def _merge_inner(sizes: Sequence[int], leaves: Sequence[_Leaf], first: int) -> list[int]:
    """The same for the dimensions from ``first`` on, which have these sizes."""
    merged: list[int] = []
    strides: list[list[int]] = [leaf.strides[:first] for leaf in leaves]
    for d, size in enumerate(sizes):
        if size == 1:
            continue
        here = [leaf.strides[first + d] for leaf in leaves]
        if merged and all(s[-1] == h * size for s, h in zip(strides, here, strict=True)):
            merged[-1] *= size
            for s, h in zip(strides, here, strict=True):
                s[-1] = h
        else:
            merged.append(size)
            for s, h in zip(strides, here, strict=True):
                s.append(h)
    for leaf, s in zip(leaves, strides, strict=True):
        leaf.strides = s
    return merged


def _nest(sizes: Sequence[int], body: str, first: int = 0, clause: str = "") -> list[str]:
    """Loops over i{first}, i{first + 1}, … around a statement."""
    lines = [body]
    for d in reversed(range(len(sizes))):
        index = f"i{first + d}"
        head = f"for (long {index} = 0; {index} < {sizes[d]}; ++{index})"
        innermost = d == len(sizes) - 1
        lines = [head + " {", *(f"  {line}" for line in lines), "}"] if not innermost else [head + " " + lines[0]]
        if innermost:
            lines.insert(0, f"#pragma omp simd{clause}")
    return lines


def _index(leaf: _Leaf, num_dims: int) -> str:
    parts = [str(leaf.offset)] if leaf.offset else []
    parts += [
        f"i{d}" if leaf.strides[d] == 1 else f"i{d} * {leaf.strides[d]}L" for d in range(num_dims) if leaf.strides[d]
    ]
    return " + ".join(parts) or "0"


def _filled(text: str, leaves: Sequence[_Leaf], num_dims: int) -> str:
    """The expression with its arrays in it."""
    for i, leaf in enumerate(leaves):
        read = f"{leaf.name}[{_index(leaf, num_dims)}]"
        text = text.replace(f"@{i}@", read if leaf.dtype is None else f"widen({read})")
    return text


def _rounded(text: str, value: Value) -> str:
    """To the value's number format, still as a float."""
    same = value.name == "copy" and value.views and value.views[0].meta.dtype == value.dtype
    if value.dtype != torch.bfloat16 or value.name in EXACT or same:
        return text
    return f"rounded({text})"


def _stored(text: str, dtype: torch.dtype | None) -> str:
    if dtype is None or dtype == torch.float32:
        return text
    if dtype == torch.bfloat16:
        return f"narrow({text.removeprefix('rounded')})"
    return f"({C_TYPES[dtype]})({text})"
