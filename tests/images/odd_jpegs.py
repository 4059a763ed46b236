"""JPEG files: of each kind, turned each way, with segments that are odd, and broken."""

from __future__ import annotations

from tests.images.odd_files import (
    COLOURS,
    GREYS,
    LOSSY,
    SIZE,
    Corners,
    OddImage,
    cuts,
    encoded,
    exif,
    flips,
    quarters,
)

STORED = {
    1: (0, 1, 2, 3),
    2: (1, 0, 3, 2),
    3: (3, 2, 1, 0),
    4: (2, 3, 0, 1),
    5: (0, 2, 1, 3),
    6: (1, 3, 0, 2),
    7: (3, 1, 2, 0),
    8: (2, 0, 3, 1),
}
"""Orientation -> which corner of the upright picture is stored at each corner, by the table in the EXIF standard."""


def jpeg(**options: object) -> bytes:
    return encoded(quarters(), "JPEG", quality=95, **options)


def good(name: str, data: bytes, corners: Corners = COLOURS) -> OddImage:
    return OddImage(f"JPEG {name}", data, "good", corners, tolerance=LOSSY)


def turned(format: str, **options: object) -> list[OddImage]:
    """The same upright picture, stored in eight ways."""
    files = []
    for orientation, stored in STORED.items():
        corners = (COLOURS[stored[0]], COLOURS[stored[1]], COLOURS[stored[2]], COLOURS[stored[3]])
        image = quarters(corners, SIZE if orientation < 5 else SIZE[::-1])
        data = encoded(image, format, exif=exif(orientation=orientation), **options)
        files.append(OddImage(f"{format} of orientation {orientation}", data, "good", tolerance=LOSSY))
    return files


def segment(marker: int, data: bytes, length: int | None = None) -> bytes:
    """``length``: another than its own."""
    return bytes((0xFF, marker)) + (len(data) + 2 if length is None else length).to_bytes(2, "big") + data


def with_segments(*segments: bytes) -> bytes:
    """Before all others."""
    data = jpeg()
    return data[:2] + b"".join(segments) + data[2:]


def of_each_kind() -> list[OddImage]:
    cmyk = quarters().convert("CMYK")
    return [
        *[good(f"subsampled {kind}", jpeg(subsampling=kind)) for kind in ("4:4:4", "4:2:2", "4:2:0")],
        good("progressive", jpeg(progressive=True)),
        good("optimized", jpeg(optimize=True)),
        good("with restart markers", jpeg(restart_marker_blocks=1)),
        good("stored as RGB", jpeg(keep_rgb=True)),
        good("grey", encoded(quarters(GREYS).convert("L"), "JPEG", quality=95), GREYS),
        good("progressive and grey", encoded(quarters(GREYS).convert("L"), "JPEG", progressive=True), GREYS),
        good("CMYK", encoded(cmyk, "JPEG", quality=95)),
        good("CMYK and progressive", encoded(cmyk, "JPEG", quality=95, progressive=True)),
        good("of two pictures", encoded(quarters(), "MPO", save_all=True, append_images=[quarters()], quality=95)),
        OddImage("JPEG of quality 1", encoded(quarters(), "JPEG", quality=1), "good", tolerance=100),
    ]


def with_odd_segments() -> list[OddImage]:
    ends_early = jpeg()
    profile = bytes(range(256)) * 250
    many = [segment(0xE2, b"ICC_PROFILE\0" + bytes((i, 14)) + profile) for i in range(1, 15)]
    return [
        *[good(f"with EXIF orientation {n}", jpeg(exif=exif(orientation=n))) for n in (0, 9, 255, 65535)],
        good("with EXIF orientation in text", jpeg(exif=exif(orientation="six", kind=2, count=4))),
        good("with EXIF orientation of a bad type", jpeg(exif=exif(orientation=1, kind=99))),
        good("with EXIF orientation as a fraction", jpeg(exif=exif(orientation=8, kind=5))),
        good("with two EXIF orientations", jpeg(exif=exif(orientation=0x10001, count=2))),
        good("with 4 billion EXIF orientations", jpeg(exif=exif(orientation=6, count=0xFFFFFFFF))),
        good("with EXIF that is nonsense", jpeg(exif=b"Exif\0\0nonsense")),
        good("with EXIF that is empty", with_segments(segment(0xE1, b"Exif\0\0"))),
        good("with EXIF that is cut off", jpeg(exif=exif(orientation=6)[:16])),
        good("with EXIF that points outside", jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")),
        good("with EXIF that points to itself", jpeg(exif=exif()[:-4] + b"\x08\0\0\0")),
        good("with EXIF of 65535 entries", jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(100))),
        good("with EXIF twice", with_segments(segment(0xE1, exif()), segment(0xE1, b"Exif\0\0nonsense"))),
        good("with a large profile", jpeg(icc_profile=profile * 10)),
        good("with a profile in bad order", with_segments(*many[::-1])),
        good("with a profile that lacks a part", with_segments(*many[1:])),
        OddImage("JPEG with a short profile", with_segments(segment(0xE2, b"ICC_PROFILE\0")), "either"),
        good("with a comment", jpeg(comment=b"x" * 60_000)),
        good("with 2000 empty segments", with_segments(*[segment(0xEF, b"")] * 2000)),
        good("with bytes after its end", jpeg() + b"PK\x03\x04" + bytes(1000)),
        good("with another behind it", jpeg() + encoded(quarters(GREYS), "JPEG")),
        OddImage("JPEG with a bad list of pictures", with_segments(segment(0xE2, b"MPF\0nonsense")), "either"),
        OddImage("JPEG with an empty list of pictures", with_segments(segment(0xE2, b"MPF\0")), "either"),
        OddImage("JPEG with a short Adobe segment", with_segments(segment(0xEE, b"Adobe")), "either"),
        OddImage("JPEG with a short JFIF segment", with_segments(segment(0xE0, b"JFIF")), "either"),
        OddImage("JPEG with a bad Photoshop segment", with_segments(segment(0xED, b"Photoshop 3.0\x008BIM")), "either"),
        OddImage("JPEG without its end", ends_early[:-2], "either"),
    ]


def wrong() -> list[OddImage]:
    data = jpeg()
    frame = data.index(b"\xff\xc0")
    tables = data.index(b"\xff\xdb")
    scan = data.index(b"\xff\xda")

    def sized(width: int, height: int) -> bytes:
        size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        return data[: frame + 5] + size + data[frame + 9 :]

    files = {
        "of its first bytes": b"\xff\xd8\xff",
        "of markers": b"\xff\xd8" + b"\xff" * 1000,
        "of zeros": b"\xff\xd8\xff\xe0" + bytes(1000),
        "of no width": sized(0, SIZE[1]),
        "without a frame": data[:frame] + data[scan:],
        "without a scan": data[:scan] + b"\xff\xd9",
        "of 12 bits": data[: frame + 4] + b"\x0c" + data[frame + 5 :],
        "of 2 components": data[: frame + 9] + b"\x02" + data[frame + 10 :],
        "of 200 components": data[: frame + 9] + b"\xc8" + data[frame + 10 :],
        "with a segment that ends outside": data[:tables] + segment(0xE1, b"Exif\0\0", 65_535),
        "of 200 scans": data[:scan] + data[scan:-2] * 200 + b"\xff\xd9",
    }
    either = {
        "of no height": sized(SIZE[0], 0),
        "that says it is lower": sized(SIZE[0], SIZE[1] // 2),
        "that says it is higher": sized(SIZE[0], SIZE[1] * 2),
        "with a segment of no length": with_segments(segment(0xE1, b"", 0)),
        "with a segment of length 1": with_segments(segment(0xFE, b"", 1)),
        "that is lossless": data.replace(b"\xff\xc0", b"\xff\xc3", 1),
        "that is arithmetic": data.replace(b"\xff\xc0", b"\xff\xc9", 1),
        "of two frames": data[:scan] + data[frame:],
        "without tables": data[:tables] + data[frame:],
        "with restart markers only": data[: scan + 14] + b"\xff\xd0" * 1000 + b"\xff\xd9",
    }
    return [
        *[OddImage(f"JPEG {name}", each, "bad") for name, each in files.items()],
        *[OddImage(f"JPEG {name}", each, "either", size=SIZE) for name, each in either.items()],
    ]


def jpegs() -> list[OddImage]:
    return [*of_each_kind(), *turned("JPEG", quality=95), *with_odd_segments(), *wrong(), *cuts("JPEG"), *flips("JPEG")]
