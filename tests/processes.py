"""Processes that tests end, or see end."""

from __future__ import annotations

import time
from collections.abc import Iterable

import psutil


def still_running(processes: Iterable[psutil.Process], seconds: float = 10.0) -> list[psutil.Process]:
    """Those that do not end within the time. One that has ended and that nobody has taken note of has ended: orphans
    wait for the system's first process, which takes its time on a busy machine."""
    deadline = time.monotonic() + seconds
    left = list(processes)
    while (left := [process for process in left if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
