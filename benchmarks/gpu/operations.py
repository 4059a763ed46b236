"""What a step consists of: a GPU's kernels, as the profiler sees them; elsewhere operations, as torch sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNELS = ("Memcpy", "Memset")


@dataclass(frozen=True, slots=True)
class Operation:
    """All calls of one kind."""

    name: str
    count: int
    microseconds: float
    """Of the device, all calls together; 0 where nobody has timed them."""


def count_operations(run: Callable[[], object], device: torch.device) -> list[Operation]:
    """Of a run, those that take longest first."""
    found = _kernels(run) if device.type == "cuda" else _dispatched(run)
    return sorted(found, key=lambda each: (-each.microseconds, -each.count, each.name))


def in_layers(found: list[Operation], num_layers: int) -> int:
    """Operations of one layer: of each kind the whole multiples of the number of layers, so that what a step does once
    does not count."""
    return sum(each.count // num_layers for each in found)


def _kernels(run: Callable[[], object]) -> list[Operation]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events: Any = profiler.key_averages()
    kernels = [
        Operation(event.key, event.count, float(event.self_device_time_total))
        for event in events
        if "CUDA" in str(event.device_type) and not event.key.startswith(NO_KERNELS)
    ]
    if not kernels:
        raise RuntimeError("the profiler has seen no kernels")
    return kernels


def _dispatched(run: Callable[[], object]) -> list[Operation]:
    counter = _Counter()
    with counter:
        run()
    return [Operation(name, count, 0.0) for name, count in counter.counts.items()]


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Counts what would be a kernel: views are memory that is there already."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [result.alias_info for result in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in returned):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))
