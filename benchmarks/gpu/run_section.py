"""A section in a process of its own, and what is left of it however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.environment import ROOT
from benchmarks.gpu.results import Section, rows_of
from benchmarks.gpu.section_process import SKIPPED
from benchmarks.gpu.sections import Job
from benchmarks.gpu.setting import Setting

GRACE = 5.0
"""Seconds that a killed process may take to be gone."""
WORDS = 300


def run_section(job: Job, setting: Setting, most_seconds: float, scratch: Path) -> Section:
    """Runs it and waits for it, or stops it after so many seconds. Never raises because of what it does.

    ``scratch``: a folder for this run of the benchmark; what is compiled is kept there for the next section.
    """
    section = Section(job.section, job.model)
    written, said = scratch / "rows", scratch / "said"
    command = [sys.executable, "-m", "benchmarks.gpu.section_process", job.section, setting.to_json()]
    began = time.monotonic()
    with written.open("wb") as rows, said.open("wb") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environ(scratch), stdout=rows, stderr=errors, start_new_session=True
        )
        try:
            code: int | None = process.wait(most_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    section.seconds = time.monotonic() - began
    section.rows = rows_of(written.read_text(encoding="utf-8"))
    if code is None:
        section.status, section.reason = "stopped", f"it took more than its {most_seconds:.0f} s"
    elif code != 0:
        section.status = "skipped" if code == SKIPPED else "failed"
        section.reason = _last_words(said) or f"it ended with {code}"
    return section


def _environ(scratch: Path) -> dict[str, str]:
    """Without a network, and with a folder of this run's own for compiled code."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and all that it has begun."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # it hangs in the driver: nothing can be done about it from here
        process.wait(GRACE)


def _last_words(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:WORDS] if lines else ""
