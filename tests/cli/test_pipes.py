from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cli.scripted_server import Script, instance, managed_model, scripted_server

ONE = [managed_model("x/one", loaded_instances=[instance("one")])]
EVENT = {"timestamp": 0, "type": "server.log", "level": "info", "content": "x" * 70_000}


@pytest.mark.parametrize(
    ("arguments", "script"),
    [
        (["ls"], Script(models=[managed_model(f"model-{number}") for number in range(2000)])),
        (["ps", "--json"], Script(models=ONE)),
        (["chat", "-p", "Hi."], Script(models=ONE, pieces=["x" * 70_000, "y"])),
        (["log", "stream", "--source", "server"], Script(log_events=[EVENT] * 3)),
        (["version"], Script()),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_reader_that_has_seen_enough(arguments: list[str], script: Script) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with scripted_server(script) as url:
        where = [] if arguments == ["version"] else ["--url", url]
        done = subprocess.run(
            [sys.executable, "-m", "lmserve", *arguments, *where],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    os.close(writing)
    assert done.returncode == 0
    assert done.stderr in ("", f"Streaming logs from {url}\n")
