"""The values of a traced step: what each token's row of numbers is computed from.

Everything in a decoder but attention works on each token by itself. So a model is traced for one token alone: then each
tensor of the trace is one row of numbers, whatever its shape, no dimension depends on how many tokens there are, and
dimensions of size one carry nothing. How a shape lies over a row is torch's own algebra of strides: each ``View`` has a
tensor without memory, to which the traced view operations are applied as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["input", "const", "embed", "row", "reduce", "cat", "linear", "attend", "select"]

ACROSS: frozenset[str] = frozenset(("linear", "attend", "select"))
"""Kinds that need all of their input, of other tokens or of the whole row, to be there before they begin."""


@dataclass(eq=False, slots=True)
class Value:
    """One array of the trace: ``meta.numel()`` numbers for each token, in the order of its shape."""

    kind: Kind
    name: str
    """The operation (of rows and reductions), or what an input is called."""
    args: list[View | float]
    meta: Tensor
    """Its shape and number format, contiguous, without memory."""
    data: Tensor | None = None
    """Of constants, weights and embeddings."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype

    @property
    def numel(self) -> int:
        return self.meta.numel()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)

    @property
    def views(self) -> list[View]:
        return [arg for arg in self.args if isinstance(arg, View)]


@dataclass(slots=True)
class View:
    """A value, or a part of it, in some shape."""

    value: Value
    meta: Tensor
    """Strides and offset over the value's numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)

    @property
    def offset(self) -> int:
        return int(self.meta.storage_offset())

    @property
    def is_whole(self) -> bool:
        """All numbers of the value, in their order."""
        return self.is_run and self.meta.numel() == self.value.numel

    @property
    def is_run(self) -> bool:
        """Numbers that lie side by side, in their order."""
        return self.meta.is_contiguous()

    def apply(self, operation: Any, *args: Any, **kwargs: Any) -> View:
        """A view operation of torch. Raises RuntimeError where the result is no view."""
        return View(self.value, operation(self.meta, *args, **kwargs))

    def broadcast(self, shape: Sequence[int]) -> View:
        return View(self.value, self.meta.expand(tuple(shape)))


def whole(value: Value) -> View:
    return View(value, value.meta)


def blank(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor without memory."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


@dataclass(slots=True)
class Graph:
    """A traced forward."""

    output: View
    values: list[Value]
    """All that the output needs, each behind what it is computed from."""


def needed(output: View) -> list[Value]:
    """The values that the output depends on, in an order of computation."""
    order: list[Value] = []
    seen: set[int] = set()
    stack: list[tuple[Value, bool]] = [(output.value, False)]
    while stack:
        value, done = stack.pop()
        if done:
            order.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            stack.append((value, True))
            stack.extend((view.value, False) for view in reversed(value.views))
    return order
