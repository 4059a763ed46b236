"""The engine as the API process sees it: requests in, a stream of outputs for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from lmserve.engine.messages import (
    HEADER,
    AddRequest,
    Cancel,
    EngineStats,
    FromWorker,
    MessageTooLong,
    Shutdown,
    StepOutputs,
    ToWorker,
    body_length,
    decode_from_worker,
    encode,
)
from lmserve.errors import InvalidRequest, QueueFull, WorkerDied
from lmserve.outputs import RequestOutput
from lmserve.runtime.interface import RunnerInfo


async def read_message(reader: asyncio.StreamReader) -> FromWorker:
    """The worker's next message.

    Raises:
        asyncio.IncompleteReadError: the worker is gone.
    """
    header = await reader.readexactly(HEADER.size)
    message: FromWorker = decode_from_worker(await reader.readexactly(body_length(header)))
    return message


class AsyncEngine:
    """A ready worker's requests. Owns which are alive and where their outputs go.

    Everything runs on one event loop; there is no lock. When the worker dies every live request gets ``WorkerDied``
    once, and the engine takes no more: a new worker gets a new engine.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        info: RunnerInfo,
        *,
        max_waiting: int,
        name: str,
    ) -> None:
        self.info = info
        self.stats = EngineStats(num_free_blocks=info.num_blocks)
        self._reader = reader
        self._writer = writer
        self._max_waiting = max_waiting
        self._name = name
        self._live: dict[str, asyncio.Queue[RequestOutput | WorkerDied]] = {}
        self._num_live_sequences = 0
        self._dead = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    async def run(self) -> None:
        """Passes the worker's messages on until it is gone. The manager runs this as a task."""
        try:
            while True:
                message = await read_message(self._reader)
                assert isinstance(message, StepOutputs), type(message).__name__
                self.stats = message.stats
                for output in message.outputs:
                    queue = self._live.get(output.request_id)
                    if queue is not None:
                        queue.put_nowait(output)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._die()

    async def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of all ``sampling.n`` choices, until each has a finish reason.

        Closing the generator early cancels the request in the worker.

        Raises:
            QueueFull: too many wait already.
            WorkerDied: the worker is gone, before or while the request ran.
        """
        queue = self._admit(request)
        unfinished = request.sampling.n
        try:
            while unfinished:
                output = await queue.get()
                if isinstance(output, WorkerDied):
                    raise output
                unfinished -= output.finish_reason is not None
                yield output
        finally:
            if unfinished:
                self.cancel(request.request_id)
            self._release(request)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Stops a request, or one choice of it; its last output then says ``ABORT``. Unknown ids are ignored."""
        if request_id in self._live and not self._dead:
            self._send(Cancel(request_id, choice))

    async def wait_idle(self) -> None:
        """Returns when no request is alive."""
        await self._idle.wait()

    def shut_down(self) -> None:
        """Tells the worker to end now."""
        if not self._dead:
            self._send(Shutdown())

    def _admit(self, request: AddRequest) -> asyncio.Queue[RequestOutput | WorkerDied]:
        if self._dead:
            raise WorkerDied(f"The worker of model {self._name} has ended; it is being started again.")
        waiting = self._num_live_sequences - self.info.max_num_seqs
        if waiting >= self._max_waiting:
            raise QueueFull(
                f"The queue of model {self._name} is full: {waiting} sequences wait, the limit is {self._max_waiting}."
            )
        assert request.request_id not in self._live
        try:
            self._send(request)
        except MessageTooLong as error:
            raise InvalidRequest(f"The request is too large for the engine: {error}.") from error
        queue = self._live[request.request_id] = asyncio.Queue()
        self._num_live_sequences += request.sampling.n
        self._idle.clear()
        return queue

    def _release(self, request: AddRequest) -> None:
        del self._live[request.request_id]
        self._num_live_sequences -= request.sampling.n
        if not self._live:
            self._idle.set()

    def _send(self, message: ToWorker) -> None:
        self._writer.write(encode(message))

    def _die(self) -> None:
        self._dead = True
        self._writer.close()
        for queue in self._live.values():
            queue.put_nowait(WorkerDied(f"The worker of model {self._name} ended while the request ran."))
