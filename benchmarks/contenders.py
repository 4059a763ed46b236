"""What the benchmarks here give every contender alike."""

from __future__ import annotations

import argparse
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from lmserve.cli.bench.process import lmserve_command as _lmserve_command

EXIT_TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True, slots=True)
class Machine:
    """What every contender gets alike."""

    model: str
    device: str
    dtype: str
    threads: int

    @property
    def environment(self) -> dict[str, str]:
        threads = str(self.threads)
        return {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}


def lmserve_command(machine: Machine, port: int) -> list[str]:
    options = ["--dtype", machine.dtype, "--device", machine.device, "--threads", str(machine.threads)]
    return _lmserve_command(machine.model, port, options)


def model_folder(value: str) -> Path:
    path = Path(value)
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{value} is not a model folder: it has no config.json")
    return path.resolve()


def positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return number
