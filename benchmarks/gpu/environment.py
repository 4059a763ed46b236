"""On what was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lmserve import __version__

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "torchao", "numpy")


def describe(device_type: str) -> dict[str, Any]:
    """Device, versions and date, as they stand in the results."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device_type),
        **(_gpu() if device_type == "cuda" else {}),
        "processor": f"{os.cpu_count()} x {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"lmserve": __version__} | {name: package_version(name) for name in PACKAGES},
        "commit": commit(),
    }


def ask(device_type: str) -> dict[str, Any]:
    """``describe``, by a process that ends: this one is not to have any of the device's memory.

    Raises:
        RuntimeError: there is no such device.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.environment", device_type]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no words"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().split("\n")[-1])
    return found


def device_name(device_type: str) -> str:
    """The GPU's own name, or "cpu"."""
    return torch.cuda.get_device_name() if device_type == "cuda" else device_type


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": _said_by(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "unknown",
    }


def package_version(name: str) -> str:
    """Empty if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """Of the repository; a plus where files differ from it; "unknown" where git cannot say."""
    found = _said_by(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if not found:
        return "unknown"
    changed = _said_by(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return found + ("+" if changed else "")


def _said_by(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0]


if __name__ == "__main__":
    print(json.dumps(describe(sys.argv[1])))
