"""The rules of the house that a machine can hold; import directions are contracts in pyproject.toml."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmserve
from lmserve.config import keys
from lmserve.runtime.attention import BACKENDS

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for top in ("lmserve", "tests", "benchmarks", "scripts") for path in (ROOT / top).rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    long = [
        f"{node.name}: {length} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long


def test_names_say_what_is_inside() -> None:
    assert not [path for path in SOURCES if {path.stem, *path.relative_to(ROOT).parts} & FORBIDDEN_NAMES]


def test_every_room_is_on_the_map() -> None:
    """And every module outside the rooms."""
    map_ = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = [path.parent.name for path in (ROOT / "lmserve").glob("*/__init__.py")]
    assert len(rooms) >= 6
    assert [room for room in rooms if f"`{room}/`" not in map_] == []


def test_every_module_of_the_package_is_documented() -> None:
    modules = [path for path in SOURCES if path.is_relative_to(ROOT / "lmserve")]
    assert not [path for path in modules if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))]


def test_the_version_is_the_changelogs() -> None:
    headings = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == lmserve.__version__


def test_the_recipe_for_a_sampling_parameter_names_its_files() -> None:
    """Held to a parameter that is as plain as they come: no default of the server's, no filter of its own."""
    recipes = re.split(r"^- ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (recipe,) = (text for text in recipes if text.startswith("**A sampling parameter**"))
    modules = [path for path in SOURCES if path.is_relative_to(ROOT / "lmserve")]
    touched = {str(path.relative_to(ROOT)) for path in modules if "presence_penalty" in path.read_text("utf-8")}
    assert set(re.findall(r"`(lmserve/[\w/]+\.py)`", recipe)) == touched


def test_every_attention_backend_can_be_configured() -> None:
    assert set(keys()["attention_backend"].choices) == {"auto", *BACKENDS}


def test_the_files_that_newcomers_are_sent_to_exist() -> None:
    named = re.findall(r"`((?:lmserve|configs|tests|scripts)/[\w./]*)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert len(named) > 5
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("room", ["api", "cli", "engine", "models", "service"])
def test_no_room_above_runtime_imports_torch(room: str) -> None:
    """As it runs, not as it is written: importing each module of the room loads neither torch nor transformers."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if path.is_relative_to(ROOT / "lmserve" / room)
    ]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
        "sys.exit(', '.join(name for name in ('torch', 'transformers') if name in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert names
