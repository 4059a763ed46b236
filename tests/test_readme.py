from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmserve.api.schema.chat import ChatCompletionRequest
from lmserve.api.schema.completions import CompletionRequest
from lmserve.api.schema.fields import Treatment, table
from lmserve.api.schema.sampling import SamplingFields
from lmserve.config import keys

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


def test_it_is_short() -> None:
    assert README.count("\n") <= 150


@pytest.mark.parametrize("block", blocks("python"))
def test_the_example_is_python_for_this_server(block: str) -> None:
    compile(block, "README.md", "exec")
    assert f":{keys()['port'].default}/v1" in block
    assert str(keys()["model"].default[0]) in block


@pytest.mark.parametrize("command", commands())
def test_the_commands_are_there_and_know_their_options(command: str) -> None:
    """Each is run with --help in place of its arguments; its options are in the help."""
    program, *arguments = command.split()
    if program.startswith("scripts/"):
        assert os.access(ROOT / program, os.X_OK)
        if program != "scripts/serve.sh":
            return
        program, arguments = "lmserve", ["serve", *arguments]
    assert program == "lmserve"
    words = arguments[:2] if arguments[0] == "log" else arguments[:1]
    invocation = [sys.executable, "-m", "lmserve", *words, "--help"]
    done = subprocess.run(invocation, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for option in arguments:
        assert not option.startswith("--") or f"{option} " in done.stdout


def test_its_options_and_variables_exist() -> None:
    flags = {key.flag for key in keys().values()} | {"--json", "--help"}
    flags |= {f"--no-{key.flag[2:]}" for key in keys().values() if key.kind is bool}
    for command in ("load", "unload", "log stream", "bench", "bench show"):
        invocation = [sys.executable, "-m", "lmserve", *command.split(), "--help"]
        flags |= set(re.findall(r"--[a-z-]+", subprocess.run(invocation, capture_output=True, text=True).stdout))
    for program in ("one_by_one", "api_process", "perplexity"):
        flags |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / f"benchmarks/{program}.py").read_text()))
    variables = {key.variable for key in keys().values()}
    assert set(re.findall(r"(?<![\w-])--[a-z-]+[a-z]", README)) <= flags
    assert set(re.findall(r"LMSERVE_[A-Z_]*[A-Z]", README)) <= variables


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r"`((?:configs|docker|scripts)/[\w./]*)`", README)
    assert len(links) > 5
    assert not [link for link in links if not (ROOT / link).exists()]


def test_every_sampling_field_is_named() -> None:
    named = set(re.findall(r"`([a-z_]+)(?:\.\w+)?`", README))
    honoured = {name for name, row in table(SamplingFields).items() if row.treatment is Treatment.HONOURED}
    assert honoured - {"model"} - named == set()


def test_what_is_said_to_be_refused_is() -> None:
    (line,) = re.findall(r"^\| refused by name.*$", README, re.MULTILINE)
    rows = [*table(ChatCompletionRequest).values(), *table(CompletionRequest).values()]
    refused = {row.name for row in rows if row.treatment is Treatment.REFUSED}
    assert set(re.findall(r"`([a-z_]+)`", line)) <= refused
