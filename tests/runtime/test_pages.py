from __future__ import annotations

import psutil
import pytest

from lmserve.runtime.pages import HUGE_PAGE, pieces, zeros

MANY = 512 * 2**20


@pytest.mark.parametrize("size", [0, 1, 4097, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_bytes_are_zero_writable_and_begin_with_a_page(size: int) -> None:
    array = zeros(size)
    assert array.shape == (size,)
    assert not array.any()
    array[:] = 7
    assert array.sum() == 7 * size
    if size:
        assert array.ctypes.data % (HUGE_PAGE if size >= HUGE_PAGE else 4096) == 0


def test_memory_is_taken_when_it_is_written_to_and_given_back() -> None:
    before = psutil.Process().memory_info().rss
    array = zeros(MANY)
    assert psutil.Process().memory_info().rss - before < MANY / 4
    array[: MANY // 2] = 1
    assert psutil.Process().memory_info().rss - before > MANY / 3
    del array
    assert psutil.Process().memory_info().rss - before < MANY / 4


def test_pieces_of_one_region_do_not_overlap() -> None:
    sizes = [0, 1, 5000, HUGE_PAGE, 4096, 3]
    arrays = pieces(sizes)
    assert [array.size for array in arrays] == sizes
    for i, array in enumerate(arrays):
        array[:] = i
        assert array.ctypes.data % 4096 == 0
    assert all((array == i).all() for i, array in enumerate(arrays))
    assert pieces([]) == []
