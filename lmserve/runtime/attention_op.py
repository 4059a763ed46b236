"""Attention over the paged cache as one operation of torch's, with nothing behind it that a compiler could see.

A cache that is an argument of an operation gets copied by torch's functionalization, and a layer's number that is a
Python number gives each layer a program of its own. So the operation takes queries, keys and values, finds everything
else through the step that runs (``attending``), and is told the layer by a tensor on the CPU, which costs the device
nothing to read. It is defined by hand because a call through torch's decorator for custom operations takes some five
times as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lmserve.runtime.attention.base import LayerOptions

HANDLE = "paged_layer"
"""The attribute of an attention module that says which layer it is."""

NAME = "lmserve::paged_attention"

_LIBRARY = torch.library.Library("lmserve", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch does not annotate it


class PagedStep(Protocol):
    """A step that runs: it knows the cache, where the new tokens go, and what each row attends to."""

    def attend_layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: LayerOptions) -> Tensor:
        """q (T, heads, Dk), k and v (T, kv heads, Dk | Dv) -> (T, heads, Dv), after k and v were written."""
        ...


_STEP: ContextVar[PagedStep] = ContextVar("lmserve_paged_step")


@contextmanager
def attending(step: PagedStep) -> Iterator[None]:
    """While it lasts, the operation belongs to this step."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def give_handle(module: nn.Module, layer: int) -> None:
    """Tells an attention module its place among the layers. A plain attribute: no ``to`` moves it to the device."""
    with torch.inference_mode(False):
        setattr(module, HANDLE, torch.tensor([layer], device="cpu"))


def has_handle(module: nn.Module) -> bool:
    return isinstance(getattr(module, HANDLE, None), Tensor)


def paged_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: LayerOptions) -> Tensor:
    """The operation, for a module that has its handle. The tensors are as in ``PagedStep.attend_layer``."""
    operation: Any = torch.ops.lmserve.paged_attention.default
    window, softcap = options.window or 0, options.softcap or 0.0
    attended: Tensor = operation(q, k, v, getattr(module, HANDLE), options.scaling, window, softcap, options.sinks)
    return attended


def _compute(
    q: Tensor, k: Tensor, v: Tensor, layer: Tensor, scaling: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    options = LayerOptions(scaling, window or None, softcap or None, sinks)
    # Compiled code goes by the layout that _shape has promised.
    return _STEP.get().attend_layer(int(layer), q, k, v, options).contiguous()


def _shape(
    q: Tensor, k: Tensor, v: Tensor, layer: Tensor, scaling: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


_LIBRARY.define(  # type: ignore[no-untyped-call]
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor layer, float scaling, int window, float softcap,"
    " Tensor? sinks) -> Tensor"
)
_LIBRARY.impl("paged_attention", _compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake(NAME, _shape, lib=_LIBRARY)
