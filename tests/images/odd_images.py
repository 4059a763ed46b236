"""Odd and hostile picture files, all made here and the same each time, for whatever has to survive them."""

from __future__ import annotations

from tests.images.odd_bombs import bombs, shapes
from tests.images.odd_files import OddImage
from tests.images.odd_jpegs import jpegs
from tests.images.odd_others import bmps, gifs, no_pictures, webps
from tests.images.odd_pngs import pngs

__all__ = ["OddImage", "odd_images"]


def odd_images() -> list[OddImage]:
    """Several hundred, each of less than 1 MiB; the good ones have fewer than four million pixels."""
    return [*pngs(), *jpegs(), *gifs(), *webps(), *bmps(), *no_pictures(), *bombs(), *shapes()]
