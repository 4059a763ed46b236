"""A traced model as one native program: its functions compiled, its weights packed, its operations in a list."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmserve.runtime.attention.base import CacheLayout, LayerCache, Span
from lmserve.runtime.native.compiler import build_source
from lmserve.runtime.native.graph import Graph, Value, View
from lmserve.runtime.native.plan import Plan, Product, Room, hand_out
from lmserve.runtime.native.rows import Segment, SegmentWriter
from lmserve.runtime.native.trace import IDS, KEEP, POSITIONS
from lmserve.runtime.native.weights import TYPES, PackedWeight, WeightStruct, has_tiles
from lmserve.runtime.pages import zeros

SOURCES = Path(__file__).parent / "src"
SEGMENT, PREPARE, PRODUCT, WRITE_CACHE, ATTEND, SELECT = range(6)
KINDS = ("rows", "preparations", "products", "cache writes", "attention", "selection")
ROW_WISE = frozenset((SEGMENT, PREPARE, WRITE_CACHE))


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("pitch", ctypes.c_int64)]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("type", "heads", "kv_heads", "key_size", "value_size", "window")),
        *((name, ctypes.c_int32) for name in ("block_size", "use_amx")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
        *((name, ctypes.c_void_p) for name in ("sinks", "k_cache", "v_cache")),
    ]


class _Operation(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("code", "kept", "barrier", "joined", "type")),
        *((name, ctypes.c_void_p) for name in ("segment", "pointers")),
        ("weight", ctypes.POINTER(WeightStruct)),
        ("scratch", ctypes.c_void_p),
        *((name, _Matrix) for name in ("input", "output", "keys", "values")),
        ("attention", ctypes.POINTER(_Attention)),
        ("bytes", ctypes.c_int64),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("num_tokens", "num_kept", "num_spans", "num_work")),
        *((name, ctypes.c_void_p) for name in ("slots", "kept", "spans", "tables", "work", "nanoseconds")),
    ]


@dataclass(frozen=True, slots=True)
class Limits:
    """Rows that one step has at most."""

    max_tokens: int
    max_kept: int


@dataclass(frozen=True, slots=True)
class CompiledSegments:
    """The row functions of a plan, in a shared object."""

    segments: dict[tuple[int, bool], Segment]
    """By stage, and whether they go over kept rows."""
    functions: dict[str, int]
    """Addresses, by the text."""
    library: Any


def compile_segments(graph: Graph, made: Plan) -> CompiledSegments:
    """Writes and compiles the functions over rows. Raises NativeUnavailable."""
    segments = {}
    for stage in range(made.num_stages):
        for kept in (False, True):
            values = [
                value
                for value in graph.values
                if value.kind in ("row", "reduce", "cat", "embed")
                and (made.stage[id(value)], made.kept[id(value)]) == (stage, kept)
            ]
            segment = SegmentWriter(made.buffers, lambda value: id(value) in made.inlined).write(values)
            if segment is not None:
                segments[stage, kept] = segment
    bodies = list(dict.fromkeys(segment.body for segment in segments.values()))
    texts = [
        f'extern "C" void segment_{i}(void* const* pointers, long begin, long end) {{\n{body}\n}}\n'
        for i, body in enumerate(bodies)
    ]
    library = build_source('#include "rows.h"\nusing namespace lm;\n\n' + "\n".join(texts), "segments")
    addresses = [ctypes.cast(getattr(library, f"segment_{i}"), ctypes.c_void_p).value or 0 for i in range(len(bodies))]
    return CompiledSegments(segments, dict(zip(bodies, addresses, strict=True)), library)


class Program:
    """Owns buffers, packed weights and the list of operations. One step at a time."""

    def __init__(
        self,
        graph: Graph,
        made: Plan,
        segments: CompiledSegments,
        layers: Sequence[LayerCache],
        layout: CacheLayout,
        limits: Limits,
        weights: dict[int, PackedWeight],
    ) -> None:
        self.limits = limits
        self.times: NDArray[np.int64] | None = None
        """Set to (operations,), it is filled by each run with the nanoseconds of each."""
        self._layout, self._layers = layout, layers
        self._plan, self._segments = made, segments
        self._weights = weights
        self._alive: list[Any] = []
        self._memory = self._make_memory()
        self._library = build_source((SOURCES / "program.cpp").read_text(), "program")
        self._library.lm_run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
        self._query_block = int(self._library.lm_query_block())
        operations = self._operations(graph)
        self._operations_array = (_Operation * len(operations))(*operations)
        self.kinds = [KINDS[operation.code] for operation in operations]
        """Of each operation, for those who measure."""
        values = {value.name: value for value in graph.values if value.kind == "input"}
        self._ids = self._rows(values[IDS]).view(-1)
        self._positions = self._rows(values[POSITIONS]) if POSITIONS in values else None
        self._logits = self._rows(graph.output.value)
        assert KEEP in values

    def takes(self, num_tokens: int, num_kept: int, num_position_rows: int) -> bool:
        """Whether it has room for such a step, and was traced for such positions."""
        fits = num_tokens <= self.limits.max_tokens and num_kept <= self.limits.max_kept
        rows = 1 if self._positions is None else self._positions.shape[1]
        return fits and num_position_rows in (1, rows)

    def run(self, ids: Tensor, positions: Tensor, slots: Tensor, kept: Tensor, spans: Sequence[Span]) -> Tensor:
        """One packed step.

        Args:
            ids: (T,) int64.
            positions: (T,) or (rows, T) int64.
            slots: (T,) int64: where each token's key and value go.
            kept: (R,) int64: the rows whose logits are wanted.

        Returns:
            (R, vocab) logits, valid until the next call.
        """
        num_tokens, num_kept = len(ids), len(kept)
        self._ids[:num_tokens] = ids
        if self._positions is not None:
            self._positions[:num_tokens] = positions.view(-1, num_tokens).t()  # to all rows, if it is one
        table, work, tables = self._describe(spans)
        step = _Step(
            num_tokens,
            num_kept,
            len(table),
            len(work),
            slots.data_ptr(),
            kept.data_ptr(),
            table.ctypes.data,
            tables.ctypes.data,
            work.ctypes.data,
            None if self.times is None else self.times.ctypes.data,
        )
        self._library.lm_run(
            self._operations_array, len(self._operations_array), ctypes.byref(step), torch.get_num_threads()
        )
        return self._logits[:num_kept]

    def work(self, num_tokens: int, num_kept: int) -> tuple[int, int]:
        """Bytes of weights that a step reads, and the operations of its products: for those who measure."""
        operations = 0
        for operation in self._operations_array:
            if operation.code == PRODUCT:
                weight = operation.weight[0]
                operations += 2 * weight.n * weight.k * (num_kept if operation.kept else num_tokens)
        return sum(weight.num_bytes for weight in self._weights.values()), operations

    def _describe(self, spans: Sequence[Span]) -> tuple[Any, Any, Any]:
        """The spans, the items of attention with the costliest first, and the block tables, for C."""
        table = np.empty((len(spans), 4), np.int32)
        work: list[tuple[int, int, int, int]] = []
        blocks: list[int] = []
        for i, span in enumerate(spans):
            table[i] = span.row, span.q_len, span.kv_len, len(blocks)
            blocks += span.block_table[: -(-span.kv_len // self._layout.block_size)]
            size = self._query_block
            if span.q_len <= 2 * size:
                size //= 2  # more items, for few would leave threads without work
            for first in range(0, span.q_len, size):
                work.append((i, 0, first, min(size, span.q_len - first)))
        work.sort(key=lambda item: -item[3] * spans[item[0]].kv_len)
        return table, np.array(work, np.int32).reshape(-1, 4), np.array(blocks, np.int32)

    def _make_memory(self) -> NDArray[np.uint8]:
        made = self._plan
        for product in made.products:
            weight = self._weights[id(product.parts[0])]
            size = weight.prepared_bytes
            if size:
                made.scratch[id(product)] = Room(size, product.kept, product.stage, product.stage)
        rooms = list({id(room): room for room in (*made.rooms.values(), *made.scratch.values())}.values())
        total = hand_out(rooms, max_tokens=self.limits.max_tokens, max_kept=self.limits.max_kept)
        return zeros(total)

    def _rows(self, value: Value) -> Tensor:
        """A stored value as a tensor, (rows, numbers)."""
        buffer, room = self._plan.buffers[id(value)], self._plan.rooms[id(value)]
        rows = self.limits.max_kept if room.kept else self.limits.max_tokens
        raw = torch.from_numpy(self._memory[room.start : room.start + rows * room.pitch])
        wide = raw.view(buffer.dtype).view(rows, buffer.pitch)
        return wide[:, buffer.offset : buffer.offset + value.numel]

    def _address(self, value: Value) -> int:
        if value.kind == "const":
            assert value.data is not None
            data = value.data.contiguous()
            self._alive.append(data)
            return data.data_ptr()
        return int(self._memory.ctypes.data) + self._plan.rooms[id(value)].start

    def _matrix(self, view: View) -> _Matrix:
        """A run of a stored value's numbers."""
        buffer = self._plan.buffers[id(view.value)]
        size = buffer.dtype.itemsize
        return _Matrix(self._address(view.value) + (buffer.offset + view.offset) * size, buffer.pitch * size)

    def _operations(self, graph: Graph) -> list[_Operation]:
        made = self._plan
        operations: list[_Operation] = []
        for stage in range(made.num_stages):
            for kept in (False, True):
                segment = self._segments.segments.get((stage, kept))
                if segment is not None:
                    operations.append(self._segment(segment, self._segments.functions[segment.body], kept))
            here = [product for product in made.products if product.stage == stage]
            operations += [self._product(PREPARE, p) for p in here if id(p) in made.scratch]
            attends = [v for v in graph.values if v.kind == "attend" and made.stage[id(v)] == stage]
            selects = [v for v in graph.values if v.kind == "select" and made.stage[id(v)] == stage]
            operations += [self._attend(WRITE_CACHE, value) for value in attends]
            operations += [self._product(PRODUCT, product) for product in here]
            operations += [self._attend(ATTEND, value) for value in attends]
            operations += [self._select(value) for value in selects]
        _set_barriers(operations)
        return operations

    def _segment(self, segment: Segment, function: int, kept: bool) -> _Operation:
        pointers = (ctypes.c_void_p * len(segment.pointers))(*map(self._address, segment.pointers))
        self._alive.append(pointers)
        return _Operation(code=SEGMENT, kept=kept, segment=function, pointers=ctypes.cast(pointers, ctypes.c_void_p))

    def _product(self, code: int, product: Product) -> _Operation:
        weight = self._weights[id(product.parts[0])]
        scratch = self._plan.scratch.get(id(product))
        return _Operation(
            code=code,
            kept=product.kept,
            type=TYPES[product.parts[0].dtype],
            weight=ctypes.pointer(weight.struct),
            scratch=None if scratch is None else int(self._memory.ctypes.data) + scratch.start,
            input=self._matrix(product.source),
            output=self._matrix(View(product.parts[0], product.parts[0].meta)),
        )

    def _attend(self, code: int, value: Value) -> _Operation:
        q, k, v = value.views
        options = value.options
        cache = self._layers[options["layer"]]
        sinks = None
        if options["sinks"] is not None:
            sinks = options["sinks"].float().contiguous()
            self._alive.append(sinks)
        attention = _Attention(
            type=TYPES[value.dtype],
            heads=options["heads"],
            kv_heads=options["kv_heads"],
            key_size=k.meta.numel() // options["kv_heads"],
            value_size=v.meta.numel() // options["kv_heads"],
            window=options["window"],
            block_size=self._layout.block_size,
            use_amx=has_tiles(),
            scaling=options["scaling"],
            softcap=options["softcap"],
            sinks=None if sinks is None else sinks.data_ptr(),
            k_cache=cache.k.data_ptr(),
            v_cache=cache.v.data_ptr(),
        )
        self._alive.append(attention)
        return _Operation(
            code=code,
            type=attention.type,
            input=self._matrix(q),
            keys=self._matrix(k),
            values=self._matrix(v),
            output=self._matrix(View(value, value.meta)),
            attention=ctypes.pointer(attention),
        )

    def _select(self, value: Value) -> _Operation:
        source = value.views[0]
        return _Operation(
            code=SELECT,
            kept=True,
            input=self._matrix(source),
            output=self._matrix(View(value, value.meta)),
            bytes=value.numel * value.dtype.itemsize,
        )


def _set_barriers(operations: list[_Operation]) -> None:
    """Threads wait for each other unless both operations go by rows, the same ones, or are independent products."""
    before: _Operation | None = None
    for operation in operations:
        if before is not None:
            beside = operation.code == before.code and operation.code in (PRODUCT, ATTEND)
            operation.joined = operation.kept == before.kept and {operation.code, before.code} <= ROW_WISE
            operation.barrier = not (operation.joined or beside)
        before = operation
