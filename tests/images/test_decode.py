from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from lmserve.images.decode import DecodedImage, decode_image
from lmserve.images.job import BadImage
from lmserve.images.signature import FORMATS
from tests.images.odd_files import SIZE, Colour, encoded, quarters
from tests.images.odd_images import OddImage, odd_images

MAX_PIXELS = 4_000_000
ODD_IMAGES = odd_images()


def reason(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(BadImage) as refusal:
        decode_image(data, max_pixels)
    return str(refusal.value)


def corners(image: Image.Image) -> list[Colour]:
    """Of each quarter, the pixel in its middle."""
    width, height = image.size
    places = [(x * width // 4, y * height // 4) for y in (1, 3) for x in (1, 3)]
    pixels = [image.getpixel(place) for place in places]
    return [pixel for pixel in pixels if isinstance(pixel, tuple) and len(pixel) == 3]


def decoded(odd: OddImage) -> DecodedImage | None:
    try:
        return decode_image(odd.data, MAX_PIXELS)
    except BadImage as error:
        said = str(error)
        assert 5 < len(said) < 120  # a fragment for a client: no object's name, no path
        assert "0x" not in said
        return None


def test_there_are_many_and_each_is_small() -> None:
    assert len(ODD_IMAGES) >= 200
    assert len({odd.name for odd in ODD_IMAGES}) == len(ODD_IMAGES)
    assert max(len(odd.data) for odd in ODD_IMAGES) < 1 << 20
    assert [odd.data for odd in odd_images()] == [odd.data for odd in ODD_IMAGES]


@pytest.mark.parametrize("odd", ODD_IMAGES, ids=lambda odd: odd.name)
def test_a_right_picture_or_a_clear_refusal(odd: OddImage) -> None:
    found = decoded(odd)
    if odd.expected == "bad":
        assert found is None
    if found is not None:
        assert found.image.mode == "RGB"
        assert found.format in FORMATS
        assert found.image.width * found.image.height <= MAX_PIXELS
    if odd.expected == "good":
        assert found is not None
        assert found.image.size == odd.size
        for seen, meant in zip(corners(found.image), odd.corners, strict=True):
            assert max(abs(a - b) for a, b in zip(seen, meant, strict=True)) <= odd.tolerance, (seen, meant)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count of a process's memory")
def test_memory_is_bounded_and_no_other_reader_is_loaded(tmp_path: Path) -> None:
    """All of them one after the other, in a process that did not make them; the bombs say that they need gigabytes."""
    for i, odd in enumerate(ODD_IMAGES):
        (tmp_path / f"{i:04}").write_bytes(odd.data)
    program = (
        "import pathlib, re, sys\n"
        "from lmserve.images.decode import BadImage, decode_image\n"
        "def peak(): return int(re.search(r'VmHWM:\\s*(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
        "files = sorted(pathlib.Path(sys.argv[1]).iterdir())\n"
        "before = peak()\n"
        "num_good = 0\n"
        "for file in files:\n"
        "    try:\n"
        f"        decode_image(file.read_bytes(), {MAX_PIXELS})\n"
        "        num_good += 1\n"
        "    except BadImage:\n"
        "        pass\n"
        "print(num_good, peak() - before, 'PIL.EpsImagePlugin' in sys.modules, 'numpy' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    num_good, grown, has_eps, has_numpy = done.stdout.split()
    assert int(num_good) >= sum(odd.expected == "good" for odd in ODD_IMAGES)
    assert int(grown) < 100_000  # kilobytes; getrusage would count the parent's, too
    assert (has_eps, has_numpy) == ("False", "False")


@pytest.mark.parametrize("format", FORMATS)
def test_the_limit_on_pixels_is_exact_and_says_both_numbers(format: str) -> None:
    data = encoded(quarters(), format)
    pixels = SIZE[0] * SIZE[1]
    assert decode_image(data, pixels).image.size == SIZE
    for limit in (pixels - 1, pixels // 2, 10):
        assert reason(data, limit) == f"it has {pixels} pixels, the limit is {limit}"


def test_a_limit_above_pillows_own_is_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(encoded(quarters(), "PNG"), MAX_PIXELS).image.size == SIZE
    reason(encoded(quarters(), "PNG"), 10)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_the_reasons() -> None:
    png = encoded(quarters(), "PNG")
    assert reason(b"") == "it is empty"
    assert reason(b"<svg/>") == "it is no PNG, JPEG, WebP, GIF or BMP file"
    odd = {odd.name: odd.data for odd in ODD_IMAGES}
    assert reason(odd["JPEG of 200 scans"]) == "it is a JPEG of more than 100 scans"
    assert reason(odd["PNG with text that is a bomb"]) == "the text or profile in it is too large"
    assert reason(png[:60]) == "it is cut off"
    assert reason(png[:20] + b"x" + png[21:]) == "it is damaged or cut off"
    assert reason(encoded(Image.new("L", (1, 201)), "PNG")) == (
        "it is 1 x 201 pixels; one side may be at most 200 times the other"
    )


def test_nothing_warns_and_the_filters_are_as_before() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        for odd in ODD_IMAGES[:50]:
            decoded(odd)
        assert warnings.filters == before
    assert said == []


def test_files_that_are_cut_off_are_never_filled_up() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_what_is_known_of_a_picture() -> None:
    stored = quarters(size=SIZE[::-1])
    tag = Image.Exif()
    tag[0x0112] = 6
    found = decode_image(encoded(stored, "JPEG", exif=tag), MAX_PIXELS)
    assert (found.format, found.image.size) == ("JPEG", SIZE), "as it is to be seen"
    assert decode_image(encoded(quarters(), "WEBP"), MAX_PIXELS).format == "WEBP"
    two = encoded(quarters(), "MPO", save_all=True, append_images=[quarters()])
    assert decode_image(two, MAX_PIXELS).format == "JPEG"


def test_a_failure_of_memory_is_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert reason(encoded(quarters(), "JPEG")) == "there is not enough memory to decode it"
