"""From a file's bytes to pixels. The files are strangers' and the readers are C: run it in a process that may die.

Pillow's own limit on pixels and Python's list of warnings are the process's, so it decodes one picture at a time.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import PIL.WebPImagePlugin  # noqa: F401  (or Pillow imports all of its readers to find this one)
from PIL import ExifTags, Image

from lmserve.images.job import BadImage
from lmserve.images.signature import format_of

MAX_ASPECT = 200
"""Longer side to shorter side: many models' preprocessors fail beyond."""
MAX_JPEG_SCANS = 100
"""A progressive JPEG has about ten. Each costs time by the picture's pixels, however few bytes it has."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation -> what undoes it."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A picture, upright, without alpha."""

    image: Image.Image
    """RGB."""
    format: str
    """One of ``signature.FORMATS``."""


def decode_image(data: bytes, max_pixels: int) -> DecodedImage:
    """The picture in a PNG, JPEG, WebP, GIF or BMP file, the first one of several, on white where it is transparent.

    Memory is at most some twelve bytes a pixel and a few MB; time is not bounded here.

    Raises:
        BadImage: whatever is wrong with it.
    """
    if not data:
        raise BadImage("it is empty")
    kind = format_of(data)
    if kind is None:
        raise BadImage("it is no PNG, JPEG, WebP, GIF or BMP file")
    # Entropy-coded data never holds these two bytes, and other segments hardly ever do.
    if kind == "JPEG" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise BadImage(f"it is a JPEG of more than {MAX_JPEG_SCANS} scans")
    try:
        with _limited_to(max_pixels):
            return _decode(data, kind, max_pixels)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+", str(error))
        raise BadImage(_too_large(pixels[0] if pixels else "too many", max_pixels)) from error
    except MemoryError as error:
        raise BadImage("there is not enough memory to decode it") from error
    except Exception as error:  # Pillow's readers raise nearly everything there is
        raise BadImage(_reason(error)) from error


@contextmanager
def _limited_to(max_pixels: int) -> Iterator[None]:
    """Pillow refuses more pixels than this itself, before it has memory for them, and says nothing otherwise.

    Where a format's header does not tell (a GIF's first frame may be larger than its screen), it looks again.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _decode(data: bytes, kind: str, max_pixels: int) -> DecodedImage:
    with Image.open(io.BytesIO(data), formats=(kind,)) as image:
        width, height = image.size
        if min(width, height) < 1:
            raise BadImage("it has no pixels")
        if width * height > max_pixels:
            raise BadImage(_too_large(str(width * height), max_pixels))
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BadImage(f"it is {width} x {height} pixels; one side may be at most {MAX_ASPECT} times the other")
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        flat = _on_white(image, _transparent_value(image, data) if kind == "PNG" else image.info.get("transparency"))
    return DecodedImage(flat if turn is None else flat.transpose(turn), kind)


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 where EXIF says nothing or is broken, which spoils no picture."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as above, and the pixels are good
        return 1
    return orientation if isinstance(orientation, int) else 1


def _transparent_value(image: Image.Image, data: bytes) -> object:
    """A PNG's transparent colour, which Pillow leaves in the file's bits a sample, in those of its pixels."""
    value = image.info.get("transparency")
    depth, colour_type = data[24], data[25]
    if image.mode == "L" and isinstance(value, int):
        return value * 255 // ((1 << depth) - 1) if colour_type == 0 and depth < 8 else value
    if image.mode == "RGB" and depth == 16 and isinstance(value, tuple):
        return tuple(sample >> 8 for sample in value)
    return value


def _on_white(image: Image.Image, transparent: object) -> Image.Image:
    """In RGB. ``transparent``: a colour or palette entry without alpha of its own, or a palette's alphas."""
    if image.mode.startswith("I"):
        return _from_16_bits(image, transparent)
    if transparent is None:
        image.info.pop("transparency", None)
    else:
        image.info["transparency"] = transparent
    if not image.has_transparency_data:
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(with_alpha, mask=with_alpha)
    return white


def _from_16_bits(image: Image.Image, transparent: object) -> Image.Image:
    """Greyscale of 16 bits a sample, of which Pillow's own conversion keeps the wrong bits in some versions."""
    samples = image.convert("I")
    grey = samples.point([value // 257 for value in range(1 << 16)], "L")
    if isinstance(transparent, int):
        is_transparent = samples.point([255 * (value == transparent) for value in range(1 << 16)], "L")
        grey.paste(255, mask=is_transparent)
    return grey.convert("RGB")


def _too_large(pixels: str, max_pixels: int) -> str:
    return f"it has {pixels} pixels, the limit is {max_pixels}"


def _reason(error: Exception) -> str:
    words = str(error).lower()
    if "too large" in words or "too much memory" in words:  # Pillow's own limits on a PNG's texts and profile
        return "the text or profile in it is too large"
    return "it is cut off" if isinstance(error, EOFError) or "truncated" in words else "it is damaged or cut off"
