from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.cli.running import lmserve
from tests.cli.scripted_server import Script, instance, managed_model, scripted_server

COMMANDS = ("serve", "status", "ls", "ps", "get", "load", "unload", "chat", "version")
HEAVY = ("torch", "transformers", "tokenizers", "starlette", "uvicorn")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["serve", "--help"],
        ["version", "--json"],
        ["serve", "--port", "none"],
        ["ps", "--url", "127.0.0.1:1"],
    ],
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
    assert done.stdout or arguments[-1] in ("none", "127.0.0.1:1")


def test_no_arguments_show_the_help() -> None:
    bare, asked = lmserve(), lmserve("--help")
    assert (bare.returncode, bare.stdout, bare.stderr) == (0, asked.stdout, "")


@pytest.mark.parametrize("command", [*COMMANDS, "log stream"])
def test_every_command_shows_examples_that_it_takes(command: str) -> None:
    """Each example's options are the command's own. Nothing in the help is cut off."""
    done = lmserve(*command.split(), "--help", COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, "")
    examples = [line.strip() for line in done.stdout.partition("Example")[2].splitlines() if "lmserve " in line]
    assert examples
    for example in examples:
        own = re.split(r" (?:\||\|\|) ", example[example.index("lmserve ") :])[0]
        assert own.startswith(f"lmserve {command}")
        for option in re.findall(r" (--?[a-z][a-z-]*)", own):
            assert re.search(rf"(^|\s){option}[ ,]", done.stdout.partition("Example")[0])
    assert not re.search(r"\w…", done.stdout)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("serve", "version", "status")])
def test_no_server_is_one_line(command: str) -> None:
    arguments = {"get": ["Some/Model"], "chat": ["--prompt", "Hi."]}.get(command, [])
    done = lmserve(command, *arguments, LMSERVE_PORT="1", LMSERVE_HOST="127.0.0.1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "lmserve: no answer from http://127.0.0.1:1; start one with: lmserve serve\n"


def test_every_command_but_serve_has_json() -> None:
    for command in COMMANDS:
        assert ("--json" in lmserve(command, "--help").stdout) is (command != "serve")


def test_a_locale_that_lacks_characters() -> None:
    with scripted_server(Script(models=[managed_model("x/one", loaded_instances=[instance("grün")])])) as url:
        done = lmserve("ls", "--url", url, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "\\u2713 LOADED" in done.stdout


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
