"""Graphs for a CPU: what a function does is written down, operation by operation, and done again without any of it.

As with a real graph nothing of the function's Python runs in a replay, so that a number or a shape which it found out
on the host while it was captured stays as it was; and what would make the host wait for the device cannot be captured.
Operations are written down below autograd and below functions that torch makes of others, where a device would be
launched; a view is memory that is there already, and nothing to do again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmserve.runtime.graphs import CaptureFailed

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "equal", "bincount")
"""Parts of the names of operations that read values back, or whose result's shape depends on values."""
UNINITIALISED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
BUILT_IN = ("aten", "prim", "prims", "mkldnn", "mkl", "quantized")
"""Namespaces of torch's own operations; one of another is taken apart into those."""


def reason_to_wait(func: Any, args: Any, kwargs: Any) -> str:
    """Why the host would have to wait for a device in this operation; empty if it would not."""
    name = func.overloadpacket.__name__
    if any(waiting in name for waiting in WAITING):
        return f"{func} waits for the device"
    indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        return f"{func} by a mask: its shape waits for the device"
    if str(func) == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is None:
        return f"{func} without a size: its shape waits for the device"
    return ""


class RecordedGraphs:
    """Implements ``lmserve.runtime.graphs.Graphs``."""

    def __init__(self) -> None:
        self.num_captures = 0
        self.num_replays = 0

    def capture(self, run: Callable[[], object]) -> _RecordedGraph:
        run()
        recorder = _Recorder()
        with recorder:
            run()
        self.num_captures += 1
        return _RecordedGraph(self, recorder.operations)


@dataclass(frozen=True, slots=True)
class _Operation:
    func: Any
    args: Any
    kwargs: Any
    results: list[Tensor]
    """Memory that its results go to; none if it writes to its arguments."""

    def run(self) -> None:
        out = self.func(*self.args, **self.kwargs)
        for result, tensor in zip(self.results, _tensors(out) if self.results else (), strict=True):
            result.copy_(tensor)


@dataclass(frozen=True, slots=True)
class _RecordedGraph:
    _graphs: RecordedGraphs
    _operations: list[_Operation]

    def replay(self) -> None:
        for operation in self._operations:
            operation.run()
        self._graphs.num_replays += 1


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[_Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reason = reason_to_wait(func, args, kwargs) or _reason_to_copy(func, args)
        if reason:
            raise CaptureFailed(reason)
        if func.namespace not in BUILT_IN:
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func._schema.is_mutable:
            self.operations.append(_Operation(func, args, kwargs, []))
            return
        memory = {_place(tensor) for tensor in _tensors((args, kwargs))}
        results = [tensor for tensor in _tensors(out) if _place(tensor) not in memory]
        if results and func.overloadpacket.__name__ not in UNINITIALISED:
            assert len(results) == len(list(_tensors(out))), f"{func}: some of its results are views, some are not"
            self.operations.append(_Operation(func, args, kwargs, results))


def _reason_to_copy(func: Any, args: Any) -> str:
    """A tensor made of Python's numbers would have to be copied to the device, and would stay what it was."""
    if func.overloadpacket.__name__ == "lift_fresh" and args[0].dim() > 0:
        return f"a tensor of {args[0].numel()} numbers of Python's"
    return ""


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
