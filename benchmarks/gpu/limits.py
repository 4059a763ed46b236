"""What the device can do at best: copy memory, and multiply. All shares of the roofline are shares of these two."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.results import Row
from benchmarks.gpu.setting import Limits, Setting
from benchmarks.gpu.timing import seconds

COPY = "copy bandwidth"
PRODUCTS = "product rate"
COPY_BYTES, TINY_COPY_BYTES = 4 * 2**30, 2**26
SIZES, TINY_SIZES = (4096, 8192, 16384), (256,)


def run(setting: Setting) -> Iterator[Row]:
    num_bytes = TINY_COPY_BYTES if setting.tiny else COPY_BYTES
    yield Row(COPY, copy_rate(setting.device, num_bytes) / 1e9, "GB/s", note="read and written, added up")
    rates = {}
    for size in TINY_SIZES if setting.tiny else SIZES:
        rates[size] = product_rate(setting.device, setting.dtype, size)
        yield Row(f"product of {size} x {size}", rates[size] / 1e12, "TFLOP/s", note=f"{setting.dtype}")
    yield Row(PRODUCTS, max(rates.values()) / 1e12, "TFLOP/s", note="the best of them")


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes a second."""
    source = torch.empty(num_bytes // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(lambda: target.copy_(source), device)


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Multiplications and additions a second. Of random numbers: zeros take less power, and a GPU that is at its limit
    of power is then faster than it ever will be."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / seconds(lambda: torch.mm(left, right, out=out), device)


def limits_of(rows: list[Row]) -> Limits:
    """What the section's rows say; zero where one is missing."""
    values = {row.name: row.value or 0.0 for row in rows}
    return Limits(values.get(COPY, 0.0) * 1e9, values.get(PRODUCTS, 0.0) * 1e12)
