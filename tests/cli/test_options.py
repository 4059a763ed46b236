"""What the shell completes, as the shells ask for it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import lmserve
from tests.cli.scripted_server import Script, instance, managed_model, scripted_server


def script() -> Script:
    return Script(
        models=[managed_model("acme/one", loaded_instances=[instance("first")]), managed_model("acme/two")], key="k"
    )


def complete(line: str, **environment: str) -> list[str]:
    """What bash is offered for the last word of the line."""
    words = line.split(" ")
    done = lmserve(_LMSERVE_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1), **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_names_of_commands_and_options() -> None:
    assert complete("lmserve lo") == ["load", "log"]
    assert complete("lmserve load --id") == ["--identifier"]
    assert complete("lmserve log stream --source r") == ["runtime"]


def test_names_of_models() -> None:
    with scripted_server(script()) as url:
        port = {"LMSERVE_PORT": url.rpartition(":")[2], "LMSERVE_API_KEY": "k"}
        assert complete("lmserve load ", **port) == ["acme/one", "acme/two"]
        assert complete("lmserve chat acme/t", **port) == ["acme/two"]
        assert complete("lmserve unload ", **port) == ["first"]
        assert complete(f"lmserve load --api-key k --url {url} acme/o") == ["acme/one"]
        assert complete(f"lmserve load --url {url} acme/o") == []  # without the key: nothing, and no message


def test_a_server_that_is_not_there_or_does_not_answer() -> None:
    assert complete("lmserve load ", LMSERVE_PORT="1") == []
    assert complete("lmserve load ", LMSERVE_PORT="none") == []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert complete("lmserve load ", LMSERVE_PORT=str(silent.getsockname()[1])) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(shell: str) -> None:
    done = lmserve("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_LMSERVE_COMPLETE=complete_{shell}" in done.stdout


def test_a_shells_script_is_installed(tmp_path: Path) -> None:
    done = lmserve("--install-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1", HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "_LMSERVE_COMPLETE=complete_bash" in (tmp_path / ".bash_completions" / "lmserve.sh").read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_runs_its_script(tmp_path: Path) -> None:
    """As a user's bash does it: the script is read, and the function that it registers is called."""
    program = tmp_path / "lmserve"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lmserve "$@"\n')
    program.chmod(0o755)
    completion = lmserve("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout
    asking = (
        f"{completion}\nCOMP_WORDS=(lmserve unl); COMP_CWORD=1; "
        '$(complete -p lmserve | sed "s/.*-F \\([^ ]*\\).*/\\1/") lmserve unl lmserve; echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", asking], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.stdout.split() == ["unload"]
