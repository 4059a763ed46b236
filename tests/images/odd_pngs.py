"""PNG files of every depth and colour type, written here: Pillow writes few of them, and none that is wrong."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from tests.images.odd_files import (
    COLOURS,
    GREYS,
    ONE_CLEAR,
    SIZE,
    WHITE,
    Corners,
    OddImage,
    cuts,
    encoded,
    exif,
    flips,
    one_clear,
    quarters,
)

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (2, 4, 8), GREY_ALPHA: (8, 16), RGBA: (8, 16)}
NAMES = {GREY: "grey", RGB: "RGB", PALETTE: "palette", GREY_ALPHA: "grey and alpha", RGBA: "RGBA"}
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TWO_GREYS: Corners = (GREYS[0], WHITE, WHITE, GREYS[0])
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, and their steps, of each pass."""
PLTE = b"".join(map(bytes, COLOURS))

Samples = Sequence[Sequence[int]]
"""Of each quarter, its pixels' samples."""


def chunk(name: bytes, data: bytes, length: int | None = None) -> bytes:
    """``length``: another than its own."""
    size = len(data) if length is None else length
    return size.to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def header(width: int, height: int, depth: int = 8, colour_type: int = RGB, interlaced: int = 0) -> bytes:
    return chunk(
        b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((depth, colour_type, 0, 0, interlaced))
    )


def rows(samples: Samples, depth: int, columns: Sequence[int], lines: Sequence[int]) -> bytes:
    """These columns of these lines, with filter 0."""
    packed = b""
    for y in lines:
        bits = "".join(
            f"{sample:0{depth}b}" for x in columns for sample in samples[(x >= SIZE[0] // 2) + 2 * (y >= SIZE[1] // 2)]
        )
        bits += "0" * (-len(bits) % 8)
        packed += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    return packed


def png(samples: Samples, depth: int, colour_type: int, *before: bytes, interlaced: bool = False) -> bytes:
    """``before``: chunks before the pixels."""
    width, height = SIZE
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    pixels = b"".join(rows(samples, depth, range(x, width, dx), range(y, height, dy)) for x, y, dx, dy in passes)
    head = SIGNATURE + header(width, height, depth, colour_type, interlaced)
    return head + b"".join(before) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def samples_of(colour_type: int, depth: int) -> tuple[Samples, Corners]:
    """The quarters in such samples, the first one transparent where there is alpha, and what is to be seen."""
    most = (1 << depth) - 1
    if colour_type == PALETTE:
        return [[i] for i in range(4)], COLOURS
    if colour_type in (GREY, GREY_ALPHA):
        seen = TWO_GREYS if depth == 1 else GREYS
        alphas = [[0], [most], [most], [most]] if colour_type == GREY_ALPHA else [[]] * 4
        grey = [[corner[0] * most // 255, *alpha] for corner, alpha in zip(seen, alphas, strict=True)]
        return grey, (WHITE, *seen[1:]) if colour_type == GREY_ALPHA else seen
    # Of 16 bits, the low ones are not the high ones again.
    scaled = [[value if depth == 8 else value << 8 | 99 for value in corner] for corner in COLOURS]
    if colour_type == RGB:
        return scaled, COLOURS
    return [[*corner, most * (i > 0)] for i, corner in enumerate(scaled)], ONE_CLEAR


def every_kind() -> list[OddImage]:
    files = []
    for colour_type, depths in DEPTHS.items():
        for depth in depths:
            samples, seen = samples_of(colour_type, depth)
            before = [chunk(b"PLTE", PLTE)] if colour_type == PALETTE else []
            for interlaced in (False, True):
                name = f"PNG {NAMES[colour_type]} {depth} bits{' interlaced' * interlaced}"
                data = png(samples, depth, colour_type, *before, interlaced=interlaced)
                files.append(OddImage(name, data, "good", seen))
            if colour_type in (GREY, RGB):
                clear = b"".join(sample.to_bytes(2, "big") for sample in samples[1])
                data = png(samples, depth, colour_type, chunk(b"tRNS", clear))
                corners: Corners = (seen[0], WHITE, seen[2], seen[3])
                files.append(OddImage(f"PNG {NAMES[colour_type]} {depth} bits, one clear", data, "good", corners))
            if colour_type == PALETTE:
                for alphas in (b"\0", b"\0\xff\xff\xff", b"\0\xfe\xff"):
                    data = png(samples, depth, colour_type, *before, chunk(b"tRNS", alphas))
                    name = f"PNG palette {depth} bits, {len(alphas)} alphas"
                    files.append(OddImage(name, data, "good", ONE_CLEAR, tolerance=2))
    return files


def half_clear() -> OddImage:
    samples = [[*corner, 128] for corner in GREYS]
    seen: Corners = ((127,) * 3, (170,) * 3, (212,) * 3, WHITE)
    return OddImage("PNG half clear", png(samples, 8, RGBA), "good", seen, tolerance=1)


def with_more_chunks() -> list[OddImage]:
    """Good pixels, and something else in the file."""
    samples, seen = samples_of(RGB, 8)

    def file(name: str, *before: bytes, after: bytes = b"", expected: str = "either") -> OddImage:
        return OddImage(
            f"PNG {name}", png(samples, 8, RGB, *before) + after, "good" if expected == "good" else "either", seen
        )

    bomb = zlib.compress(bytes(20_000_000))
    profile = zlib.compress(bytes(range(256)) * 2000)
    return [
        file("with text", chunk(b"tEXt", b"a\0b"), expected="good"),
        file("with much text", chunk(b"tEXt", b"workflow\0" + b"x" * 900_000), expected="good"),
        file("with compressed text", chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b" * 1000)), expected="good"),
        file("with text that is a bomb", chunk(b"zTXt", b"a\0\0" + bomb)),
        file("with international text that is a bomb", chunk(b"iTXt", b"a\0\1\0\0\0" + bomb)),
        file("with many texts that are bombs", *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000)))] * 90),
        file("with bad text", chunk(b"zTXt", b"a\0\0nonsense"), chunk(b"iTXt", b"\0"), chunk(b"tEXt", b"")),
        file("with a profile", chunk(b"iCCP", b"a\0\0" + profile), expected="good"),
        file("with a profile that is a bomb", chunk(b"iCCP", b"a\0\0" + bomb)),
        file("with a profile that is nonsense", chunk(b"iCCP", b"a\0\0nonsense"), expected="good"),
        file("with a profile of no bytes", chunk(b"iCCP", b"")),
        file("with 20000 empty chunks", chunk(b"prIv", b"") * 20_000, expected="good"),
        file("with bytes after its end", after=b"PK\x03\x04" + bytes(1000), expected="good"),
        file("with a page after its end", after=b"<script>alert(1)</script>", expected="good"),
        file("with odd gamma and density", chunk(b"gAMA", bytes(4)), chunk(b"pHYs", bytes(9)), expected="good"),
        file("with short gamma and density", chunk(b"gAMA", b""), chunk(b"pHYs", b""), chunk(b"cHRM", b"")),
        file("with a short clear colour", chunk(b"tRNS", b"\0")),
        file("with a clear colour of 16 bits", chunk(b"tRNS", b"\xff" * 6), expected="good"),
        file("with EXIF that is nonsense", chunk(b"eXIf", b"nonsense"), expected="good"),
        file("with EXIF of no bytes", chunk(b"eXIf", b""), expected="good"),
        file("that says it is animated", chunk(b"acTL", b"\xff" * 8)),
        file("that says it has no frames", chunk(b"acTL", bytes(8))),
    ]


def wrong() -> list[OddImage]:
    width, height = SIZE
    samples, _ = samples_of(RGB, 8)
    good = png(samples, 8, RGB)
    pixels = chunk(b"IDAT", zlib.compress(rows(samples, 8, range(width), range(height))))
    end = chunk(b"IEND", b"")
    files = {
        "of no width": header(0, height) + pixels + end,
        "of no height": header(width, 0) + pixels + end,
        "of neither": header(0, 0) + pixels + end,
        "of a negative width": header(2**32 - width, height) + pixels + end,
        "of 3 bits": header(width, height, 3) + pixels + end,
        "of colour type 5": header(width, height, 8, 5) + pixels + end,
        "with a short header": chunk(b"IHDR", bytes(5)) + pixels + end,
        "without a header": pixels + end,
        "without pixels": header(width, height) + end,
        "with empty pixels": header(width, height) + chunk(b"IDAT", b"") + end,
        "with pixels that are nonsense": header(width, height) + chunk(b"IDAT", b"nonsense") + end,
        "with pixels said to be of 2 GB": header(width, height) + chunk(b"IDAT", b"", 0x7FFFFFFF),
        "with a chunk said to be of 4 GB": header(width, height) + chunk(b"tEXt", b"", 0xFFFFFFFF) + pixels + end,
        "of a signature": b"",
        "of zeros": bytes(1000),
    }
    either = {
        "that says it is higher": header(width, 2 * height) + pixels + end,
        "that says it is lower": header(width, height // 2) + pixels + end,
        "without an end": header(width, height) + pixels,
        "of two headers": header(width, height) + header(9, 9) + pixels + end,
        "with filter 9": header(width, height)
        + chunk(b"IDAT", zlib.compress(b"\x09" + bytes(3 * width)) * height)
        + end,
        "of a palette that is not there": header(width, height, 8, PALETTE) + pixels + end,
        "of a palette that is too short": header(width, height, 8, PALETTE) + chunk(b"PLTE", b"abc") + pixels + end,
    }
    return [
        *[OddImage(f"PNG {name}", SIGNATURE + rest, "bad") for name, rest in files.items()],
        *[OddImage(f"PNG {name}", SIGNATURE + rest, "either") for name, rest in either.items()],
        OddImage("PNG with a wrong checksum", good.replace(good[29:33], b"\0\0\0\0", 1), "bad"),
        OddImage("PNG behind a space", b" " + good, "bad"),
        OddImage("PNG that went through text", good.replace(b"\r\n", b"\n"), "bad"),
        OddImage("PNG that went through UTF-8", good.decode("latin-1").encode(), "bad"),
    ]


def pngs() -> list[OddImage]:
    frames = [quarters(COLOURS), quarters(COLOURS[::-1])]
    turned = exif(orientation=6)[6:]
    tall = (COLOURS[2], COLOURS[0], COLOURS[3], COLOURS[1])
    samples, _ = samples_of(RGB, 8)
    return [
        *every_kind(),
        half_clear(),
        *with_more_chunks(),
        *wrong(),
        OddImage("PNG turned by EXIF", png(samples, 8, RGB, chunk(b"eXIf", turned)), "good", tall, SIZE[::-1]),
        OddImage("APNG", encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=100), "good"),
        OddImage(
            "APNG with alpha", encoded(one_clear(), "PNG", save_all=True, append_images=frames[1:]), "good", ONE_CLEAR
        ),
        *cuts("PNG"),
        *flips("PNG"),
    ]
