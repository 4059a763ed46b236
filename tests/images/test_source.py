from __future__ import annotations

import base64
from pathlib import Path
from urllib.parse import quote

import pytest

from lmserve.errors import InvalidRequest
from lmserve.images.source import is_web_url, read_data_uri

PATH = "messages[0].content[1].image_url.url"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) + b"\xfb\xff"
TEXT = base64.b64encode(PNG).decode()
URL_SAFE = base64.urlsafe_b64encode(PNG).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{TEXT}",
        f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        f"data:image/jpeg;base64,{TEXT}",
        f"data:text/plain;base64,{TEXT}",
        f"data:image/png;charset=utf-8;name=cat.png;base64,{TEXT}",
        f"data:image/png; base64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:base64,{TEXT}",
        f"  data:image/png;base64,{TEXT}\n",
        "data:image/png;base64," + "\r\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76)),
        "data:image/png;base64, " + " ".join(TEXT),
        f"data:image/png;base64,{URL_SAFE}",
        f"data:image/png;base64,{TEXT.rstrip('=')}",
        f"data:image/png;base64,{quote(TEXT, safe='')}",
        f"data:image/png;base64,{TEXT.replace('/', '%2f')}",
        TEXT,
        TEXT.rstrip("="),
    ],
)
def test_every_way_of_writing_the_same_bytes(url: str) -> None:
    assert not is_web_url(url)
    assert read_data_uri(url, PATH) == PNG


@pytest.mark.parametrize("data", [b"x", b"xy", b"xyz", b"not a picture", bytes(range(256)) * 4])
def test_what_the_bytes_are_is_not_judged_here(data: bytes) -> None:
    assert read_data_uri("data:image/png;base64," + base64.b64encode(data).decode(), PATH) == data


@pytest.mark.parametrize(
    "beginning", [b"\xff\xd8\xff\xe0", b"GIF87a", b"GIF89a", b"BM", b"RIFF\x10\x00\x00\x00WEBPVP8 ", PNG[:8]]
)
def test_base64_alone_that_begins_like_a_picture(beginning: bytes) -> None:
    data = beginning + bytes(40)
    assert read_data_uri(base64.b64encode(data).decode(), PATH) == data


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png,hello", "must say ;base64"),
        (f"data:image/png,{TEXT}", "must say ;base64"),
        ("data:image/svg+xml;utf8,<svg/>", "must say ;base64"),
        (f"data:image/png;base64;{TEXT}", "no comma"),
        ("data:", "no comma"),
        ("data:image/png;base64,", "no data"),
        ("data:image/png;base64, \n", "no data"),
        ("data:image/png;base64,====", "not base64"),
        ("data:image/png;base64,A", "not base64"),
        ("data:image/png;base64,AAAAA", "not base64"),
        ("data:image/png;base64,AA=A", "not base64"),
        ("data:image/png;base64,AAA=AAA=", "not base64"),
        ("data:image/png;base64,AAA*", "not base64"),
        ("data:image/png;base64,AAAA#top", "not base64"),
        ("data:image/png;base64,AAÄA", "not base64"),
        ("data:image/png;base64,AA%C3%84A", "not base64"),
        ("data:image/png;base64,data:image/png;base64,AAAA", "not base64"),
        ("file:///etc/passwd", "local files are never read"),
        ("FILE:/etc/passwd", "local files are never read"),
        ("/etc/passwd", "local files are never read"),
        ("./cat.png", "local files are never read"),
        ("C:\\cat.png", "local files are never read"),
        ("~/cat.png", "local files are never read"),
        ("", "must be a data URI"),
        ("   ", "must be a data URI"),
        (":", "must be a data URI"),
        ("aGVsbG8gd29ybGQ=", "must be a data URI"),
        (TEXT + "*", "not all of it is base64"),
        (TEXT[:40] + "/../cat.png", "not all of it is base64"),
        ("ftp://example.com/cat.png", "ftp: is not read"),
        ("javascript:alert(1)", "javascript: is not read"),
        ("blob:https://example.com/1", "blob: is not read"),
        ("gopher://x", "gopher: is not read"),
    ],
)
def test_what_is_refused_and_why(url: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read_data_uri(url, PATH)
    assert reason in str(refusal.value)
    assert PATH in str(refusal.value)
    assert refusal.value.param == PATH


def test_a_file_that_is_there_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    file.write_bytes(PNG)
    for url in (str(file), file.as_uri(), f"file://localhost{file}"):
        with pytest.raises(InvalidRequest, match="local files are never read"):
            read_data_uri(url, PATH)


def test_errors_do_not_repeat_what_may_be_megabytes() -> None:
    for url in ("x" * 100_000, "x" * 100_000 + ":", "data:" + "x" * 100_000, TEXT + "*" * 100_000):
        with pytest.raises(InvalidRequest) as refusal:
            read_data_uri(url, PATH)
        assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("url", ["http://example.com", "https://example.com/x", "HTTPS://example.com", " http:x"])
def test_what_has_to_be_fetched(url: str) -> None:
    assert is_web_url(url)
