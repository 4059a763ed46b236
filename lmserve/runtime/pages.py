"""Large arrays on large pages.

A step reads hundreds of megabytes once, in pieces; with pages of 4 KiB much of the time goes into finding them. Linux
gives pages of 2 MiB to whoever asks (transparent huge pages, also where they are not for everybody). A page is made
when it is first written to, which in a virtual machine takes milliseconds for such a large one: see ``populate``.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

HUGE_PAGE = 2 * 2**20
PIECE_ALIGNMENT = 4096
MADV_POPULATE_WRITE = 23
"""Linux 5.14; Python's mmap has no name for it."""


def pieces(sizes: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Zero bytes for several arrays in one region: a region of its own would take up to a large page more for each."""
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // PIECE_ALIGNMENT) * PIECE_ALIGNMENT
    region = zeros(total)
    return [region[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def zeros(num_bytes: int) -> NDArray[np.uint8]:
    """Zero bytes that begin at a page's beginning and take memory only once they are written to."""
    if num_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = np.zeros(num_bytes + mmap.PAGESIZE, np.uint8)
        start = -raw.ctypes.data % mmap.PAGESIZE
        return raw[start : start + num_bytes]
    region = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(region, np.uint8)
    start = -raw.ctypes.data % HUGE_PAGE
    return raw[start : start + num_bytes]


def populate(array: NDArray[np.uint8]) -> bool:
    """Has the system make the pages of an array of ``zeros`` now, whatever they hold. False: it cannot."""
    if sys.platform != "linux":
        return False
    begin = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    length = array.ctypes.data + array.nbytes - begin
    madvise = ctypes.CDLL(None).madvise
    return bool(madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), MADV_POPULATE_WRITE) == 0)
