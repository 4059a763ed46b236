"""A worker without a model: it speaks the engine's real messages, and has a token ready for everyone at every step."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from lmserve.config import ModelConfig
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.connection import ConnectionClosed, WorkerConnection
from lmserve.engine.messages import AddRequest, Cancel, EngineStats, StepOutputs
from lmserve.models.facts import ModelFacts
from lmserve.outputs import FinishReason, RequestOutput, TokenLogprobs
from lmserve.runtime.interface import RunnerInfo, Task

WORDS = range(1000, 9000)
"""Token ids that a tokenizer has as pieces of plain text, near enough."""


@dataclass
class OneModel:
    """The only model, and its entry."""

    config: ModelConfig
    engine: AsyncEngine
    created: int = 0
    state: str = "loaded"
    stage: str = ""
    progress: float = 1.0
    facts: ModelFacts | None = None
    capabilities: tuple[str, ...] = ()
    just_in_time: bool = True
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def model_id(self) -> str:
        return self.config.model_id

    @property
    def path(self) -> str:
        return self.config.model

    @property
    def info(self) -> RunnerInfo:
        return self.engine.info

    def entries(self) -> list[OneModel]:
        return [self]

    def resolve(self, name: str | None, task: Task | None = None) -> OneModel:
        return self

    @contextlib.asynccontextmanager
    async def use(
        self, name: str | None, ttl_seconds: float | None = None, task: Task | None = None
    ) -> AsyncIterator[OneModel]:
        yield self

    async def refresh(self) -> None:
        pass

    def problem(self) -> str | None:
        return None


def stub_info(streams: int) -> RunnerInfo:
    return RunnerInfo(
        architecture="none",
        device="none",
        dtype="none",
        attention_backend="none",
        lane="none",
        num_parameters=0,
        weight_bytes=0,
        vocab_size=10**6,
        max_model_len=10**6,
        block_size=16,
        num_blocks=10**6,
        kv_cache_bytes=0,
        max_num_seqs=streams,
        max_num_batched_tokens=10**6,
    )


def run_worker(sock: socket.socket) -> None:
    """One token for each live request in each step, as fast as they are read."""
    connection = WorkerConnection(sock)
    live: dict[str, tuple[AddRequest, int]] = {}
    draw = random.Random(0).choices
    try:
        while True:
            for message in connection.receive_waiting() if live else [connection.receive()]:
                if isinstance(message, AddRequest):
                    live[message.request_id] = (message, 0)
                elif isinstance(message, Cancel):
                    live.pop(message.request_id, None)
            ids = draw(WORDS, k=len(live))
            outputs = [_next(live, *pair) for pair in zip(ids, list(live), strict=True)]
            connection.send(StepOutputs(outputs, EngineStats()))
    except ConnectionClosed:
        pass


def _next(live: dict[str, tuple[AddRequest, int]], token_id: int, request_id: str) -> RequestOutput:
    request, done = live[request_id]
    live[request_id] = (request, done + 1)
    reason = FinishReason.LENGTH if done + 1 == request.sampling.max_tokens else None
    if reason is not None:
        del live[request_id]
    wanted = request.sampling.logprobs
    top = tuple((token_id + i, -1.0 - i) for i in range(wanted or 0))
    return RequestOutput(
        request_id, 0, (token_id,), () if wanted is None else (TokenLogprobs(-1.0, top),), finish_reason=reason
    )
