"""A small engine that answers from a script, and the models around it. No tensor, the same protocol as the real one."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lmserve.config import ModelConfig
from lmserve.engine.messages import AddRequest, Encode
from lmserve.errors import LMServeError, ModelNotFound, NotReady
from lmserve.grammar.tokenizer_text import TokenizerText
from lmserve.images.source import ImageLimits
from lmserve.models.facts import ModelFacts
from lmserve.outputs import EncoderOutput, FinishReason, RequestOutput, TokenLogprobs
from lmserve.runtime.interface import RunnerInfo, Task

Script = Callable[[AddRequest, int], Sequence[int]]
"""Request and choice -> the tokens that the model would sample, without end."""


def runner_info(
    *, vocab_size: int = 49152, max_model_len: int = 512, num_blocks: int = 64, row_size: int = 1
) -> RunnerInfo:
    return RunnerInfo(
        architecture="Stub",
        device="cpu",
        dtype="float32",
        attention_backend="none",
        lane="none",
        num_parameters=0,
        weight_bytes=0,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        block_size=16,
        num_blocks=num_blocks,
        kv_cache_bytes=0,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        row_size=row_size,
        fingerprint="fp_stub",
    )


class StubEngine:
    """Gives each choice one scripted token a step, up to its end of sequence, stop token, ``max_tokens`` or cancel.

    Where the log-probabilities of the prompt are asked for, choice 0 reports ``prompt_tokens_per_step`` of them a step
    before its first token, while the other choices go on.
    ``requests`` are those that came, ``closed`` the ids of those whose generator ended early, ``cancelled`` what
    ``cancel`` was called with. ``error`` is raised, or told of as an output where it is a string, after ``error_after``
    steps. ``pause`` is between two steps, in seconds; while it is ``held`` it makes none.
    """

    def __init__(self, info: RunnerInfo, script: Script) -> None:
        self.info = info
        self.script = script
        self.pause = 0.0
        self.held = False
        self.error: LMServeError | str | None = None
        self.error_after = 0
        self.may_retry = True
        self.num_cached_tokens = 0
        self.prompt_tokens_per_step = 4
        self.requests: list[AddRequest] = []
        self.encoded: list[Encode] = []
        self.row: float | None = None
        """In place of each number of a row."""
        self.closed: list[str] = []
        self.cancelled: list[tuple[str, int | None]] = []
        self.num_steps = 0
        self.vocabulary: TokenizerText | None = None

    @property
    def knows_vocabulary(self) -> bool:
        return self.vocabulary is not None

    def use_vocabulary(self, text: TokenizerText) -> None:
        self.vocabulary = text

    async def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        self.requests.append(request)
        scripts = {choice: list(self.script(request, choice)) for choice in range(request.sampling.n)}
        num_delays = max(0, len(self._prompt_pieces(request)) - 1)
        step = 0
        try:
            while scripts:
                while self.held:
                    await asyncio.sleep(0.005)
                if self.error is not None and step == self.error_after:
                    yield self._fail(request, self.error)
                if self.pause or step % 16 == 0:
                    await asyncio.sleep(self.pause)
                self.num_steps += 1
                for choice in list(scripts):
                    output = self._output(request, choice, scripts[choice], step - (num_delays if choice == 0 else 0))
                    if output.finish_reason is not None:
                        del scripts[choice]
                    yield output
                step += 1
        finally:
            if scripts:
                self.closed.append(request.request_id)

    async def encode(self, request: Encode) -> AsyncGenerator[EncoderOutput, None]:
        """One input a step, the last one first; its row counts on from its number of tokens."""
        self.encoded.append(request)
        left = len(request.inputs)
        try:
            while left:
                await asyncio.sleep(self.pause)
                if isinstance(self.error, LMServeError):
                    raise self.error
                if self.error is not None:
                    left = 0
                    yield EncoderOutput(request.request_id, error=self.error)
                    return
                left -= 1
                count = len(request.inputs[left].token_ids)
                numbers = [self.row or count + i for i in range(self.info.row_size)]
                yield EncoderOutput(request.request_id, (left,), struct.pack(f"<{len(numbers)}f", *numbers))
        finally:
            if left:
                self.closed.append(request.request_id)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        self.cancelled.append((request_id, choice))

    def _fail(self, request: AddRequest, error: LMServeError | str) -> RequestOutput:
        if isinstance(error, LMServeError):
            raise error
        may_retry = self.may_retry
        return RequestOutput(request.request_id, 0, finish_reason=FinishReason.ERROR, error=error, may_retry=may_retry)

    def _output(self, request: AddRequest, choice: int, script: list[int], step: int) -> RequestOutput:
        sampling = request.sampling
        if (request.request_id, choice) in self.cancelled:
            return RequestOutput(request.request_id, choice, finish_reason=FinishReason.ABORT)
        pieces = self._prompt_pieces(request) if choice == 0 else []
        if step < 0:
            return RequestOutput(request.request_id, choice, prompt_logprobs=pieces[step - 1])
        prompt_logprobs = pieces[-1] if pieces and step == 0 else ()
        if sampling.max_tokens == 0:
            return RequestOutput(
                request.request_id, choice, finish_reason=FinishReason.LENGTH, prompt_logprobs=prompt_logprobs
            )
        token_id = script[step]
        stops = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else request.eos_token_ids)}
        reason = None
        if token_id in stops and step + 1 >= sampling.min_tokens:
            reason = FinishReason.STOP
        elif step + 1 == sampling.max_tokens:
            reason = FinishReason.LENGTH
        logprobs: tuple[TokenLogprobs, ...] = ()
        if sampling.logprobs is not None:
            top = tuple((token_id + i, -0.5 - i) for i in range(sampling.logprobs))
            logprobs = (TokenLogprobs(-0.5, top),)
        cached = self.num_cached_tokens
        return RequestOutput(
            request.request_id, choice, (token_id,), logprobs, cached, reason, prompt_logprobs=prompt_logprobs
        )

    def _prompt_pieces(self, request: AddRequest) -> list[tuple[TokenLogprobs, ...]]:
        """What choice 0 reports of the prompt, step by step; the last comes with its first token.

        A token's log-probability is minus its position, and the likeliest are those that follow it by id.
        """
        count, token_ids = request.sampling.prompt_logprobs, request.prompt_token_ids
        if count is None:
            return []
        entries = [
            TokenLogprobs(-float(i), tuple((token_ids[i] + j, -float(i) - j) for j in range(count)))
            for i in range(1, len(token_ids))
        ]
        size = self.prompt_tokens_per_step
        return [tuple(entries[start : start + size]) for start in range(0, len(entries), size)]


NO_LIMITS = ImageLimits(max_bytes=2**30, max_pixels=2**30, max_images=2**10, seconds=60.0)
"""That a test would come near to."""


@dataclass
class StubEntry:
    """A model that is loaded, unless ``state`` says otherwise."""

    loaded_engine: StubEngine
    config: ModelConfig = field(default_factory=lambda: ModelConfig(model="/models/stub", model_id="org/stub"))
    state: str = "loaded"
    created: int = 1_700_000_000
    stage: str = ""
    progress: float = 0.0
    sampling: Mapping[str, float] = field(default_factory=dict)
    facts: ModelFacts | None = None

    @property
    def capabilities(self) -> tuple[str, ...]:
        return () if self.facts is None else self.facts.capabilities

    @property
    def model_id(self) -> str:
        return self.config.model_id

    @property
    def path(self) -> str:
        return self.config.model

    @property
    def info(self) -> RunnerInfo | None:
        return self.loaded_engine.info if self.state == "loaded" else None

    @property
    def engine(self) -> StubEngine:
        if self.state != "loaded":
            raise NotReady(f"Model {self.model_id} is {self.state}.", retry_after=2.5)
        return self.loaded_engine


class StubModels:
    """One model that answers to its id, to the id's last part, and to no name."""

    just_in_time = True

    def __init__(self, entry: StubEntry) -> None:
        self.entry = entry
        self.pause = 0.0
        self.error: LMServeError | None = None
        """Why no model can be had, after the pause."""
        self.used: list[tuple[str | None, float | None]] = []
        """What was asked for by name, and the idle time that was asked for with it."""
        self.tasks: list[Task | None] = []
        """And what it was to be done."""

    def entries(self) -> list[StubEntry]:
        return [self.entry]

    @contextlib.asynccontextmanager
    async def use(
        self, name: str | None, ttl_seconds: float | None = None, task: Task | None = None
    ) -> AsyncIterator[StubEntry]:
        self.used.append((name, ttl_seconds))
        self.tasks.append(task)
        await asyncio.sleep(self.pause)
        if self.error is not None:
            raise self.error
        yield self.resolve(name)

    async def refresh(self) -> None:
        pass

    def resolve(self, name: str | None, task: Task | None = None) -> StubEntry:
        if name in (None, "stub", self.entry.model_id):
            return self.entry
        raise ModelNotFound(f"Model {name!r} is not loaded. Your models: {self.entry.model_id}.", "model")

    def problem(self) -> str | None:
        return None if self.entry.state == "loaded" else f"model {self.entry.model_id} is {self.entry.state}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The configuration that api and service read."""

    api_key: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 2**20
    body_seconds: float = 20.0
    max_json_nesting: int = 64
    max_n: int = 128
    max_choices: int = 2048
    max_stop: int = 16
    max_inputs: int = 2048
    max_prompt_tokens: int = 0
    first_token_seconds: float = 20.0
    keep_alive_seconds: float = 10.0
    default_temperature: float | None = None
    default_top_p: float | None = None
    default_top_k: int | None = None
    default_min_p: float | None = None
    default_repeat_penalty: float | None = None
