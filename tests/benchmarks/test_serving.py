from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from benchmarks.serving import facts, main, parse_arguments

# Tests of the load and the processes stand beside this file; a whole run is scripts/bench.sh.


def parse(folder: Path, *arguments: str) -> argparse.Namespace:
    return parse_arguments([str(folder), *arguments])


def test_defaults(tiny_folder: Path) -> None:
    options = parse(tiny_folder)
    assert options.streams == (1, 8, 32)
    assert (options.prompt_tokens, options.new_tokens, options.rounds) == (128, 128, 2)
    assert (options.no_peers, options.quick, options.json) == (False, False, None)
    assert options.threads == os.cpu_count()


def test_streams_are_a_list_in_order_without_repeats(tiny_folder: Path) -> None:
    assert parse(tiny_folder, "--streams", "8,1,8").streams == (1, 8)


def test_quick_is_one_short_round(tiny_folder: Path) -> None:
    options = parse(tiny_folder, "--quick", "--rounds", "9")
    assert (options.rounds, options.new_tokens) == (1, 32)
    assert parse(tiny_folder, "--quick", "--new-tokens", "4").new_tokens == 4


@pytest.mark.parametrize(
    "wrong", [("--streams", "1,0"), ("--streams", "x"), ("--new-tokens", "-1"), ("--dtype", "int8")]
)
def test_what_makes_no_sense_is_refused(
    tiny_folder: Path, wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(tiny_folder, *wrong)
    assert wrong[0] in capsys.readouterr().err


def test_the_model_has_to_be_a_folder_with_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(tmp_path)
    assert "config.json" in capsys.readouterr().err


def test_facts_name_command_hardware_versions_and_date(tiny_folder: Path) -> None:
    described = facts(parse(tiny_folder, "--threads", "2"))
    assert tiny_folder.name in described["command"]
    assert str(tiny_folder) not in described["command"]
    assert "2 threads" in described["hardware"]
    assert "transformers" in described["versions"]
    assert len(described["date"]) == len("2030-01-02")


def test_a_server_that_does_not_start_ends_the_run_with_its_words(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "benchmarks.serving.lmserve_command", lambda machine, port: ["/bin/sh", "-c", "echo broken; exit 3"]
    )
    assert main([str(tiny_folder), "--no-peers"]) == 1
    assert "broken" in capsys.readouterr().err
