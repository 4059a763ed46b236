"""When each value of a trace is computed, and where it lies.

A *stage* is what lies between two things that need all of their input: first one function over rows (``rows.py``), then
the products and the attention that wait for it. Products of one stage with the same input are one product over joined
weights (query, key and value; gate and up). Memory is handed out by stage and used again once nobody reads it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from lmserve.runtime.native.graph import ACROSS, Graph, Value, View
from lmserve.runtime.native.operations import CHEAP
from lmserve.runtime.native.rows import Buffer
from lmserve.runtime.native.trace import NotTraceable
from lmserve.runtime.native.weights import PANEL

LOCAL_NUMBERS = 2**15
"""What a function keeps on its stack at most, for one array."""
ROW_BYTES = 64
"""Rows begin at multiples of this."""


@dataclass(eq=False, slots=True)
class Product:
    """Linear layers that read the same input, as one."""

    parts: list[Value]
    source: View
    stage: int
    kept: bool

    @property
    def size(self) -> int:
        return sum(part.numel for part in self.parts)


@dataclass(eq=False, slots=True)
class Room:
    """A piece of memory for rows of ``pitch`` bytes; ``start`` is known once it is handed out."""

    pitch: int
    kept: bool
    first: int
    last: int
    """The stages of its first and last use."""
    start: int = 0


@dataclass(slots=True)
class Plan:
    """What ``plan`` finds out. Dictionaries are by the id of a value."""

    num_stages: int
    stage: dict[int, int] = field(default_factory=dict)
    kept: dict[int, bool] = field(default_factory=dict)
    """Of the rows whose logits are wanted, not of all tokens."""
    inlined: set[int] = field(default_factory=set)
    buffers: dict[int, Buffer] = field(default_factory=dict)
    rooms: dict[int, Room] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    scratch: dict[int, Room] = field(default_factory=dict)
    """By the id of a product: where its input is prepared."""


def plan(graph: Graph) -> Plan:
    """Raises NotTraceable if tokens and kept rows are mixed."""
    readers: defaultdict[int, list[tuple[Value, View]]] = defaultdict(list)
    for value in graph.values:
        for view in value.views:
            readers[id(view.value)].append((value, view))
    made = Plan(0)
    for value in graph.values:
        _place(value, made)
    made.num_stages = 1 + max(made.stage.values())
    for value in graph.values:
        if _is_inlined(value, readers[id(value)], made):
            made.inlined.add(id(value))
    made.products = _join(graph, made)
    joined = {id(part): product for product in made.products for part in product.parts}
    for value in graph.values:
        if value.kind == "const" or id(value) in made.inlined or id(value) in made.buffers:
            continue
        is_output = value is graph.output.value
        if not _is_local(value, readers[id(value)], made, is_output=is_output):
            parts = joined[id(value)].parts if id(value) in joined else [value]
            used_by = [reader for part in parts for reader, _ in readers[id(part)]]
            _give_room(parts, used_by, made, to_the_end=is_output)
    return made


def _place(value: Value, made: Plan) -> None:
    before = [view.value for view in value.views if view.value.kind != "const"]
    made.stage[id(value)] = max((made.stage[id(v)] + (v.kind in ACROSS) for v in before), default=0)
    if value.kind == "select":
        made.kept[id(value)] = True
        return
    kinds = {made.kept[id(v)] for v in before}
    if len(kinds) > 1:
        raise NotTraceable("its logits mix tokens")
    made.kept[id(value)] = kinds == {True}


def _is_inlined(value: Value, readers: list[tuple[Value, View]], made: Plan) -> bool:
    if value.kind != "row" or not readers:
        return False
    source_is_stored = all(id(view.value) not in made.inlined for view in value.views)
    if len(readers) > 1 and not (value.name in CHEAP and source_is_stored):
        return False
    return all(
        reader.kind in ("row", "reduce", "cat")
        and made.stage[id(reader)] == made.stage[id(value)]
        and made.kept[id(reader)] == made.kept[id(value)]
        and view.is_whole
        and view.shape == value.shape
        for reader, view in readers
    )


def _is_local(value: Value, readers: list[tuple[Value, View]], made: Plan, *, is_output: bool) -> bool:
    """Whether only the value's own function reads it."""
    if value.kind in ACROSS or value.kind == "input" or is_output or value.numel > LOCAL_NUMBERS:
        return False
    here = made.stage[id(value)]
    return all(reader.kind not in ACROSS and made.stage[id(reader)] == here for reader, _ in readers)


def _join(graph: Graph, made: Plan) -> list[Product]:
    products: dict[tuple[object, ...], Product] = {}
    for value in graph.values:
        if value.kind != "linear":
            continue
        (source,) = value.views
        assert value.data is not None
        stage, kept = made.stage[id(value)], made.kept[id(value)]
        key = (stage, kept, id(source.value), source.offset, source.meta.numel(), value.data.dtype, value.dtype)
        if key in products:
            products[key].parts.append(value)
        else:
            products[key] = Product([value], source, stage, kept)
    return list(products.values())


def _give_room(parts: list[Value], readers: list[Value], made: Plan, *, to_the_end: bool) -> None:
    first = parts[0]
    size = first.dtype.itemsize
    numel = sum(-(-part.numel // PANEL) * PANEL for part in parts) if first.kind == "linear" else first.numel
    pitch = -(-numel * size // ROW_BYTES) * ROW_BYTES if first.kind != "input" else numel * size
    stage = made.stage[id(first)]
    last = made.num_stages if to_the_end else max((made.stage[id(reader)] for reader in readers), default=stage)
    room = Room(pitch, made.kept[id(first)], stage, last)
    at = 0
    for part in parts:
        made.buffers[id(part)] = Buffer(pitch // size, part.dtype, at)
        made.rooms[id(part)] = room
        at += -(-part.numel // PANEL) * PANEL if first.kind == "linear" else part.numel


def hand_out(rooms: list[Room], *, max_tokens: int, max_kept: int) -> int:
    """Gives each room its place in one piece of memory, whose size in bytes is returned."""
    total, free = 0, defaultdict[int, list[int]](list)
    starting, ending = defaultdict[int, list[Room]](list), defaultdict[int, list[Room]](list)
    for room in rooms:
        starting[room.first].append(room)
        ending[room.last].append(room)
    for stage in range(max((room.last for room in rooms), default=0) + 1):
        for room in starting[stage]:
            size = room.pitch * (max_kept if room.kept else max_tokens)
            size = -(-size // 4096) * 4096
            if free[size]:
                room.start = free[size].pop()
            else:
                room.start, total = total, total + size
        for room in ending[stage]:
            size = room.pitch * (max_kept if room.kept else max_tokens)
            free[-(-size // 4096) * 4096].append(room.start)
    return total
