"""The worker's only loop: hear, step, say."""

from __future__ import annotations

from lmserve.engine.connection import WorkerConnection
from lmserve.engine.core import EngineCore
from lmserve.engine.messages import AddRequest, Cancel, Pause, Resume, Shutdown, StepOutputs, ToWorker
from lmserve.outputs import RequestOutput


def run_engine(core: EngineCore, connection: WorkerConnection) -> None:
    """Runs until a Shutdown message. Idle, it is blocked on the socket.

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
            messages = [connection.receive()]
        outputs: list[RequestOutput] = []
        for message in messages:
            if isinstance(message, Shutdown):
                return
            outputs += _apply(core, message)
        if core.has_work:
            outputs += core.step()
        stats = core.stats
        if outputs or stats != told:
            connection.send(StepOutputs(outputs, stats))
            told = stats


def _apply(core: EngineCore, message: ToWorker) -> list[RequestOutput]:
    if isinstance(message, AddRequest):
        return core.add_request(message)
    if isinstance(message, Cancel):
        return core.cancel(message)
    if isinstance(message, Pause):
        core.pause(message)
    elif isinstance(message, Resume):
        core.resume(message)
    else:
        raise AssertionError(f"{type(message).__name__} has no place in the running engine")
    return []
