"""``lmserve`` at a terminal of its own: a test types and reads what a person would see."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

DEADLINE_SECONDS = 60.0
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")
# The child makes the terminal its own, so that Ctrl-C is its signal, and heeds it also where these tests do not.
_START = (
    "import fcntl, os, signal, sys, termios\n"
    "fcntl.ioctl(2, termios.TIOCSCTTY, 0)\n"
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "os.execv(sys.executable, [sys.executable, '-m', 'lmserve', *sys.argv[1:]])"
)


class TerminalProgram:
    """One run. ``screen`` is all that was shown, as it came; ``text`` is that without what only moves the cursor."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process = process
        self._terminal = terminal
        self.screen = ""
        self._seen = 0
        self._bytes = b""

    @property
    def text(self) -> str:
        return _ESCAPES.sub("", self.screen).replace("\r\n", "\n")

    def type(self, text: str) -> None:
        self.type_bytes(text.encode())

    def type_bytes(self, raw: bytes) -> None:
        os.write(self._terminal, raw)

    def until(self, expected: str) -> None:
        """Reads up to the expected text. It must come."""
        if not self._find(expected, DEADLINE_SECONDS):
            raise AssertionError(f"{expected!r} did not come; the screen ends with {self.text[-2000:]!r}")

    def interrupt(self, expected: str) -> None:
        """Presses Ctrl-C while the program waits for a line, and reads up to the expected text.

        Python does not see an interrupt that comes just before it waits (between its last look and ``select``): a
        person would press the keys again, and so does this.
        """
        for _ in range(6):
            self.type(CTRL_C)
            if self._find(expected, DEADLINE_SECONDS / 6):
                return
            if self.process.poll() is not None:
                break
        raise AssertionError(f"{expected!r} did not come; the screen ends with {self.text[-2000:]!r}")

    def _find(self, expected: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (found := self.text.find(expected, self._seen)) < 0:
            if not self._read(deadline):
                return False
        self._seen = found + len(expected)
        return True

    def line(self, text: str) -> None:
        """Waits for the chat's prompt, and types a line."""
        self.until("> ")
        self.type(f"{text}\r")
        self.until("\n")

    def end(self) -> int:
        """Everything up to the program's end; its exit code."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self._read(deadline):
            pass
        return self.process.wait(timeout=DEADLINE_SECONDS)

    def _read(self, deadline: float) -> bool:
        """False: nothing more will come."""
        ready, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
        try:
            chunk = os.read(self._terminal, 65536) if ready else b""
        except OSError:  # all ends of the other side are closed
            chunk = b""
        self._bytes += chunk
        self.screen = self._bytes.decode("utf-8", "ignore")
        return bool(chunk)


@contextmanager
def at_terminal(
    *arguments: str, columns: int = 100, stdout: int | None = None, **environment: str
) -> Iterator[TerminalProgram]:
    """Starts ``lmserve`` there. ``stdout``: a file for that instead."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    # A width in the environment goes before the terminal's own, and who runs the tests may have set one.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LMSERVE_", "COLUMNS", "LINES"))}
    process = subprocess.Popen(
        [sys.executable, "-c", _START, *arguments],
        stdin=theirs,
        stdout=theirs if stdout is None else stdout,
        stderr=theirs,
        env={**clean, "TERM": "xterm", "NO_COLOR": "", **environment},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield TerminalProgram(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
