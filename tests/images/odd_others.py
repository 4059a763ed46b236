"""GIF, WebP and BMP files, and files that are no picture or not one that is read."""

from __future__ import annotations

import io
import struct
import zipfile

from tests.images.odd_files import (
    COLOURS,
    GREYS,
    LOSSY,
    ONE_CLEAR,
    SIZE,
    WHITE,
    Corners,
    OddImage,
    cuts,
    encoded,
    flips,
    one_clear,
    quarters,
)
from tests.images.odd_jpegs import turned

TWO: Corners = (GREYS[0], WHITE, WHITE, GREYS[0])


def gifs() -> list[OddImage]:
    data = encoded(quarters(), "GIF")
    frames = [quarters(COLOURS[::-1]), quarters(GREYS)]
    small = bytearray(data)
    small[6:10] = struct.pack("<HH", 9, 7)  # the screen; the frame is larger
    no_frame = data[: data.index(b",")] + b";"
    comment = b"!\xfe" + (b"\xff" + b"x" * 255) * 300 + b"\0"
    after_tables = data.index(b",")
    return [
        OddImage("GIF", data, "good"),
        OddImage("GIF that is not interlaced", encoded(quarters(), "GIF", interlace=0), "good"),
        OddImage("GIF grey", encoded(quarters(GREYS).convert("L"), "GIF"), "good", GREYS),
        OddImage("GIF of 2 colours", encoded(quarters(TWO).convert("1"), "GIF"), "good", TWO),
        OddImage("GIF with a clear colour", encoded(one_clear(), "GIF"), "good", ONE_CLEAR),
        *[
            OddImage(
                f"GIF animated, disposal {disposal}",
                encoded(quarters(), "GIF", save_all=True, append_images=frames, disposal=disposal, duration=50),
                "good",
            )
            for disposal in (0, 1, 2, 3)
        ],
        OddImage("GIF of version 87a", b"GIF87a" + data[6:], "good"),
        OddImage("GIF with a long comment", data[:after_tables] + comment + data[after_tables:], "good"),
        OddImage("GIF with bytes after its end", data + b"PK\x03\x04" + bytes(100), "good"),
        OddImage("GIF larger than its screen", bytes(small), "either"),
        OddImage("GIF without its end", data[:-1], "either"),
        OddImage("GIF without a frame", no_frame, "bad"),
        OddImage("GIF of version 88a", b"GIF88a" + data[6:], "bad"),
        OddImage("GIF of its first bytes", b"GIF89a", "bad"),
        OddImage("GIF of zeros", b"GIF89a" + bytes(1000), "bad"),
        OddImage("GIF of no size", data[:6] + bytes(4) + data[10:after_tables] + b";", "bad"),
        OddImage("GIF with endless blocks", no_frame[:-1] + b"!\xfe" + b"\x01x" * 10_000, "bad"),
        *cuts("GIF"),
        *flips("GIF"),
    ]


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webps() -> list[OddImage]:
    lossy, lossless = encoded(quarters(), "WEBP", quality=95), encoded(quarters(), "WEBP", lossless=True)
    frames = [quarters(GREYS), quarters(COLOURS[::-1])]
    return [
        OddImage("WEBP lossy", lossy, "good", tolerance=LOSSY),
        OddImage("WEBP lossless", lossless, "good"),
        OddImage("WEBP with alpha", encoded(one_clear(), "WEBP", lossless=True), "good", ONE_CLEAR),
        OddImage("WEBP lossy with alpha", encoded(one_clear(), "WEBP", quality=95), "good", ONE_CLEAR, tolerance=LOSSY),
        OddImage(
            "WEBP animated",
            encoded(quarters(), "WEBP", save_all=True, append_images=frames, lossless=True, duration=50),
            "good",
        ),
        OddImage(
            "WEBP with a large profile", encoded(quarters(), "WEBP", lossless=True, icc_profile=bytes(700_000)), "good"
        ),
        OddImage(
            "WEBP with EXIF that is nonsense", encoded(quarters(), "WEBP", lossless=True, exif=b"nonsense"), "good"
        ),
        *turned("WEBP", lossless=True),
        OddImage("WEBP with bytes after its end", lossless + bytes(100), "either"),
        OddImage("WEBP of its first bytes", b"RIFF\0\0\0\0WEBP", "bad"),
        OddImage("WEBP of zeros", b"RIFF\xff\xff\0\0WEBPVP8 " + bytes(1000), "bad"),
        OddImage("WEBP of another kind", riff((b"VP9 ", bytes(100))), "bad"),
        OddImage("WEBP of no picture", riff((b"VP8X", bytes(10))), "bad"),
        OddImage("WEBP of an empty picture", riff((b"VP8L", b"")), "bad"),
        OddImage("WEBP said to be of 4 GB", lossless[:4] + b"\xff" * 4 + lossless[8:], "either"),
        OddImage("WEBP said to be of no bytes", lossless[:4] + bytes(4) + lossless[8:], "either"),
        *cuts("WEBP"),
        *flips("WEBP"),
    ]


def bmp(
    width: int, height: int, bits: int, pixels: bytes, *, compression: int = 0, tables: bytes = b"", colours: int = 0
) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(pixels), 0, 0, colours, 0)
    offset = 14 + len(info) + len(tables)
    return b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + info + tables + pixels


def bmps() -> list[OddImage]:
    image, (width, height) = quarters(), SIZE
    data = encoded(image, "BMP")
    top_down = image.tobytes("raw", "BGR")
    indexed = image.quantize(4)
    palette = indexed.getpalette() or []
    table = b"".join(bytes((*palette[i : i + 3][::-1], 0)) for i in range(0, 12, 3))
    numbers = [indexed.getpixel((x, y)) for y in (height - 1, 0) for x in (0, width - 1)]
    lines = [b"".join(bytes((width // 2, int(str(n)))) for n in pair) + b"\0\0" for pair in (numbers[:2], numbers[2:])]
    packed = lines[0] * (height // 2) + lines[1] * (height // 2) + b"\0\1"
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    b565 = b"".join(
        struct.pack("<H", (r >> 3) << 11 | (g >> 2) << 5 | b >> 3)
        for y in range(height - 1, -1, -1)
        for r, g, b in [COLOURS[(x >= width // 2) + 2 * (y >= height // 2)] for x in range(width)]
    )
    return [
        OddImage("BMP", data, "good"),
        OddImage("BMP of 32 bits", encoded(image.convert("RGBA"), "BMP"), "good"),
        OddImage("BMP of 8 bits", encoded(indexed, "BMP"), "good"),
        OddImage("BMP grey", encoded(quarters(GREYS).convert("L"), "BMP"), "good", GREYS),
        OddImage("BMP of 1 bit", encoded(quarters(TWO).convert("1"), "BMP"), "good", TWO),
        OddImage("BMP from the top down", bmp(width, -height, 24, top_down), "good"),
        OddImage("BMP of 16 bits", bmp(width, height, 16, b565, compression=3, tables=masks), "good", tolerance=8),
        OddImage("BMP in run lengths", bmp(width, height, 8, packed, compression=1, tables=table, colours=4), "good"),
        OddImage("BMP with bytes after its end", data + bytes(100), "good"),
        OddImage("BMP of its first bytes", b"BM", "bad"),
        OddImage("BMP of zeros", b"BM" + bytes(1000), "bad"),
        OddImage("BMP of no width", bmp(0, height, 24, top_down), "bad"),
        OddImage("BMP of no height", bmp(width, 0, 24, top_down), "bad"),
        OddImage("BMP of a negative width", bmp(-width, height, 24, top_down), "bad"),
        OddImage("BMP of the least height", bmp(width, -(2**31), 24, top_down), "bad"),
        OddImage("BMP of 7 bits", bmp(width, height, 7, top_down), "bad"),
        OddImage("BMP of compression 99", bmp(width, height, 24, top_down, compression=99), "bad"),
        OddImage("BMP that holds a PNG", bmp(width, height, 0, encoded(image, "PNG"), compression=5), "bad"),
        OddImage(
            "BMP of 4 billion colours",
            bmp(width, height, 8, packed, compression=1, tables=table, colours=2**32 - 1),
            "either",
        ),
        OddImage(
            "BMP whose runs leave it",
            bmp(width, height, 8, b"\0\2\xff\xff" * 50, compression=1, tables=table, colours=4),
            "either",
        ),
        OddImage("BMP whose pixels begin outside", data[:10] + b"\xff\xff\xff\x7f" + data[14:], "bad"),
        OddImage("BMP with a header of 9 bytes", data[:14] + b"\x09" + data[15:], "bad"),
        *cuts("BMP"),
        *flips("BMP"),
    ]


def no_pictures() -> list[OddImage]:
    """Also pictures that other readers would take."""
    image = quarters()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr(zipfile.ZipInfo("cat.png"), encoded(image, "PNG"))
    eps = encoded(image, "EPS")
    files = {
        "nothing": b"",
        "one byte": b"\x89",
        "a space": b" ",
        "zeros": bytes(10_000),
        "text": b"This is a cat.",
        "base64": b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk",
        "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>',
        "a page": b"<!DOCTYPE html><title>404</title>",
        "JSON": b'{"error": "not found"}',
        "a PDF": b"%PDF-1.7\n1 0 obj <<>> endobj\ntrailer <<>>\n%%EOF",
        "an archive": archive.getvalue(),
        "a picture in a PDF's clothes": b"%PDF-1.7\n" + encoded(image, "PNG"),
        "a TIFF": encoded(image, "TIFF"),
        "a TIFF of the other order": b"MM\0*\0\0\0\x08" + bytes(100),
        "an ICO": encoded(image, "ICO"),
        "a TGA": encoded(image, "TGA"),
        "a PPM": encoded(image, "PPM"),
        "a PCX": encoded(image, "PCX"),
        "an EPS, which would run a program": eps,
        "an EPS behind a preview": struct.pack("<IIIIIII", 0xC6D3D0C5, 32, len(eps), 0, 0, 0, 0) + bytes(4) + eps,
        "a PSD": b"8BPS\0\1" + bytes(100),
        "a HEIC": b"\0\0\0\x18ftypheic" + bytes(100),
        "an AVIF": b"\0\0\0\x18ftypavif" + bytes(100),
        "a JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100),
        "a DIB": encoded(image, "DIB"),
        "a sound": b"RIFF\x24\0\0\0WAVEfmt " + bytes(100),
        "a program": b"\x7fELF" + bytes(100),
        "a script with a picture's mark": b"BM=1; import os\n",
        "a script with another": b"GIF89a=1;alert(1)//",
    }
    return [OddImage(f"no picture: {name}", data, "bad") for name, data in files.items()]
