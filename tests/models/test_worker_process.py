from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from lmserve.models.worker_process import Worker, _forward_lines

PROGRAM = r"""
import sys
sys.stderr.write("one\ntwo\r 50%\r100%\n\n")
sys.stderr.buffer.write(b"\xff broken\n" + b"x" * 200_000 + b"\nlast")
"""


def test_what_a_process_writes_comes_line_by_line(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """To us, and as it is to our own standard error."""
    said: list[tuple[int, str]] = []

    async def scenario() -> int:
        with subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=subprocess.PIPE) as process:
            await asyncio.wait_for(_forward_lines(process, lambda pid, line: said.append((pid, line))), 30)
            return process.pid

    pid = asyncio.run(scenario())
    assert {number for number, _ in said} == {pid}
    lines = [line for _, line in said]
    assert lines[:4] == ["one", "two", " 50%", "100%"]
    assert lines[4] == "\ufffd broken"
    assert "".join(lines[5:]) == "x" * 200_000 + "last", "a line without an end comes in pieces"
    assert capfdbinary.readouterr().err.endswith(b"x\nlast")


def test_a_start_that_is_cancelled_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def remember(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))  # type: ignore[call-overload]  # passed on as they came
        return started[-1]

    monkeypatch.setattr("lmserve.models.worker_process.subprocess.Popen", remember)

    async def scenario() -> None:
        for pause in (0.0, 0.3):
            starting = asyncio.create_task(Worker.start(lambda pid, line: None))
            await asyncio.sleep(pause)
            while not started:
                await asyncio.sleep(0)
            starting.cancel()
            await asyncio.wait({starting})
            assert starting.cancelled()
            started[-1].wait(10)

    asyncio.run(scenario())
    assert len(started) == 2
