"""The engine as the API process sees it: requests in, a stream of outputs for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Generic, TypeVar

from lmserve.engine.messages import (
    HEADER,
    AddRequest,
    Cancel,
    Encode,
    EncoderOutputs,
    EngineStats,
    FromWorker,
    MessageTooLong,
    Pause,
    Resume,
    Shutdown,
    StepOutputs,
    ToWorker,
    UseVocabulary,
    body_length,
    decode_from_worker,
    encode,
)
from lmserve.errors import InvalidRequest, LMServeError, QueueFull, WorkerDied
from lmserve.grammar.tokenizer_text import TokenizerText
from lmserve.outputs import EncoderOutput, RequestOutput
from lmserve.runtime.interface import RunnerInfo

MAX_UNREAD_TOKENS = 1024
"""Of one request, all choices together. With more than so many unread it is paused; it goes on at a quarter of them."""


Output = TypeVar("Output", RequestOutput, EncoderOutput)


class _Mailbox(Generic[Output]):
    """One live request's outputs that its reader has not taken yet.

    What it can hold is bounded: the reader's slowness pauses the request in the worker, and until the worker hears of
    it only the steps in between can be added.
    """

    def __init__(self, num_sequences: int) -> None:
        self.num_sequences = num_sequences
        self.num_unread_tokens = 0
        self.is_paused = False
        self._outputs: asyncio.Queue[Output | LMServeError] = asyncio.Queue()

    def put(self, output: Output | LMServeError) -> None:
        self._outputs.put_nowait(output)
        if not isinstance(output, LMServeError):
            self.num_unread_tokens += _num_tokens(output)

    async def take(self) -> Output:
        """The next output. Raises why there are no more in its turn."""
        output = await self._outputs.get()
        if isinstance(output, LMServeError):
            raise output
        self.num_unread_tokens -= _num_tokens(output)
        return output


def _num_tokens(output: RequestOutput | EncoderOutput) -> int:
    """What a request to an encoder gives is as bounded as the request is: it is never paused."""
    return len(output.token_ids) + len(output.prompt_logprobs) if isinstance(output, RequestOutput) else 0


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

    Everything runs on one event loop; there is no lock. A request whose reader is slow is paused in the worker: it
    costs neither memory here nor anybody else's time there. When the worker dies every live request gets ``WorkerDied``
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
        self._unit = "sequences" if info.task == "generate" else "requests"
        self._live: dict[str, _Mailbox[Any]] = {}
        self._num_live_sequences = 0
        self._num_paused_sequences = 0
        self.knows_vocabulary = False
        """Whether ``use_vocabulary`` has been called."""
        self._dead = False
        self._end: LMServeError | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    async def run(self) -> None:
        """Passes the worker's messages on until it is gone. Cancelled, it only stops: ``shut_down`` says why."""
        try:
            while True:
                message = await read_message(self._reader)
                assert isinstance(message, StepOutputs | EncoderOutputs), type(message).__name__
                self.stats = message.stats
                for output in message.outputs:
                    mailbox = self._live.get(output.request_id)
                    if mailbox is not None:
                        self._deliver(mailbox, output)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._die()
        except Exception:
            self._die()
            raise

    async def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of all ``sampling.n`` choices, until each has a finish reason.

        Closing the generator early cancels the request in the worker.

        Raises:
            QueueFull: too many wait already.
            WorkerDied: the worker is gone, before or while the request ran.
            LMServeError: the reason that ``shut_down`` was given.
        """
        mailbox: _Mailbox[RequestOutput] = self._admit(request, request.sampling.n)
        unfinished = request.sampling.n
        try:
            while unfinished:
                output = await mailbox.take()
                if mailbox.is_paused and mailbox.num_unread_tokens <= MAX_UNREAD_TOKENS // 4:
                    self._unpause(mailbox)
                    if not self._dead:
                        self._send(Resume(request.request_id))
                unfinished -= output.finish_reason is not None
                yield output
        finally:
            if unfinished:
                self.cancel(request.request_id)
            self._release(request.request_id)

    async def encode(self, request: Encode) -> AsyncGenerator[EncoderOutput, None]:
        """The rows of all inputs, as they are done; the last output has failed if its ``error`` says so.

        Closing the generator early cancels the request in the worker. Raises as ``generate``.
        """
        mailbox: _Mailbox[EncoderOutput] = self._admit(request, 1)
        unfinished = len(request.inputs)
        try:
            while unfinished > 0:
                output = await mailbox.take()
                unfinished = 0 if output.error is not None else unfinished - len(output.indices)
                yield output
        finally:
            if unfinished:
                self.cancel(request.request_id)
            self._release(request.request_id)

    def use_vocabulary(self, text: TokenizerText) -> None:
        """Has to be called once before the first request with a grammar.

        Raises:
            InvalidRequest: the tokenizer is too large to be sent.
        """
        if self.knows_vocabulary or self._dead:
            return
        try:
            self._send(UseVocabulary(text))
        except MessageTooLong as error:
            raise InvalidRequest(f"This model's tokenizer is too large for grammars: {error}.") from error
        self.knows_vocabulary = True

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Stops a request, or one choice of it; its last output then says ``ABORT``. Unknown ids are ignored."""
        if request_id in self._live and not self._dead:
            self._send(Cancel(request_id, choice))

    async def wait_idle(self) -> None:
        """Returns when no request is alive."""
        await self._idle.wait()

    def shut_down(self, reason: LMServeError | None = None) -> None:
        """Tells the worker to end now. ``reason``: what live requests are told, and any that come still."""
        self._end = reason
        if not self._dead:
            self._send(Shutdown())
            self._die()

    def _deliver(self, mailbox: _Mailbox[Output], output: Output) -> None:
        mailbox.put(output)
        if mailbox.num_unread_tokens > MAX_UNREAD_TOKENS and not mailbox.is_paused:
            mailbox.is_paused = True
            self._num_paused_sequences += mailbox.num_sequences
            self._send(Pause(output.request_id))

    def _unpause(self, mailbox: _Mailbox[Any]) -> None:
        if mailbox.is_paused:
            mailbox.is_paused = False
            self._num_paused_sequences -= mailbox.num_sequences

    def _admit(self, request: AddRequest | Encode, num_sequences: int) -> _Mailbox[Any]:
        if self._dead:
            raise self._end or WorkerDied(f"The worker of model {self._name} has ended; it is being started again.")
        waiting = self._num_live_sequences - self._num_paused_sequences - self.info.max_num_seqs
        if waiting >= self._max_waiting:
            raise QueueFull(
                f"The queue of model {self._name} is full: {waiting} {self._unit} wait, "
                f"the limit is {self._max_waiting}."
            )
        assert request.request_id not in self._live
        try:
            self._send(request)
        except MessageTooLong as error:
            raise InvalidRequest(f"The request is too large for the engine: {error}.") from error
        mailbox: _Mailbox[Any] = _Mailbox(num_sequences)
        self._live[request.request_id] = mailbox
        self._num_live_sequences += num_sequences
        self._idle.clear()
        return mailbox

    def _release(self, request_id: str) -> None:
        mailbox = self._live.pop(request_id)
        self._unpause(mailbox)
        self._num_live_sequences -= mailbox.num_sequences
        if not self._live:
            self._idle.set()

    def _send(self, message: ToWorker) -> None:
        self._writer.write(encode(message))

    def _die(self) -> None:
        """Nobody hears anything after it; the first reason counts."""
        if self._dead:
            return
        self._dead = True
        self._writer.close()
        for mailbox in self._live.values():
            mailbox.put(self._end or WorkerDied(f"The worker of model {self._name} ended while the request ran."))
