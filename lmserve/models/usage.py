"""How full and how busy devices are, and what each worker has of them.

The API process looks, by process id: a worker is not asked, so that its token loop does nothing for it and an idle one
sleeps on. Of a CPU the operating system says everything. Of a GPU the driver does (``nvml.py``), if the package for it
is there; without it there is what the worker said when its model was loaded, which is nearly all that it will have, and
how busy the GPU is stays unknown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from lmserve.models.nvml import Gpu, Nvml
from lmserve.runtime.interface import DeviceMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUsage:
    """A device as a whole, whoever uses it."""

    name: str
    """cpu, cuda:0, …"""
    total_bytes: int
    used_bytes: int | None = None
    utilization: float | None = None
    """In [0, 1]: of its time, or of all processors' time. None: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerUsage:
    """One worker's part."""

    device: DeviceUsage | None
    """None until it is known which."""
    own_bytes: int
    """Of the device's memory."""
    cpu: float
    """In [0, 1], of all processors' time since the last look; at the first one, since the process began."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A worker to look at."""

    pid: int
    device: str = ""
    """As torch names it; empty: not known yet."""
    memory: DeviceMemory | None = None
    """What it said of a GPU."""


class UsageReader:
    """Reads the figures, and remembers processor times from one reading to the next. For one thread at a time."""

    def __init__(self, gpus: Callable[[], Sequence[Gpu]] | None = None) -> None:
        self._gpus = gpus or Nvml().gpus
        self._times: dict[int, tuple[float, float]] = {}
        """By process id: when it was read, and the processors' seconds that the process had taken."""
        self._machine = _machine_times()

    def read(self, workers: Sequence[Watched]) -> dict[int, WorkerUsage]:
        """By process id; of a process that has ended, nothing. Takes milliseconds."""
        cpu = self._read_machine()
        gpus = self._gpus() if any(worker.device.startswith("cuda") for worker in workers) else ()
        before, self._times = self._times, {}
        found = {}
        for worker in workers:
            try:
                process = psutil.Process(worker.pid)
                times, resident = process.cpu_times(), int(process.memory_info().rss)
                began = process.create_time(), 0.0
            except psutil.Error:
                continue
            now = self._times[worker.pid] = time.time(), times.user + times.system
            share = _share(before.get(worker.pid, began), now) / (psutil.cpu_count() or 1)
            device = cpu if worker.device.startswith("cpu") else _device_usage(worker, gpus)
            own = resident if device is cpu or device is None else _own_bytes(worker, gpus)
            found[worker.pid] = WorkerUsage(device=device, own_bytes=own, cpu=min(1.0, share))
        return found

    def _read_machine(self) -> DeviceUsage:
        memory, before, self._machine = psutil.virtual_memory(), self._machine, _machine_times()
        return DeviceUsage(
            name="cpu",
            total_bytes=int(memory.total),
            used_bytes=int(memory.total - memory.available),
            utilization=min(1.0, _share(before, self._machine)),
        )


def _machine_times() -> tuple[float, float]:
    """Of all processors: their seconds, and those in which they were busy."""
    times = psutil.cpu_times()
    # A guest's time is in its host's, too.
    seconds = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return seconds, seconds - times.idle - getattr(times, "iowait", 0.0)


def percent(share: float | None) -> float | None:
    """For people, to a tenth."""
    return None if share is None else round(100 * share, 1)


def _share(before: tuple[float, float], now: tuple[float, float]) -> float:
    """Of the time between two readings, each of which is a time and the busy part of it."""
    return max(0.0, now[1] - before[1]) / (now[0] - before[0]) if now[0] > before[0] else 0.0


def _device_usage(worker: Watched, gpus: Sequence[Gpu]) -> DeviceUsage | None:
    gpu = _gpu_of(worker, gpus)
    if gpu is not None:
        return DeviceUsage(
            name=worker.device,
            total_bytes=gpu.total_bytes,
            used_bytes=gpu.used_bytes,
            utilization=gpu.utilization,
        )
    if worker.memory is not None:
        return DeviceUsage(name=worker.device, total_bytes=worker.memory.total_bytes)
    return None


def _own_bytes(worker: Watched, gpus: Sequence[Gpu]) -> int:
    """As the driver counts it; where it does not know the process, as the worker said."""
    gpu = _gpu_of(worker, gpus)
    said = 0 if worker.memory is None else worker.memory.own_bytes
    return said if gpu is None else gpu.by_process.get(worker.pid, said)


def _gpu_of(worker: Watched, gpus: Sequence[Gpu]) -> Gpu | None:
    """By what the worker said of it, else by the process; the only one, if there is but one."""
    identifier = "" if worker.memory is None else worker.memory.identifier
    if identifier:
        return next((gpu for gpu in gpus if gpu.identifier.endswith(identifier)), None)
    using = [gpu for gpu in gpus if worker.pid in gpu.by_process] or list(gpus)
    return using[0] if len(using) == 1 else None
