"""How much memory the KV cache may have, in blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lmserve.errors import ModelLoadFailed

CGROUP = Path("/sys/fs/cgroup")
CPU_SHARE = 0.25
"""Of the free memory: the machine is the user's, other programs and other models want some too."""


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What a model gets: so many blocks, and so many tokens for one sequence at most."""

    num_blocks: int
    max_model_len: int


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    limited = container_free_bytes(CGROUP)
    available = int(psutil.virtual_memory().available)
    return available if limited is None else min(available, limited)


def usable_bytes(device: torch.device, utilization: float) -> int:
    """Memory that this process may still take. On a GPU it stays within its share of the device, weights and all, and
    within what others have left: a second worker takes what is there, and the first one keeps what it has."""
    free = free_bytes(device)
    if device.type == "cuda":
        total = int(torch.cuda.mem_get_info(device)[1])
        return share_left(total, free, torch.cuda.memory_reserved(device), utilization)
    if device.type == "mps":
        taken = int(torch.mps.driver_allocated_memory())
        return share_left(int(torch.mps.recommended_max_memory()), free, taken, utilization)
    return free


def share_left(total: int, free: int, own: int, utilization: float) -> int:
    """What is left of a process's share of a device where it has taken ``own`` bytes. All in bytes."""
    return max(0, min(free, int(total * utilization) - own))


def peak_bytes(device: torch.device, run: Callable[[], None]) -> int | None:
    """What ``run`` takes of the device's memory for a while; None where the device does not tell."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    return int(peak) - before


def container_free_bytes(folder: Path) -> int | None:
    """What a container's memory limit leaves (control groups version 2), or None without one.

    The page cache counts as used there and is given back on demand, so what of it is inactive counts as free.
    """
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


def size_cache(
    *,
    block_bytes: int,
    block_size: int,
    budget: int,
    asked_len: int,
    native_len: int | None,
    max_num_seqs: int,
    free: int,
    device_type: str,
) -> CacheSize:
    """Blocks for the KV cache and the context length that results.

    ``budget`` and ``asked_len`` are the person's (0: choose); an explicit context that does not fit is refused, an
    automatic one is cut to what fits and said at start-up. Never more blocks than all slots could fill. ``free``: what
    weights and activations have left; on a CPU a share of it is taken.

    Raises:
        ModelLoadFailed: with the numbers.
    """
    if not budget:
        budget = int(free * CPU_SHARE) if device_type == "cpu" else max(0, free)
        if asked_len:  # a person's word: more than the share, if there is more
            budget = max(budget, min(free, -(-asked_len // block_size) * block_bytes))
    elif budget > free:
        raise ModelLoadFailed(f"kv_cache_memory is {budget:,} bytes, and {free:,} are free on the device")
    wanted_len = asked_len or native_len or 4096
    num_blocks = min(budget // block_bytes, max_num_seqs * -(-wanted_len // block_size))
    capacity = num_blocks * block_size
    if asked_len > capacity:
        needed = -(-asked_len // block_size) * block_bytes
        raise ModelLoadFailed(
            f"max_model_len {asked_len} needs {needed:,} bytes of KV cache, and {budget:,} are there: "
            f"lower max_model_len to {capacity} or raise kv_cache_memory"
        )
    if capacity < block_size:
        raise ModelLoadFailed(f"no memory for a KV cache: one block needs {block_bytes:,} bytes, {budget:,} are there")
    return CacheSize(num_blocks, min(wanted_len, capacity))
