"""``lmserve version``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Annotated

import typer

from lmserve import __version__

EPILOG = """Example:

\b
  lmserve version --json"""


def version(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Print the versions of lmserve, Python, torch and transformers."""
    versions = {
        "lmserve": __version__,
        "python": platform.python_version(),
        "torch": _installed("torch"),
        "transformers": _installed("transformers"),
    }
    if as_json:
        print(json.dumps(versions))
    else:
        for name, number in versions.items():
            print(f"{name:<13}{number or 'not installed'}")


def _installed(distribution: str) -> str | None:
    """From its metadata: importing torch takes seconds."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
