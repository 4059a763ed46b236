"""From the URL of an ``image_url`` part to bytes, where the URL itself holds them; and the limits on pictures."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from lmserve.errors import InvalidRequest
from lmserve.images.signature import LENGTH, format_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What one request may bring in pictures."""

    max_bytes: int
    """Of all its pictures' files together."""
    max_pixels: int
    """Of one picture."""
    max_images: int
    seconds: float
    """To fetch one picture, with redirects and all."""
    hosts: tuple[str, ...] = ()
    """Those that pictures are fetched from, none if empty: ``example.com`` is this host, ``.example.com`` also those
    below it, ``*`` any; ``example.com:8080`` allows this port, not 80 and 443. Names are as DNS has them (``xn--``).
    Whatever is listed, only public addresses are reached."""


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_WHITE = b" \t\n\r\f\v"
_STANDARD = bytes.maketrans(b"-_", b"+/")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]+={0,2}")


def is_web_url(url: str) -> bool:
    """Whether the bytes have to be fetched."""
    return _scheme(url) in ("http", "https")


def read_data_uri(url: str, path: str) -> bytes:
    """The bytes in a data URI. Its declared type means nothing: clients declare PNG and send JPEG.

    Read as generously as browsers do: white space, the URL-safe alphabet, absent padding and percent-encoding are fine.
    The base64 text alone, as LM Studio's clients send it, will do if it begins like a picture. ``path`` is the part's,
    for errors: ``messages[0].content[1].image_url.url``.

    Raises:
        InvalidRequest: it holds no bytes, or is not a data URI.
    """
    scheme = _scheme(url)
    if scheme == "data":
        head, comma, body = url.partition(",")
        if not comma:
            raise InvalidRequest(f"{path}: the data URI has no comma, and so no data.", path)
        if "base64" not in [word.strip().lower() for word in re.split("[;:]", head)]:
            raise InvalidRequest(f"{path}: the data URI must say ;base64 before its comma.", path)
        data = _decode(body)
        if data is None:
            raise InvalidRequest(f"{path}: the data URI's data is not base64.", path)
        if not data:
            raise InvalidRequest(f"{path}: the data URI holds no data.", path)
        return data
    if scheme is None and format_of(_decode(url.lstrip()[: LENGTH * 2]) or b"") is not None:
        data = _decode(url)
        if data is None:
            raise InvalidRequest(f"{path} begins like a picture in base64, but not all of it is base64.", path)
        return data
    if scheme in (None, "file") or len(scheme or "") == 1:  # the colon behind one letter is that of a drive
        raise InvalidRequest(
            f"{path} must be a data URI with base64 data, or an http or https URL; local files are never read.", path
        )
    raise InvalidRequest(
        f"{path} must be a data URI with base64 data, or an http or https URL; {scheme[:40]}: is not read.", path
    )


def _scheme(url: str) -> str | None:
    match = _SCHEME.match(url.lstrip())
    return match[1].lower() if match else None


def _decode(text: str) -> bytes | None:
    """None if it is not base64."""
    if not text.isascii():
        return None
    encoded = unquote_to_bytes(text) if "%" in text else text.encode("ascii")
    encoded = encoded.translate(_STANDARD, _WHITE)
    if not encoded:
        return b""
    if _BASE64.fullmatch(encoded) is None:
        return None
    digits = encoded.rstrip(b"=")
    if len(digits) % 4 == 1:  # six bits left over: something was lost
        return None
    return base64.b64decode(digits + b"=" * (-len(digits) % 4))
