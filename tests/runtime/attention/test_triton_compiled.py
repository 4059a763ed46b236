"""What Triton makes of the kernels for GPUs that need not be here: instructions, registers, no spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

PRODUCTS = {
    80: {"decode": "HMMA", "prompt": "HMMA"},
    90: {"decode": "HMMA", "prompt": "HGMMA"},
    100: {"decode": "HMMA", "prompt": "UTCHMMA"},
}
"""What the tensor cores of a capability are called by: a decode's 16 rows are too few for the newer ones."""
SHARED_MEMORY = {80: 163, 90: 227, 100: 227}
"""KiB that a program may have."""


def build(capability: int, folder: Path) -> dict[str, dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), str(capability), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return built


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_load_wide_multiply_on_tensor_cores_and_spill_nothing(capability: int, tmp_path: Path) -> None:
    built = build(capability, tmp_path)
    assert len(built) == (6 if capability >= 89 else 4)
    for name, made in built.items():
        instructions = made["instructions"]
        assert made["STACK"] == made["LOCAL"] == 0, (name, made)
        assert not {"STL", "LDL"} & set(instructions), (name, made)
        assert instructions[PRODUCTS[capability][name.split()[0]]] >= 8, (name, made)
        assert instructions["LDGSTS"] >= 8, (name, made)
        assert made["wide_copies"] >= 8, (name, made)
        assert made["shared"] <= SHARED_MEMORY[capability] * 1024, (name, made)
