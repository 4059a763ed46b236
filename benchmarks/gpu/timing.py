"""How long something takes on a device that works behind the host's back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UPS = 3
WARM_UP_SECONDS = 0.2
"""At least, on a GPU: one that was idle takes its time to reach its clock rate."""
ROUNDS = 10


def finish(device: torch.device) -> None:
    """Waits for all that the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of several calls, each by the device's own clock."""
    began = time.perf_counter()
    for _ in range(WARM_UPS):
        run()
    finish(device)
    while device.type == "cuda" and time.perf_counter() - began < WARM_UP_SECONDS:
        run()
        finish(device)
    return statistics.median(_once(run, device) for _ in range(ROUNDS))


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def replayed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same as one launch (a CUDA graph), so that the host's launches are not what is measured; elsewhere ``run``
    itself. Raises what the capture raises."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch does not annotate it
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
