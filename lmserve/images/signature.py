"""The picture formats that are read, and how their files begin."""

from __future__ import annotations

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""As Pillow calls them; no other of its readers ever sees a client's bytes."""
LENGTH = 12
"""Bytes that tell the format."""

_BEGINNINGS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
}


def format_of(data: bytes) -> str | None:
    """One of ``FORMATS`` by the first ``LENGTH`` bytes, or None. The rest of the file may still be anything."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for beginning, name in _BEGINNINGS.items() if data.startswith(beginning)), None)
