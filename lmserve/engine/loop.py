"""The worker's only loop: hear, step, say."""

from __future__ import annotations

from typing import Protocol, TypeVar

from lmserve.engine.connection import WorkerConnection
from lmserve.engine.messages import EngineStats, FromWorker, Shutdown, ToWorker

O = TypeVar("O")  # noqa: E741  (the output of one engine)


class Core(Protocol[O]):
    """An engine as the loop drives it: ``EngineCore`` or ``EncoderCore``."""

    @property
    def has_work(self) -> bool: ...

    @property
    def stats(self) -> EngineStats: ...

    def handle(self, message: ToWorker) -> list[O]: ...

    def step(self) -> list[O]: ...

    def report(self, outputs: list[O]) -> FromWorker: ...

    def check_integrity(self) -> None: ...

    def use_idle_time(self) -> bool: ...


def run_engine(core: Core[O], connection: WorkerConnection) -> None:
    """Runs until a Shutdown message. Idle, it prepares for what may come and is then blocked on the socket.

    Requests, cancels, pauses and resumes that came during a step are taken up before the next one; the news of a step,
    and of the cancels before it, leave in one message, with the counters; a step without news tells the counters alone.

    Raises:
        ConnectionClosed: the API process is gone.
        FatalRunnerError: the device can no longer be trusted.
    """
    told = core.stats
    while True:
        if core.has_work:
            messages = connection.receive_waiting()
        else:
            core.check_integrity()
            while not connection.has_waiting() and core.use_idle_time():
                pass
            messages = [connection.receive()]
        outputs: list[O] = []
        for message in messages:
            if isinstance(message, Shutdown):
                return
            outputs += core.handle(message)
        if core.has_work:
            outputs += core.step()
        stats = core.stats
        if outputs or stats != told:
            connection.send(core.report(outputs))
            told = stats
