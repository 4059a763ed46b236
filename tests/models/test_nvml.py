"""The driver's figures: through the real package, from a library that stands in for the driver."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmserve.models.nvml import Nvml
from tests.models import nvidia_driver

GIB = 2**30
ASK = """
import dataclasses, json
from lmserve.models.nvml import Nvml
nvml = Nvml()
nvml.gpus()
print(json.dumps([dataclasses.asdict(gpu) for gpu in nvml.gpus()]))
"""


def asked(**environment: str) -> list[dict[str, object]]:
    """By another process: the package keeps the library that it has opened."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ASK],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="nvidia-ml-py is not installed")
def test_what_a_gpu_tells_and_what_it_keeps_back(tmp_path: Path) -> None:
    if not nvidia_driver.build(tmp_path):
        pytest.skip("no C compiler")
    first, second = asked(LD_LIBRARY_PATH=str(tmp_path))
    assert first == {
        "identifier": "GPU-0000-0",
        "total_bytes": 80 * GIB,
        "used_bytes": 70 * GIB,
        "utilization": 0.97,
        "by_process": {"101": 36 * GIB},
    }
    assert second == {
        "identifier": "GPU-0000-1",
        "total_bytes": 80 * GIB,
        "used_bytes": 2 * GIB,
        "utilization": None,
        "by_process": {},
    }


def test_without_a_driver_there_are_no_gpus(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")  # so that this holds on a machine with a GPU, too
    assert asked(LD_LIBRARY_PATH=str(tmp_path)) == []


def test_without_the_package_there_are_none_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    nvml = Nvml()
    assert nvml.gpus() == []
    assert nvml.gpus() == []
