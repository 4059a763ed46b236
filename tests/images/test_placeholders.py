from __future__ import annotations

import pytest

from lmserve.images.placeholders import WrongPlaceholders, locate_images


def test_each_image_from_its_first_placeholder_behind_its_last() -> None:
    assert locate_images([1, 9, 9, 2, 9, 1, 9, 3], 9, [3, 1]) == [(1, 5), (6, 7)]
    assert locate_images([9, 9], 9, [1, 1]) == [(0, 1), (1, 2)]
    assert locate_images([1, 2], 9, []) == []


@pytest.mark.parametrize("counts", [[1], [3], [1, 2], []])
def test_another_number_is_refused(counts: list[int]) -> None:
    with pytest.raises(WrongPlaceholders, match="2 placeholder tokens for"):
        locate_images([9, 1, 9], 9, counts)
