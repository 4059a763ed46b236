"""The service: a request's way from text to text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from lmserve.errors import FirstTokenTimeout, LMServeError, ModelLoadFailed
from lmserve.service.chat_template import Chat, ChatTemplate, Prompt
from lmserve.service.deltas import Delta, Usage
from lmserve.service.log_stream import LogStream
from lmserve.service.merge import merge
from lmserve.service.model_text import ModelText
from lmserve.service.protocols import ModelEntry, Models
from lmserve.service.request import (
    COMPLETION_MAX_TOKENS,
    GenerationOptions,
    GenerationRequest,
    ServedModel,
    ServiceSettings,
    check_choices,
    check_token_ids,
    context_length,
    make_request,
)
from lmserve.service.run import PromptRun

T = TypeVar("T")
RETRY_AFTER_TIMEOUT = 5.0
TEXT_THREADS = 2
"""Encoding releases the interpreter's lock; templates do not, and more threads would not make them faster."""


def load_model_text(entry: ModelEntry) -> ModelText:
    """The text side of a model, read from where the model is."""
    config = entry.config
    return ModelText.load(entry.path, trust_remote_code=config.trust_remote_code, revision=config.revision)


class GenerationService:
    """Owns the models' tokenizers and each request from its text to its deltas.

    Tokenizers are loaded at most once each, and rendering and encoding are done in threads: tokens of other requests go
    out meanwhile.
    """

    def __init__(
        self,
        models: Models,
        log: LogStream,
        settings: ServiceSettings,
        *,
        load_text: Callable[[ModelEntry], ModelText] = load_model_text,
    ) -> None:
        self._models = models
        self._log = log
        self._settings = settings
        self._load_text = load_text
        self._threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._loaders = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="tokenizer")
        """Their own: a tokenizer that takes its time holds up no request for another model."""
        self._texts: dict[str, asyncio.Task[tuple[ModelText, ChatTemplate]]] = {}

    async def load_texts(self, entries: Iterable[ModelEntry]) -> None:
        """Load these models' tokenizers.

        Raises:
            ModelLoadFailed: one of them cannot be read.
        """
        await asyncio.gather(*(self._text_of(entry) for entry in entries))

    def forget(self, entry: ModelEntry) -> None:
        """Give up what is kept for a model that is loaded no more."""
        self._texts.pop(entry.model_id, None)

    @asynccontextmanager
    async def use(self, model: str | None, ttl_seconds: float | None = None) -> AsyncIterator[str]:
        """The id of the model that serves a name: loaded if need be, and so until the context ends.

        ``ttl_seconds``: the idle time that it has afterwards; infinity for ever, None as it is. Raises as Models.use.
        """
        async with self._models.use(model, ttl_seconds) as entry:
            yield entry.model_id

    def loading(self, model: str | None) -> str:
        """What a model's load is doing, for people; empty when there is none."""
        try:
            entry = self._models.resolve(model)
        except LMServeError:
            return ""
        return f"loading {entry.model_id}: {entry.stage} {entry.progress:.0%}" if entry.state == "loading" else ""

    async def prepare_chat(
        self, request_id: str, model: str | None, chat: Chat, options: GenerationOptions
    ) -> GenerationRequest:
        """Render and encode a chat, and check everything.

        Raises:
            RequestError: the client's mistake, with the field at fault.
            NotReady: the model cannot be served now.
        """
        entry = self._models.resolve(model)
        engine = entry.engine
        text, template = await self._text_of(entry)

        def prepare() -> GenerationRequest:
            return make_request(
                request_id,
                ServedModel(entry, engine, text),
                [template.render(chat)],
                options,
                self._settings,
                prompt_param="messages",
                begins_text=not chat.continue_final_message,
            )

        return await self._in_thread(prepare)

    async def prepare_completion(
        self, request_id: str, model: str | None, prompts: Sequence[str | list[int]], options: GenerationOptions
    ) -> GenerationRequest:
        """Encode the prompts (no template), and check everything. Raises as ``prepare_chat``."""
        entry = self._models.resolve(model)
        engine = entry.engine
        check_choices(len(prompts), options.n or 1, entry.config.max_waiting + engine.info.max_num_seqs, self._settings)
        text, _ = await self._text_of(entry)

        def prepare() -> GenerationRequest:
            return make_request(
                request_id,
                ServedModel(entry, engine, text),
                [Prompt(p, text.encode(p)) if isinstance(p, str) else Prompt(None, p) for p in prompts],
                options,
                self._settings,
                prompt_param="prompt",
                default_max_tokens=COMPLETION_MAX_TOKENS,
            )

        return await self._in_thread(prepare)

    async def tokenize(self, model: str | None, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text, as ``prepare_completion`` makes them or without the tokens that begin a sequence."""
        words, _ = await self._text_of(self._models.resolve(model))
        encode = words.encode if add_special_tokens else words.encode_rendered
        return await self._in_thread(lambda: encode(text))

    async def render(self, model: str | None, chat: Chat) -> Prompt:
        """What the model would receive of a chat. Raises as ``prepare_chat``."""
        _, template = await self._text_of(self._models.resolve(model))
        return await self._in_thread(lambda: template.render(chat))

    async def detokenize(self, model: str | None, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included.

        Raises:
            InvalidRequest: one of them is outside of the vocabulary.
        """
        entry = self._models.resolve(model)
        words, _ = await self._text_of(entry)
        check_token_ids(token_ids, entry.engine.info.vocab_size, "tokens")
        return await self._in_thread(lambda: words.decode(token_ids, skip_special_tokens=False))

    async def token_strings(self, model: str | None, token_ids: Sequence[int]) -> list[str]:
        """Each token's text alone; lone bytes of a longer character show as U+FFFD."""
        words, _ = await self._text_of(self._models.resolve(model))
        return [words.table.piece(token_id).decode("utf-8", "replace") for token_id in token_ids]

    def context_length(self, model: str | None) -> int:
        """Tokens that prompt and output of one sequence may have together."""
        return context_length(self._models.resolve(model).engine.info)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """The request's deltas: all choices, then the usage of all prompts together. Closing it cancels the request.

        Raises:
            FirstTokenTimeout: the engine took too long to begin.
        """
        runs = [PromptRun(request, index, self._log).deltas() for index in range(len(request.prompts))]
        usage = Usage(0, 0, 0)
        async with aclosing(runs[0] if len(runs) == 1 else merge(runs)) as deltas:
            yield await self._first(deltas)
            async for delta in deltas:
                if isinstance(delta, Usage):
                    usage += delta
                else:
                    yield delta
        yield usage

    def close(self) -> None:
        """End the threads. Work that has begun is not waited for."""
        for threads in (self._threads, self._loaders):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _first(self, deltas: AsyncGenerator[Delta, None]) -> Delta:
        """Every request has one that is not the usage: each choice ends."""
        seconds = self._settings.first_token_seconds
        # Not wait_for: before Python 3.12 it loses a cancel that comes in the same moment as the token.
        first = asyncio.ensure_future(anext(deltas))
        try:
            done, _ = await asyncio.wait({first}, timeout=seconds)
        finally:
            if not first.done():
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
        if not done:
            message = f"The request had no first token after {seconds:g} seconds: the server has too much to do."
            raise FirstTokenTimeout(message, RETRY_AFTER_TIMEOUT)
        return first.result()

    async def _text_of(self, entry: ModelEntry) -> tuple[ModelText, ChatTemplate]:
        """Loaded by whoever comes first; a failure is not remembered."""
        loading = self._texts.get(entry.model_id)
        if loading is None:
            loading = self._texts[entry.model_id] = asyncio.create_task(self._load(entry))
        return await asyncio.shield(loading)

    async def _load(self, entry: ModelEntry) -> tuple[ModelText, ChatTemplate]:
        try:
            text = await asyncio.get_running_loop().run_in_executor(self._loaders, self._load_text, entry)
        except Exception as error:
            self.forget(entry)
            raise ModelLoadFailed(f"The tokenizer of {entry.model_id} cannot be loaded: {error}") from error
        return text, ChatTemplate(text)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
