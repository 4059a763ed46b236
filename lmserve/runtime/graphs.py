"""What the device is told once and does again as one launch (CUDA graphs).

A graph does again what a function did while it was captured: the same operations on the same memory. What the function
found out on the host while it was captured, a number or a shape, stays as it was; only what it reads on the device is
read again. A captured function therefore takes everything that changes from tensors that are there before and after,
puts its results into such tensors, and returns nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

import torch

NUM_WARM_UPS = 2
"""Runs before a capture: kernels are compiled and tuned, and workspaces taken, which must not happen in one."""

Key = TypeVar("Key", bound=Hashable)

logger = logging.getLogger(__name__)


class CaptureFailed(Exception):
    """The function does something that cannot be captured, or there is no memory. The device itself is well."""


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Does it again, behind all that the current stream has been given."""
        ...


class Graphs(Protocol):
    """A way to capture functions."""

    def capture(self, run: Callable[[], object]) -> Graph:
        """Runs the function at least once, then captures it. Raises CaptureFailed."""
        ...


class CudaGraphs:
    """Graphs of a CUDA device. All share one memory pool, for one runs after the other: it is as large as the largest
    of them needs, if that one is captured first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], object]) -> Graph:
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):  # a capture that fails leaves its stream the current one
                return self._capture(run)
        except Exception as error:
            torch.cuda.synchronize(self._device)  # says so if it is the device that has failed
            raise CaptureFailed(str(error)) from error
        finally:
            main.wait_stream(self._stream)

    def _capture(self, run: Callable[[], object]) -> Graph:
        for _ in range(NUM_WARM_UPS):
            run()
        graph = torch.cuda.CUDAGraph()
        # Other threads may do what they like with the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph


class GraphTable(Generic[Key]):
    """The graphs of one function, by what it was called with. When one cannot be captured, no other is tried."""

    def __init__(self, graphs: Graphs, what: str) -> None:
        """``what``: the function's work in words, for the log."""
        self._graphs = graphs
        self._what = what
        self._captured: dict[Key, Graph] = {}
        self.has_failed = False

    def __contains__(self, key: Key) -> bool:
        return key in self._captured

    def __len__(self) -> int:
        return len(self._captured)

    def capture(self, key: Key, run: Callable[[], object]) -> bool:
        """Whether ``replay`` can be asked for it: captures ``run`` unless that was done, or cannot be done."""
        if key not in self._captured and not self.has_failed:
            try:
                self._captured[key] = self._graphs.capture(run)
            except CaptureFailed as error:
                self.has_failed = True
                logger.warning("%s: no CUDA graph, each operation is launched by itself. %s", self._what, error)
        return key in self._captured

    def replay(self, key: Key) -> None:
        self._captured[key].replay()
