"""What NVIDIA's driver says of its GPUs, to whoever asks: their memory, by process, and how busy they are.

The package behind it (nvidia-ml-py, imported as pynvml) need not be there, nor the driver: then there are no GPUs to
say anything of. A GPU that does not tell one figure (a part of one, under MIG, say) tells the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of this machine, as of now."""

    identifier: str
    """The driver's: GPU-, and a UUID."""
    total_bytes: int
    used_bytes: int
    """By all processes, and by the driver."""
    utilization: float | None
    """In [0, 1]: for which part of the last moment anything was computing."""
    by_process: Mapping[int, int] = field(default_factory=dict)
    """Bytes by process id. In a container the driver may know processes by ids that are no others' there."""


class Nvml:
    """The driver's library. Opened when it is first asked; if that fails, it is not tried again."""

    def __init__(self) -> None:
        self._library: Any = None
        self._is_open = False

    def gpus(self) -> list[Gpu]:
        """All that the driver shows, in its order; none without the driver or the package. Takes milliseconds."""
        if not self._is_open:
            self._is_open = True
            self._library = _opened()
        library = self._library
        if library is None:
            return []
        count = self._ask(library.nvmlDeviceGetCount) or 0
        found = (self._gpu(index) for index in range(count))
        return [gpu for gpu in found if gpu is not None]

    def _gpu(self, index: int) -> Gpu | None:
        library = self._library
        handle = self._ask(lambda: library.nvmlDeviceGetHandleByIndex(index))
        memory = self._ask(lambda: library.nvmlDeviceGetMemoryInfo(handle))
        if handle is None or memory is None:
            return None
        rates = self._ask(lambda: library.nvmlDeviceGetUtilizationRates(handle))
        processes = self._ask(lambda: library.nvmlDeviceGetComputeRunningProcesses(handle)) or []
        return Gpu(
            identifier=str(self._ask(lambda: library.nvmlDeviceGetUUID(handle)) or ""),
            total_bytes=int(memory.total),
            used_bytes=int(memory.used),
            utilization=None if rates is None else rates.gpu / 100,
            by_process={int(each.pid): int(each.usedGpuMemory) for each in processes if each.usedGpuMemory is not None},
        )

    def _ask(self, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except self._library.NVMLError:
            return None


def _opened() -> Any:
    """The package, ready to be asked; None if it or the driver is not there."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        library.nvmlInit()
    except library.NVMLError:
        return None
    return library
