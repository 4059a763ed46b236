"""Figures of devices and workers: real processes, and GPUs as the driver would tell of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from lmserve.models.nvml import Gpu
from lmserve.models.usage import DeviceUsage, UsageReader, Watched, percent
from lmserve.runtime.interface import DeviceMemory

GIB = 2**30
BUSY = "print('on', flush=True)\nwhile True: pass"
IDLE = "print('on', flush=True)\nimport time\ntime.sleep(600)"


@contextmanager
def process(code: str) -> Iterator[int]:
    """One that runs until the end. Its id."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        started.stdout.readline()
        try:
            yield started.pid
        finally:
            started.kill()


def gpu(number: int, **changes: object) -> Gpu:
    facts = {"total_bytes": 80 * GIB, "used_bytes": 70 * GIB, "utilization": 0.97, "by_process": {}}
    return Gpu(identifier=f"GPU-{number}", **{**facts, **changes})  # type: ignore[arg-type]  # a table of mixed values


def test_a_worker_on_the_cpu_has_what_its_process_has() -> None:
    with process(BUSY) as busy, process(IDLE) as idle:
        reader = UsageReader(gpus=lambda: pytest.fail("nobody runs on a GPU"))
        workers = [Watched(busy, "cpu"), Watched(idle, "cpu")]
        first = reader.read(workers)
        assert first[busy].cpu > 0, "since it began"
        had = psutil.Process(busy).cpu_times().user
        while psutil.Process(busy).cpu_times().user < had + 0.2:
            time.sleep(0.01)
        second = reader.read(workers)
    assert 5 * 2**20 < second[busy].own_bytes < GIB
    device = second[busy].device
    assert device is not None
    assert (device.name, device.total_bytes) == ("cpu", psutil.virtual_memory().total)
    assert device.used_bytes is not None
    assert second[busy].own_bytes < device.used_bytes < device.total_bytes
    assert device.utilization is not None
    assert 0 < device.utilization <= 1
    one_core = 1 / (psutil.cpu_count() or 1)
    assert 0 <= second[idle].cpu < second[busy].cpu < 1.2 * one_core


def test_a_process_that_has_ended_has_nothing() -> None:
    with process(IDLE) as pid:
        pass
    assert UsageReader().read([Watched(pid, "cpu")]) == {}


def test_a_worker_of_which_nothing_is_known_has_its_resident_memory() -> None:
    usage = UsageReader(gpus=list).read([Watched(os.getpid())])[os.getpid()]
    assert usage.device is None
    assert usage.own_bytes > 10 * 2**20


def test_a_gpu_is_found_by_what_the_worker_said_of_it() -> None:
    mine = os.getpid()
    gpus = [gpu(0, by_process={mine: GIB}), gpu(1, used_bytes=40 * GIB, by_process={mine: 36 * GIB})]
    said = DeviceMemory(79 * GIB, 30 * GIB, "1")
    usage = UsageReader(lambda: gpus).read([Watched(mine, "cuda:0", said)])[mine]
    expected = DeviceUsage(name="cuda:0", total_bytes=80 * GIB, used_bytes=40 * GIB, utilization=0.97)
    assert (usage.device, usage.own_bytes) == (expected, 36 * GIB)


def test_where_the_driver_does_not_know_the_process_the_worker_is_believed() -> None:
    """In a container, say: its ids are others outside."""
    mine = os.getpid()
    said = DeviceMemory(79 * GIB, 30 * GIB, "1")
    usage = UsageReader(lambda: [gpu(0), gpu(1)]).read([Watched(mine, "cuda", said)])[mine]
    assert usage.own_bytes == 30 * GIB
    assert usage.device is not None
    assert usage.device.used_bytes == 70 * GIB


def test_without_the_driver_there_is_what_the_worker_said() -> None:
    mine = os.getpid()
    usage = UsageReader(list).read([Watched(mine, "cuda:0", DeviceMemory(79 * GIB, 30 * GIB, "1"))])[mine]
    assert usage.device == DeviceUsage(name="cuda:0", total_bytes=79 * GIB)
    assert usage.own_bytes == 30 * GIB
    on_mps = UsageReader(list).read([Watched(mine, "mps:0", DeviceMemory(20 * GIB, 3 * GIB))])[mine]
    assert (on_mps.device, on_mps.own_bytes) == (DeviceUsage(name="mps:0", total_bytes=20 * GIB), 3 * GIB)


def test_while_a_model_loads_its_gpu_is_the_only_one_or_the_one_with_its_process() -> None:
    mine = os.getpid()
    loading = [Watched(mine, "cuda")]
    usage = UsageReader(lambda: [gpu(0)]).read(loading)[mine]
    assert usage.device is not None
    assert usage.own_bytes == 0
    usage = UsageReader(lambda: [gpu(0), gpu(1, by_process={mine: GIB})]).read(loading)[mine]
    assert usage.own_bytes == GIB
    usage = UsageReader(lambda: [gpu(0), gpu(1)]).read(loading)[mine]
    assert usage.device is None, "it could be either"


def test_percent_for_people() -> None:
    assert (percent(None), percent(0.12345), percent(1.0)) == (None, 12.3, 100.0)
