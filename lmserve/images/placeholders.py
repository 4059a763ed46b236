"""Where the images of a prompt stand in its tokens."""

from __future__ import annotations

from collections.abc import Sequence


class WrongPlaceholders(Exception):
    """A prompt has more or fewer placeholder tokens than its images have rows."""


def locate_images(token_ids: Sequence[int], placeholder_id: int, counts: Sequence[int]) -> list[tuple[int, int]]:
    """Of each image [from its first placeholder, behind its last). ``counts``: how many each image has, in order.

    Raises:
        WrongPlaceholders: the prompt has another number of them.
    """
    places = [i for i, token_id in enumerate(token_ids) if token_id == placeholder_id]
    if len(places) != sum(counts):
        raise WrongPlaceholders(f"{len(places)} placeholder tokens for {sum(counts)} rows of images")
    found, first = [], 0
    for count in counts:
        found.append((places[first], places[first + count - 1] + 1))
        first += count
    return found
