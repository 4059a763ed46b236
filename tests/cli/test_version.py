from __future__ import annotations

import importlib.metadata
import json

from lmserve import __version__
from tests.cli.running import lmserve


def test_versions_for_programs() -> None:
    versions = json.loads(lmserve("version", "--json").stdout)
    assert versions.keys() == {"lmserve", "python", "torch", "transformers"}
    assert versions["lmserve"] == __version__
    assert versions["torch"] == importlib.metadata.version("torch")


def test_versions_for_people() -> None:
    lines = lmserve("version").stdout.splitlines()
    assert [line.split() for line in lines][0] == ["lmserve", __version__]
    assert len(lines) == 4
