from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.running import lmserve

HEAVY = ("torch", "transformers", "tokenizers", "starlette", "uvicorn")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["version", "--json"], ["serve", "--port", "none"]]
)
def test_the_command_line_is_light(arguments: list[str]) -> None:
    """Help, versions and mistakes come at once: nothing that takes seconds to import is imported for them."""
    program = (
        "import sys\nfrom lmserve.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"sys.exit(','.join(name for name in {HEAVY!r} if name in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"imported: {done.stderr}"
    assert done.stdout or arguments[-1] == "none"


def test_no_arguments_show_the_help() -> None:
    bare, asked = lmserve(), lmserve("--help")
    assert (bare.returncode, bare.stdout, bare.stderr) == (0, asked.stdout, "")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["serve", "--prot", "1"], 2, "--port"),
        (["serve", "--port"], 2, "--port"),
        (["serve", "--port", "x"], 3, "port (flag --port) must be a whole number in [0, 65535], got 'x'"),
        (["serve", "/nowhere/at/all"], 3, "/nowhere/at/all: there is no such folder or file"),
        (["serve", "no\nmodel"], 3, "model no model: there is no such folder or file"),
        (["srve"], 2, "serve"),
        (["log"], 2, "Missing command"),
        (["log", "stream", "--filter", "inputs"], 1, "--filter values must be 'input', 'output', or 'input,output'"),
        (["log", "stream", "--url", "http://127.0.0.1:1"], 1, "no answer from http://127.0.0.1:1"),
    ],
)
def test_a_failure_is_one_line_and_a_code(arguments: list[str], code: int, says: str) -> None:
    done = lmserve(*arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert done.stderr.startswith("lmserve: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
