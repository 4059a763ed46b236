from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.interface import DeviceMemory
from lmserve.runtime.memory import (
    CacheSize,
    GpuMemory,
    container_free_bytes,
    device_memory,
    free_bytes,
    measured_budget,
    peak_bytes,
    share_bytes,
    size_cache,
    usable_bytes,
)


def size(**overrides: int | str | None) -> CacheSize:
    arguments: dict[str, int | str | None] = {
        "block_bytes": 1000,
        "block_size": 16,
        "budget": 0,
        "asked_len": 0,
        "native_len": 2048,
        "max_num_seqs": 4,
        "free": 4_000_000,
        "device_type": "cpu",
    }
    return size_cache(**{**arguments, **overrides})  # type: ignore[arg-type]  # a table of mixed values


def test_a_cpu_gets_its_share_of_the_free_memory() -> None:
    assert size(free=400_000) == CacheSize(num_blocks=100, max_model_len=1600)


def test_never_more_blocks_than_all_slots_can_fill() -> None:
    assert size().num_blocks == 4 * 2048 // 16


def test_an_explicit_budget_is_taken_as_it_is() -> None:
    assert size(budget=200_000).num_blocks == 200


def test_a_budget_beyond_the_free_memory_is_refused_with_the_numbers() -> None:
    with pytest.raises(ModelLoadFailed, match=r"5,000,000 bytes, and 4,000,000 are free"):
        size(budget=5_000_000)


def test_an_automatic_context_is_cut_to_the_cache() -> None:
    assert size(budget=100_000).max_model_len == 1600


def test_an_explicit_context_that_does_not_fit_is_refused_with_the_remedy() -> None:
    with pytest.raises(ModelLoadFailed, match=r"needs 128,000 bytes .* lower max_model_len to 1600"):
        size(budget=100_000, asked_len=2048)


def test_a_cache_of_less_than_one_block_is_refused() -> None:
    with pytest.raises(ModelLoadFailed, match="no memory"):
        size(budget=999)


def test_a_gpu_gets_all_that_its_share_has_left() -> None:
    assert size(device_type="cuda", free=100_000).num_blocks == 100


def seen(*, free: int, allocated: int = 0, reserved: int = 0, context: int = 2) -> GpuMemory:
    return GpuMemory(total=100, free=free, allocated=allocated, reserved=reserved or allocated, context=context)


def test_a_share_of_a_gpu_and_what_others_have_left_of_it() -> None:
    assert measured_budget(seen(free=98), 0.9) == 90 - 2, "the context counts"
    assert measured_budget(seen(free=68, allocated=30), 0.9) == 90 - 2 - 30, "weights count"
    assert measured_budget(seen(free=25, allocated=15), 0.9) == 25, "another one has the rest"
    assert measured_budget(seen(free=48, allocated=50), 0.4) == 0
    assert measured_budget(seen(free=98), 1.0) == 98


def test_what_the_largest_step_and_graphs_take_is_left_to_them() -> None:
    assert measured_budget(seen(free=68, allocated=30), 0.9, peak=11, graphs=3) == 90 - 2 - 30 - 11 - 3
    assert measured_budget(seen(free=25, allocated=15), 0.9, peak=11, graphs=3) == 25 - 11 - 3, "free is a limit, too"
    assert measured_budget(seen(free=10, allocated=15), 0.9, peak=11) == 0


def test_what_the_allocator_holds_for_nothing_is_the_processs_own_to_use() -> None:
    assert measured_budget(seen(free=20, allocated=15, reserved=25), 0.9) == 30
    assert measured_budget(seen(free=73, allocated=15, reserved=25), 0.9) == 90 - 2 - 15


class Gpu:
    """A device's memory, and who has it."""

    total, context, weights, peak, graphs = 80_000, 500, 8000, 1500, 400

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}

    def load(self, worker: str, utilization: float) -> int:
        """What the worker gets for its KV cache; for the others' steps their memory is reserved, as ``models`` does."""
        others = len(self.taken) * (self.peak + self.graphs)
        self.taken[worker] = self.context + self.weights
        memory = GpuMemory(
            total=self.total,
            free=self.total - sum(self.taken.values()),
            allocated=self.weights,
            reserved=self.weights,
            context=self.context,
        )
        cache = measured_budget(memory, utilization, peak=self.peak, graphs=self.graphs, others=others)
        self.taken[worker] += cache
        return cache


@pytest.mark.parametrize("utilization", [0.3, 0.45, 0.6, 0.75])
def test_two_workers_on_one_gpu_take_no_more_than_there_is(utilization: float) -> None:
    gpu = Gpu()
    gpu.load("first", utilization)
    second = gpu.load("second", utilization)
    room = gpu.peak + gpu.graphs
    assert gpu.taken["first"] + room == int(gpu.total * utilization), "the first one gets its share"
    assert second > 0
    assert gpu.taken["second"] + room <= gpu.total * utilization
    assert sum(gpu.taken.values()) + 2 * room <= gpu.total, "both can run their largest steps at once"
    if utilization <= 0.45:
        assert gpu.taken["second"] == gpu.taken["first"], "and so does the second, where both shares are there"
    else:
        assert sum(gpu.taken.values()) + 2 * room == gpu.total, "the second one takes what is left"


def test_a_gpu_that_is_full_has_nothing_for_another_one() -> None:
    gpu = Gpu()
    gpu.load("first", 0.9)
    assert gpu.load("second", 0.9) == 0


def test_a_cpu_has_no_share_and_tells_everybody() -> None:
    cpu = torch.device("cpu")
    assert usable_bytes(cpu, 0.1) == pytest.approx(free_bytes(cpu), rel=0.2)
    assert share_bytes(cpu, 0.1) == 0
    assert device_memory("cpu") is None


def test_apples_gpu_has_what_the_machine_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of ``torch.mps`` are there on every machine; only their answers are not."""
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16 * 2**30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 4 * 2**30)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 3 * 2**30)
    mps = torch.device("mps")
    available = psutil.virtual_memory().available
    free = min(12 * 2**30, available)
    assert free_bytes(mps) == pytest.approx(free, rel=0.2)
    assert usable_bytes(mps, 0.5) == pytest.approx(min(5 * 2**30, free + 2**30), rel=0.2)
    assert share_bytes(mps, 0.5) == 8 * 2**30
    assert device_memory("mps:0") == DeviceMemory(16 * 2**30, 4 * 2**30)


def test_a_cpu_does_not_tell_peaks_but_runs_what_it_is_given() -> None:
    ran: list[int] = []
    assert peak_bytes(torch.device("cpu"), lambda: ran.append(1)) is None
    assert ran == [1]


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert container_free_bytes(tmp_path) is None, "no control group"
    (tmp_path / "memory.max").write_text("max\n")
    assert container_free_bytes(tmp_path) is None, "no limit"
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert container_free_bytes(tmp_path) == 450
    (tmp_path / "memory.current").write_text("5000\n")
    assert container_free_bytes(tmp_path) == 0
