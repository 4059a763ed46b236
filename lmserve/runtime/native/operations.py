"""The operations that a trace may hold, and what each is in C++.

A row operation is an expression over floats: operands are converted on reading, and the result is rounded to the
operation's own number format, as torch does when it computes the same operation by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

VIEWS: frozenset[str] = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "slice"),
        *("select", "split", "split_with_sizes", "chunk", "unbind", "clone", "contiguous", "alias", "detach"),
        *("lift_fresh_copy", "narrow", "unflatten", "flatten"),
    )
)

ROWS: Mapping[str, str] = MappingProxyType(
    {
        "copy": "{0}",
        "add": "({0} + {1} * {2})",
        "sub": "({0} - {1} * {2})",
        "rsub": "({1} - {0} * {2})",
        "mul": "({0} * {1})",
        "div": "({0} / {1})",
        "neg": "(-{0})",
        "abs": "std::fabs({0})",
        "pow": "power({0}, {1})",
        "rsqrt": "(1.0f / std::sqrt({0}))",
        "rsqrt_plus": "(1.0f / std::sqrt({0} + {1}))",
        "sqrt": "std::sqrt({0})",
        "reciprocal": "(1.0f / {0})",
        "exp": "exponential({0})",
        "tanh": "hyperbolic_tangent({0})",
        "sigmoid": "(1.0f / (1.0f + exponential(-{0})))",
        "silu": "({0} / (1.0f + exponential(-{0})))",
        "gelu": "gelu({0})",
        "relu": "larger({0}, 0.0f)",
        "cos": "std::cos({0})",
        "sin": "std::sin({0})",
        "log": "std::log({0})",
        "log1p": "std::log1p({0})",
        "erf": "error_function({0})",
        "maximum": "larger({0}, {1})",
        "minimum": "smaller({0}, {1})",
        "clamp": "",
        "where": "({0} != 0.0f ? {1} : {2})",
        "gt": "({0} > {1} ? 1.0f : 0.0f)",
        "ge": "({0} >= {1} ? 1.0f : 0.0f)",
        "lt": "({0} < {1} ? 1.0f : 0.0f)",
        "le": "({0} <= {1} ? 1.0f : 0.0f)",
        "eq": "({0} == {1} ? 1.0f : 0.0f)",
        "ne": "({0} != {1} ? 1.0f : 0.0f)",
    }
)
"""``{i}`` are the operands, numbers included."""

CHEAP: frozenset[str] = frozenset(("copy", "neg"))
"""Not worth keeping for a second use."""

REDUCTIONS: frozenset[str] = frozenset(("mean", "sum", "amax"))

C_TYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float32: "float",
        torch.bfloat16: "bf16",
        torch.int64: "int64_t",
        torch.int32: "int32_t",
        torch.bool: "uint8_t",
    }
)


def expression(name: str, options: Mapping[str, Any], operands: list[str]) -> str:
    """A row operation over operands that are C++ expressions."""
    if name == "clamp":
        result = operands[0]
        if options["low"] is not None:
            result = f"larger({result}, {literal(float(options['low']))})"
        if options["high"] is not None:
            result = f"smaller({result}, {literal(float(options['high']))})"
        return result
    if name == "gelu" and options.get("approximate") == "tanh":
        return f"gelu_tanh({operands[0]})"
    if name in ("add", "sub", "rsub") and operands[2:] in ([literal(1.0)], []):
        left, right = operands[:2] if name != "rsub" else operands[1::-1]
        return f"({left} {'+' if name == 'add' else '-'} {right})"
    if name == "pow" and operands[1] in (literal(2.0), literal(3.0)):
        return "(" + " * ".join(operands[:1] * (2 if operands[1] == literal(2.0) else 3)) + ")"
    return ROWS[name].format(*operands)


def literal(number: float) -> str:
    """A float in C++."""
    if math.isinf(number):
        return "INFINITY" if number > 0 else "(-INFINITY)"
    return f"{torch.tensor(number, dtype=torch.float32).item()!r}f"


def flat_arguments(arguments: Any) -> list[Any]:
    """All that stands in nested tuples, lists and dictionaries."""
    if isinstance(arguments, Mapping):
        return [part for value in arguments.values() for part in flat_arguments(value)]
    if isinstance(arguments, list | tuple):
        return [part for value in arguments for part in flat_arguments(value)]
    return [arguments]
