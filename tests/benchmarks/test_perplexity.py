from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.perplexity import agreement, cut, documents, main, read
from tests.tiny_folder import write_tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("perplexity") / "tiny")


def test_a_model_that_knows_nothing_is_as_surprised_as_a_die(folder: Path) -> None:
    windows = cut(folder, documents()[:1], 64)[:4]
    reading = read(folder, "float32", windows)
    assert len(reading.guesses) == 4 * 63
    assert 0.5 * reading.info.vocab_size < reading.perplexity < 3 * reading.info.vocab_size
    assert reading.perplexity == pytest.approx(math.exp(reading.surprise))
    assert agreement(reading, reading) == 1


def test_windows_are_whole(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 200)
    windows = cut(folder, [text], 50)
    assert windows
    assert {len(window) for window in windows} == {50}


def test_it_prints_a_row_for_each_format(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Quality is what is left when speed has been counted. " * 20)
    assert main([str(folder), "--window", "32", "--text", str(text), "--formats", "bfloat16", "int8"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["float32", "bfloat16", "int8"]
    assert all("%" in row for row in rows[1:])


def test_a_text_that_is_too_short_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Short.")
    with pytest.raises(SystemExit):
        main([str(folder), "--text", str(tmp_path / "text.txt")])
