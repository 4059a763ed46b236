from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.native_step import main
from tests.runtime.native.availability import needs_native
from tests.tiny_folder import write_tiny_folder


@needs_native
def test_it_prints_a_line_for_each_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_tiny_folder(tmp_path / "tiny")), "--context", "20"]) == 0
    machine, *steps, engine = capsys.readouterr().out.splitlines()
    assert re.match(r"memory [\d.]+ GB/s, products \d+ GFLOP/s, [\d.]+ ms for a new page of 2 MiB", machine)
    names = ["1 x 1", "8 x 1", "32 x 1", "1 x 512", "1 x 512", "1 x 16", "4 x 1"]
    assert [line.split(" tokens")[0] for line in steps] == names
    assert all(re.search(r"[\d.]+ ms +\d+% of the limit +\w", line) for line in steps)
    assert re.search(r"32 rows: [\d.]+ ms a step, -?[\d.]+% of it outside", engine)
