"""Small files of large pictures, and pictures of odd shapes."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

from tests.images.odd_files import COLOURS, OddImage, encoded, quarters
from tests.images.odd_others import bmp, riff
from tests.images.odd_pngs import GREY, RGBA, SIGNATURE, chunk, header


def bombs() -> list[OddImage]:
    """Each says that it has more than ten million pixels, and some have them."""
    side = 20_000
    line = zlib.compress(bytes(1 + side // 8) * side, 9)
    jpeg = encoded(quarters(), "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    gif = encoded(quarters(), "GIF")
    place = gif.index(b",")
    lossless = struct.pack("<BI", 0x2F, 16_382 | 16_382 << 14) + bytes(50)
    lossy = b"\x10\x32\0\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383) + bytes(50)
    canvas = bytes(4) + (2**24 - 1).to_bytes(3, "little") + (255).to_bytes(3, "little")
    large = struct.pack("<HH", 65_500, 65_500)
    files = {
        "PNG, with all its pixels": SIGNATURE
        + header(side, side, 1, GREY)
        + chunk(b"IDAT", line)
        + chunk(b"IEND", b""),
        "PNG": SIGNATURE + header(30_000, 30_000, 16, RGBA) + chunk(b"IDAT", line[:1000]) + chunk(b"IEND", b""),
        "PNG, interlaced": SIGNATURE + header(30_000, 30_000, 8, RGBA, 1) + chunk(b"IDAT", line[:1000]),
        "PNG of the largest size": SIGNATURE + header(2**31 - 1, 2**31 - 1) + chunk(b"IDAT", line[:1000]),
        "PNG of more": SIGNATURE + header(2**32 - 1, 2**32 - 1) + chunk(b"IDAT", line[:1000]),
        "PNG just over 2^32": SIGNATURE + header(65_536, 65_537) + chunk(b"IDAT", line[:1000]),
        "JPEG": jpeg[: frame + 5] + large + jpeg[frame + 9 :],
        "progressive JPEG": (jpeg[: frame + 5] + large + jpeg[frame + 9 :]).replace(b"\xff\xc0", b"\xff\xc2", 1),
        "GIF": gif[:6] + large + gif[10:],
        "GIF whose frame is larger than its screen": gif[: place + 5] + large + gif[place + 9 :],
        "GIF whose frame is cleared": gif[:place]
        + b"!\xf9\x04\x08\0\0\0\0"
        + gif[place : place + 5]
        + large
        + gif[place + 9 :],
        "GIF whose frame is far away": gif[: place + 1] + large + gif[place + 5 :],
        "lossless WEBP": riff((b"VP8L", lossless)),
        "lossy WEBP": riff((b"VP8 ", lossy)),
        "WEBP with a canvas": riff((b"VP8X", canvas), (b"VP8L", lossless)),
        "BMP": bmp(30_000, 30_000, 24, bytes(1000)),
        "BMP from the top down": bmp(30_000, -30_000, 32, bytes(1000)),
        "BMP of 1 bit": bmp(60_000, 60_000, 1, bytes(1000), tables=bytes(8)),
        "BMP in run lengths": bmp(30_000, 30_000, 8, b"\xff\0" * 1000, compression=1, tables=bytes(1024)),
        "BMP of the largest size": bmp(2**31 - 1, 2**31 - 1, 24, bytes(1000)),
    }
    return [OddImage(f"bomb: {name}", data, "bad") for name, data in files.items()]


def shapes() -> list[OddImage]:
    """One pixel wide is a shape that some models' preprocessors fail on; two hundred times as wide as high, all."""
    files = []
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        for width, height in ((1, 1), (2, 1), (1, 200), (200, 1)):
            data = encoded(Image.new("RGB", (width, height), COLOURS[1]), format)
            files.append(
                OddImage(
                    f"{format} of {width} x {height}", data, "good", (COLOURS[1],) * 4, (width, height), tolerance=14
                )
            )
        for width, height in ((1, 5000), (5000, 1), (201, 1), (2, 402)):
            data = encoded(Image.new("RGB", (width, height)), format)
            files.append(OddImage(f"{format} of {width} x {height}", data, "bad"))
    large = quarters(size=(2000, 1500))
    files += [
        OddImage(f"{name} of 2000 x 1500", encoded(large, name), "good", size=(2000, 1500), tolerance=14)
        for name in ("PNG", "JPEG")
    ]
    return files
