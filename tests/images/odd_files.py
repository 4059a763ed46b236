"""What an odd picture file is, and the picture that the good ones show."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

Colour = tuple[int, int, int]
Corners = tuple[Colour, Colour, Colour, Colour]
"""Top left, top right, bottom left, bottom right."""

SIZE = (48, 32)
WHITE: Colour = (255, 255, 255)
COLOURS: Corners = ((220, 20, 30), (10, 180, 60), (20, 40, 200), (230, 220, 40))
ONE_CLEAR: Corners = (WHITE, *COLOURS[1:])
GREYS: Corners = ((0, 0, 0), (85, 85, 85), (170, 170, 170), WHITE)
"""Each has its own number in two bits."""
LOSSY = 14
"""How far a lossy format may be off, of 255."""


@dataclass(frozen=True, slots=True)
class OddImage:
    """A file. ``corners`` and ``size`` are those of the upright picture, where it is a good one."""

    name: str
    data: bytes
    expected: Literal["good", "bad", "either"]
    corners: Corners = COLOURS
    size: tuple[int, int] = SIZE
    tolerance: int = 0
    """Of a colour's values."""


def quarters(corners: Corners = COLOURS, size: tuple[int, int] = SIZE) -> Image.Image:
    """One colour in each quarter, in RGB."""
    image = Image.new("RGB", (2, 2))
    image.putdata(corners)
    return image.resize(size, Image.Resampling.NEAREST)


def one_clear() -> Image.Image:
    """The quarters in RGBA, the first of them transparent."""
    image = quarters().convert("RGBA")
    image.paste((*COLOURS[0], 0), (0, 0, SIZE[0] // 2, SIZE[1] // 2))
    return image


def noise(seed: int) -> Image.Image:
    """Most bytes of its file are pixels, whatever the format."""
    width, height = SIZE
    return Image.frombytes("RGB", SIZE, random.Random(seed).randbytes(width * height * 3))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def exif(*, orientation: object = 1, kind: int = 3, count: int = 1) -> bytes:
    """A block with this one tag: what it holds, the type it is said to be of, and how many there are said to be."""
    value = orientation.to_bytes(4, "little") if isinstance(orientation, int) else bytes(str(orientation), "ascii")
    entry = b"\x12\x01" + kind.to_bytes(2, "little") + count.to_bytes(4, "little") + value[:4].ljust(4, b"\0")
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)


def cuts(format: str) -> list[OddImage]:
    """The file's beginnings."""
    data = encoded(noise(1), format)
    beginnings = [
        OddImage(f"{format} cut at {percent} %", data[: len(data) * percent // 100], "bad")
        for percent in (1, 2, 5, 10, 20, 35, 50, 65, 80)
    ]
    ends = [OddImage(f"{format} without its last {n} bytes", data[:-n], "either") for n in (1, 2, 4, 12)]
    return beginnings + ends


def flips(format: str) -> list[OddImage]:
    """The file with bits turned: many in its first bytes, or anywhere."""
    data = encoded(noise(2), format)
    files = []
    for seed in range(16):
        dice = random.Random(f"{format} {seed}")
        flipped = bytearray(data)
        for _ in range(1 + seed % 4):
            flipped[dice.randrange(60 if seed % 2 else len(data))] ^= 1 << dice.randrange(8)
        files.append(OddImage(f"{format} with bits turned {seed}", bytes(flipped), "either"))
    return files
