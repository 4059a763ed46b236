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
    120: {"decode": "HMMA", "prompt": "HMMA"},
}
"""What the tensor cores of a capability are called by: a decode's 16 rows are too few for the newer ones, and so are
the 32 of a prompt's tile with heads of 512."""
SHARED_MEMORY = {80: 99, 90: 227, 100: 227, 120: 99}
"""KiB that a program may have. The first of 80 have 163, but their workstations' (86, 89), which get the same, 99."""
MOST_TABLE_COPIES = 96
"""Of 4 bytes, an entry of a block table each."""


def build(capability: int, folder: Path) -> dict[str, dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), str(capability), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return built


def check_copies(name: str, made: dict[str, Any]) -> None:
    """All of keys and values comes 16 bytes at a time; of 8 bits some 8, as tensor cores want values then."""
    copies = {int(num_bytes): count for num_bytes, count in made["copies"].items()}
    assert made["instructions"]["LDGSTS"] == sum(copies.values()), (name, made)
    assert copies.pop(4, 0) <= (MOST_TABLE_COPIES if name.startswith("decode") else 0), (name, made)
    in_8_bits = "8 bits" in name
    assert copies.pop(16) >= (2 if in_8_bits else 8), (name, made)
    assert set(copies) <= ({8} if in_8_bits else set()), (name, made)


@pytest.mark.slow
@pytest.mark.parametrize("capability", PRODUCTS)
def test_kernels_load_wide_multiply_on_tensor_cores_and_spill_nothing(capability: int, tmp_path: Path) -> None:
    built = build(capability, tmp_path)
    assert len(built) == 16
    for name, made in built.items():
        assert made["STACK"] == made["LOCAL"] == 0, (name, made)
        assert not {"STL", "LDL"} & set(made["instructions"]), (name, made)
        assert made["shared"] <= SHARED_MEMORY[capability] * 1024, (name, made)
        kernel, _, case = name.partition(" ")
        if kernel in PRODUCTS[capability]:
            products = "HMMA" if case == "512" else PRODUCTS[capability][kernel]
            assert made["instructions"].get(products, 0) >= 8, (name, made)
            check_copies(name, made)
