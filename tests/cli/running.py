"""The command as a user starts it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def lmserve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m lmserve`` to its end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LMSERVE_")}
    return subprocess.run(
        [sys.executable, "-m", "lmserve", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean, **environment},
        check=False,
    )
