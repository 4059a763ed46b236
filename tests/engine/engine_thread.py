"""The worker's loop in a thread of the test, behind a real socket."""

from __future__ import annotations

import queue
import socket
import threading
from types import TracebackType

from lmserve.engine.connection import WorkerConnection
from lmserve.engine.loop import run_engine
from lmserve.engine.messages import StepOutputs, ToWorker, body_length, decode_from_worker, encode
from lmserve.runtime.interface import RunnerInfo, StepInput, StepOutput
from tests.engine.factories import make_engine
from tests.engine.fake_runner import BadStep, FakeRunner, Faults

SECONDS = 20.0
"""After which something that should have happened never will. Nothing waits so long when all is well."""


class GatedRunner(FakeRunner):
    """Holds each step back until ``allow`` lets it end, so that a test decides what happens during a step."""

    def __init__(self, info: RunnerInfo, faults: Faults | None = None) -> None:
        super().__init__(info, faults)
        self._launched: queue.SimpleQueue[StepInput] = queue.SimpleQueue()
        self._permits = threading.Semaphore(0)

    def launch(self, step: StepInput) -> None:
        super().launch(step)
        self._launched.put(step)

    def collect(self) -> StepOutput:
        if not self._permits.acquire(timeout=SECONDS):
            raise BadStep("the test never let the step end")
        return super().collect()

    def wait_launched(self) -> StepInput:
        """The next step, in flight or computed."""
        return self._launched.get(timeout=SECONDS)

    def allow(self, num_steps: int = 1_000) -> None:
        """Lets so many steps more come to their end."""
        self._permits.release(num_steps)


class CountingSocket(socket.socket):
    """Tells when it is read."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(fileno=sock.detach())
        self.num_reads = 0
        self.blocking_read = threading.Event()
        """Set by every read that waits."""

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        self.num_reads += 1
        if not flags & socket.MSG_DONTWAIT:
            self.blocking_read.set()
        return super().recv(bufsize, flags)


class EngineThread:
    """``run_engine`` as the worker process runs it; ``peer`` is the API process's end of the socket.

    Its end is the worker's: the socket closes. On leaving the context the peer is closed and the thread has ended, by
    itself or because nobody was there any more.
    """

    def __init__(self, runner: FakeRunner) -> None:
        self.runner = runner
        self.core = make_engine(runner)
        self.peer, theirs = socket.socketpair()
        self.peer.settimeout(SECONDS)
        self.socket = CountingSocket(theirs)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> EngineThread:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(self.runner, GatedRunner):
            self.runner.allow()
        self.peer.close()
        ended_with = self.join()
        if kind is None and isinstance(ended_with, BadStep | AssertionError):
            raise ended_with

    def send(self, *messages: ToWorker) -> None:
        """All at once: the loop finds either none of them or the first ones in one go."""
        self.peer.sendall(b"".join(map(encode, messages)))

    def receive(self) -> StepOutputs:
        """The next news."""
        length = body_length(self.peer.recv(4, socket.MSG_WAITALL))
        message = decode_from_worker(self.peer.recv(length, socket.MSG_WAITALL))
        assert isinstance(message, StepOutputs)
        return message

    def join(self) -> Exception | None:
        """Waits for the loop's end; what it raised, if anything."""
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "the loop does not end"
        return self._error

    def wait_idle(self) -> None:
        """Until the loop has come to wait on the socket since ``socket.blocking_read`` was last cleared."""
        assert self.socket.blocking_read.wait(SECONDS)

    def _run(self) -> None:
        with self.socket:
            try:
                run_engine(self.core, WorkerConnection(self.socket))
            except Exception as error:
                self._error = error
