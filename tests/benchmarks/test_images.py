from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.images import chat, make_picture, on_the_wire, one_by_one, parse_arguments, report
from tests.images.tiny_vlms import write_tiny_vlm


def test_pictures_are_the_same_every_time_and_unlike_each_other() -> None:
    one, again, other = (make_picture(seed, (80, 64)) for seed in (1, 1, 2))
    assert one.size == (80, 64)
    assert one.tobytes() == again.tobytes() != other.tobytes()


def test_the_wire_carries_the_picture() -> None:
    picture = make_picture(3, (80, 64))
    [message] = on_the_wire(chat(picture, 3))
    image, text = message["content"]
    assert text["type"] == "text"
    assert "number 3" in text["text"]
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == picture.tobytes()


def test_the_report_has_the_ratio(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    options = parse_arguments([str(tmp_path), "--chats", "4", "--tokens", "10"])
    lines = list(report(options, (2.0, 10.0, 4), ([0.01, 0.02, 0.03], [0.04])))
    assert "ratio: 5.00" in lines
    assert "all at once: 2.0 s, 20 tokens/s" in lines
    assert "4 answers are as theirs" in lines[1]
    assert "median 20.0 ms" in lines[-2]
    assert "median 40.0 ms" in lines[-1]


@pytest.mark.parametrize("family", ["smolvlm"])
def test_generate_answers_each_chat(family: str, tmp_path: Path) -> None:
    folder = write_tiny_vlm(tmp_path, family)
    chats = [chat(make_picture(i, (80, 64)), i) for i in range(2)]
    seconds, answers = one_by_one(folder, chats, "float32", 4)
    assert seconds > 0
    assert len(set(answers)) == 2
