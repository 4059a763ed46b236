"""How much memory a device has left for this process, and how much of it the KV cache may have, in blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil
import torch

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.interface import DeviceMemory

CGROUP = Path("/sys/fs/cgroup")
CPU_SHARE = 0.25
"""Of the free memory: the machine is the user's, other programs and other models want some too."""
STATE_SHARE, SAVED_SHARE = 0.25, 0.0625
"""Of the free memory: what the recurrent states of running sequences may take, else fewer run at a time; and those that
are saved for prefixes."""
MOST_SAVED = 4
"""Of these, for each sequence that may run."""
CONTEXT_BYTES = 512 * 2**20
"""What a process has of a CUDA device beside torch's tensors: the context, kernels, libraries' workspaces. Expected:
only the driver knows. What is free is measured, and lacks it."""
GRAPH_BYTES = 384 * 2**20
"""What captured steps will take: a pool with the tensors of the largest of them, workspaces, and the driver's own notes
of some dozen graphs. Expected, not measured; a graph for which there is no memory is done without."""


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What a model gets: so many blocks, and so many tokens for one sequence at most."""

    num_blocks: int
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """A GPU's memory as one process sees it. All in bytes."""

    total: int
    free: int
    """What the driver would give to whoever asks: other processes' memory is taken off."""
    allocated: int
    """In this process's tensors."""
    reserved: int
    """What its allocator holds for them: what of it is in no tensor is the process's own to use again."""
    context: int = CONTEXT_BYTES
    """What it has beside the allocator's."""


def measured_budget(memory: GpuMemory, utilization: float, *, peak: int = 0, graphs: int = 0, others: int = 0) -> int:
    """Bytes that a process may still put into tensors that stay, its KV cache say.

    With them, ``peak`` (what the largest step was seen to take for a while) and ``graphs`` (what capturing will take)
    it stays within its share of the device, weights and context and all, and within what is free: whoever comes second
    takes what is left, and the first keeps what it has, and gets the ``others`` bytes that it may still take.
    """
    share = int(memory.total * utilization) - memory.context - memory.allocated
    there = memory.free + memory.reserved - memory.allocated - others
    return max(0, min(share, there) - peak - graphs)


def read_gpu(device: torch.device) -> GpuMemory:
    """As it is now. What the allocator keeps for later stays with it: it gives it up by itself if memory is short."""
    free, total = torch.cuda.mem_get_info(device)
    return GpuMemory(
        total=int(total),
        free=int(free),
        allocated=int(torch.cuda.memory_allocated(device)),
        reserved=int(torch.cuda.memory_reserved(device)),
    )


def read_mps(device: torch.device) -> GpuMemory:
    """As it is now. The GPU shares the machine's memory: what other programs have of it is not free either."""
    total, reserved = int(torch.mps.recommended_max_memory()), int(torch.mps.driver_allocated_memory())
    free = min(total - reserved, int(psutil.virtual_memory().available))
    allocated = int(torch.mps.current_allocated_memory())
    return GpuMemory(total=total, free=max(0, free), allocated=allocated, reserved=reserved, context=0)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on the device."""
    if device.type in READERS:
        return READERS[device.type](device).free
    limited = container_free_bytes(CGROUP)
    available = int(psutil.virtual_memory().available)
    return available if limited is None else min(available, limited)


def usable_bytes(device: torch.device, utilization: float, *, graphs: bool = True, others: int = 0) -> int:
    """Memory that this process may still take: on a GPU within its share, less what graphs take if there will be any
    (``measured_budget``). ``others``: what of the free memory others may still take."""
    if device.type not in READERS:
        return free_bytes(device) - others
    reserve = graph_bytes(device) if graphs else 0
    return measured_budget(READERS[device.type](device), utilization, graphs=reserve, others=others)


def graph_bytes(device: torch.device) -> int:
    """What captured steps will take of the device, if there will be any."""
    return GRAPH_BYTES if device.type == "cuda" else 0


def hold_bytes(device: torch.device, count: int) -> None:
    """Takes memory that later steps will want, so that no other process does: torch's allocator keeps it for them. Less
    if there is not so much."""
    if device.type == "cuda":
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(count, dtype=torch.uint8, device=device)


def share_bytes(device: torch.device, utilization: float) -> int:
    """What this process may have at most, whoever else goes; 0: there is no such limit."""
    return int(READERS[device.type](device).total * utilization) if device.type in READERS else 0


def device_memory(name: str) -> DeviceMemory | None:
    """What other processes cannot find out of a GPU, torch's name for which is given; None for a CPU."""
    device = torch.device(name)
    if device.type not in READERS:
        return None
    memory = READERS[device.type](device)
    identifier = ""
    if device.type == "cuda":
        identifier = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    return DeviceMemory(memory.total, memory.reserved + memory.context, identifier)


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


READERS: Mapping[str, Callable[[torch.device], GpuMemory]] = MappingProxyType({"cuda": read_gpu, "mps": read_mps})
"""By the type of device."""


def num_states(wanted: int, state_bytes: int, free: int) -> tuple[int, int]:
    """Sequences with recurrent states that may run at a time, at most the ``wanted``, and saved states of prefixes.

    Raises:
        ModelLoadFailed: there is no room for a single sequence's.
    """
    if not state_bytes:
        return wanted, 0
    num_running = min(wanted, int(free * STATE_SHARE) // state_bytes)
    if num_running < 1:
        raise ModelLoadFailed(f"one sequence's recurrent state takes {state_bytes:,} bytes, and {free:,} are free")
    return num_running, min(MOST_SAVED * num_running, int(free * SAVED_SHARE) // state_bytes)


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
    most = max_num_seqs * -(-wanted_len // block_size)
    num_blocks = min(budget // block_bytes, most) if block_bytes else most  # a model may keep nothing of its tokens
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
