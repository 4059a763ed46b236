from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.memory import CacheSize, container_free_bytes, peak_bytes, share_left, size_cache


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


def test_a_share_of_a_gpu_and_what_others_have_left_of_it() -> None:
    assert share_left(total=100, free=100, own=0, utilization=0.9) == 90
    assert share_left(total=100, free=70, own=30, utilization=0.9) == 60, "weights count"
    assert share_left(total=100, free=25, own=15, utilization=0.9) == 25, "another one has the rest"
    assert share_left(total=100, free=50, own=50, utilization=0.4) == 0


def test_two_workers_on_one_gpu_take_no_more_than_there_is() -> None:
    first = share_left(total=80, free=80, own=0, utilization=0.6)
    second = share_left(total=80, free=80 - first, own=0, utilization=0.6)
    assert (first, second) == (48, 32)


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
