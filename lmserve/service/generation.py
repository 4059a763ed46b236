"""The service: a request's way from text to text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial

from lmserve.errors import LMServeError
from lmserve.grammar.build import body_text
from lmserve.grammar.proof import check_size
from lmserve.images.pool import StoredImage
from lmserve.runtime.interface import Task
from lmserve.service.chat_images import ChatImages
from lmserve.service.chat_template import Chat, ChatTemplate, Prompt, RenderedChat
from lmserve.service.deltas import Delta, Usage
from lmserve.service.healing import heal
from lmserve.service.log_stream import LogStream
from lmserve.service.merge import merge
from lmserve.service.parsing.bind import parsing_of
from lmserve.service.patience import first_in_time
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
    why_no_images,
)
from lmserve.service.run import PromptRun
from lmserve.service.structure import Plan, make_grammar, make_output_plan, make_plain_grammar, make_plan
from lmserve.service.texts import Texts


class GenerationService:
    """Owns each request that generates, from its text to its deltas."""

    def __init__(
        self, models: Models, texts: Texts, images: ChatImages, log: LogStream, settings: ServiceSettings
    ) -> None:
        self._models = models
        self._texts = texts
        self._images = images
        self._log = log
        self._settings = settings

    @asynccontextmanager
    async def use(
        self, model: str | None, ttl_seconds: float | None = None, task: Task | None = None
    ) -> AsyncIterator[str]:
        """The id of the model that serves a name: loaded if need be, and so until the context ends.

        ``ttl_seconds``: the idle time that it has afterwards; infinity for ever, None as it is. ``task``: what it must
        be able to do. Raises as Models.use.
        """
        async with self._models.use(model, ttl_seconds, task) as entry:
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
        text, template = await self._texts.of(entry)
        rendered, images = await self._begin(entry, template, chat)
        served, family = ServedModel(entry, engine, text), template.family
        plan = await self._texts.in_thread(lambda: make_plan(options.output, chat.toolbox, family.syntax))
        grammar = None
        if plan is not None:
            grammar = partial(make_grammar, plan, family, rendered.text, text.control_ids)
            await self._enforce(served, plan, grammar())
        parsing = parsing_of(family, rendered.text, chat.toolbox, text)
        heals = grammar is not None and parsing is None and chat.continue_final_message

        def prepare() -> GenerationRequest:
            prompt = template.finish(rendered, images)
            return make_request(
                request_id,
                served,
                [heal(prompt, text) if heals else prompt],
                options,
                self._settings,
                prompt_param="messages",
                begins_text=not chat.continue_final_message,
                make_grammar=grammar,
                make_parsing=parsing,
                ignored=template.ignored(chat),
            )

        return await self._texts.in_thread(prepare)

    async def _begin(
        self, entry: ModelEntry, template: ChatTemplate, chat: Chat
    ) -> tuple[RenderedChat, list[StoredImage]]:
        """The chat in the template's words, and its images, which are looked at elsewhere."""
        no_images = why_no_images(entry.engine.info)
        rendered = await self._texts.in_thread(lambda: template.begin(chat, no_images))
        return rendered, await self._images.look(rendered.images, entry) if rendered.images else []

    async def prepare_completion(
        self, request_id: str, model: str | None, prompts: Sequence[str | list[int]], options: GenerationOptions
    ) -> GenerationRequest:
        """Encode the prompts (no template), and check everything. Raises as ``prepare_chat``."""
        entry = self._models.resolve(model)
        engine = entry.engine
        check_choices(len(prompts), options.n or 1, entry.config.max_waiting + engine.info.max_num_seqs, self._settings)
        text, _ = await self._texts.of(entry)
        served = ServedModel(entry, engine, text)
        grammar = None
        if options.output is not None:
            plan = await self._texts.in_thread(partial(make_output_plan, options.output))
            grammar = partial(make_plain_grammar, plan, text.control_ids)
            await self._enforce(served, plan, grammar())

        def prepare() -> GenerationRequest:
            encoded = [Prompt(p, text.encode(p)) if isinstance(p, str) else Prompt(None, p) for p in prompts]
            if grammar is not None and not options.echo:
                encoded = [heal(prompt, text) for prompt in encoded]
            return make_request(
                request_id,
                served,
                encoded,
                options,
                self._settings,
                prompt_param="prompt",
                default_max_tokens=COMPLETION_MAX_TOKENS,
                make_grammar=grammar,
            )

        return await self._texts.in_thread(prepare)

    async def _enforce(self, model: ServedModel, plan: Plan, grammar: str) -> None:
        """Sees that a grammar can be enforced, and that the worker knows the model's tokens.

        Raises:
            InvalidRequest: it cannot.
        """
        prover = self._texts.prover
        for claim in plan.claims:
            await prover.prove(body_text(claim.body), claim.path)
        check_size(grammar, plan.claims[0].path)
        if not model.engine.knows_vocabulary:
            vocabulary = await self._texts.in_thread(model.text.for_grammars)
            model.engine.use_vocabulary(vocabulary)

    async def tokenize(self, model: str | None, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text, as ``prepare_completion`` makes them or without the tokens that begin a sequence."""
        words, _ = await self._texts.of(self._models.resolve(model))
        encode = words.encode if add_special_tokens else words.encode_tokens
        return await self._texts.in_thread(lambda: encode(text))

    async def render(self, model: str | None, chat: Chat) -> Prompt:
        """What the model would receive of a chat. Raises as ``prepare_chat``."""
        entry = self._models.resolve(model)
        _, template = await self._texts.of(entry)
        rendered, images = await self._begin(entry, template, chat)
        return await self._texts.in_thread(lambda: template.finish(rendered, images))

    async def detokenize(self, model: str | None, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included.

        Raises:
            InvalidRequest: one of them is outside of the vocabulary.
        """
        entry = self._models.resolve(model)
        words, _ = await self._texts.of(entry)
        check_token_ids(token_ids, entry.engine.info.vocab_size, "tokens")
        return await self._texts.in_thread(lambda: words.decode(token_ids, skip_special_tokens=False))

    async def token_strings(self, model: str | None, token_ids: Sequence[int]) -> list[str]:
        """Each token's text alone; lone bytes of a longer character show as U+FFFD."""
        words, _ = await self._texts.of(self._models.resolve(model))
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
            # Every request has one that is not the usage: each choice ends.
            yield await first_in_time(deltas, self._settings.first_token_seconds)
            async for delta in deltas:
                if isinstance(delta, Usage):
                    usage += delta
                else:
                    yield delta
        yield usage
