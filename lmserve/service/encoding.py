"""The service of encoders: texts become vectors, pairs of texts become scores."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmserve.engine.messages import Encode
from lmserve.errors import InputTooLong, InvalidRequest, RequestFailed
from lmserve.runtime.interface import EncoderInput, RunnerInfo, Task
from lmserve.service.encoder_run import EncoderRun
from lmserve.service.log_stream import LogStream
from lmserve.service.model_text import EncodedPair, ModelText
from lmserve.service.protocols import Models
from lmserve.service.request import ServedModel, ServiceSettings, check_token_ids
from lmserve.service.texts import Texts

Floats = NDArray[np.float32]
WHOLE = -1
"""As a length to cut to: what the model takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingOptions:
    """What is asked for besides the texts."""

    dimensions: int | None = None
    """Cut the vectors to so many, and scale them to length 1."""
    prompt_name: str | None = None
    """The instruction before each text; None: the model's default, if it has one."""
    cut_to: int | None = None
    """Tokens that a longer input is cut to (``WHOLE``: as many as the model takes). None: it is refused."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a request: a row for each input, (inputs, numbers) float32, and the tokens that were read."""

    rows: Floats
    num_tokens: int


@dataclass(frozen=True, slots=True)
class EncodingRequest:
    """A request that is ready to run: everything a user can get wrong has been refused."""

    request_id: str
    model: ServedModel
    texts: list[str] | None
    """As the model receives them, for people; None: they came as token ids."""
    inputs: list[EncoderInput]
    dimensions: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(each.token_ids) for each in self.inputs)


class EncodingService:
    """Owns each request to an encoder, from its texts to its rows."""

    def __init__(self, models: Models, texts: Texts, log: LogStream, settings: ServiceSettings) -> None:
        self._models = models
        self._texts = texts
        self._log = log
        self._settings = settings

    @asynccontextmanager
    async def use(self, model: str | None, task: Task, ttl_seconds: float | None = None) -> AsyncIterator[str]:
        """The id of the model that serves a name: loaded if need be, and so until the context ends.

        ``ttl_seconds``: the idle time that it has afterwards; infinity for ever, None as it is. Raises as Models.use.
        """
        async with self._models.use(model, ttl_seconds, task) as entry:
            yield entry.model_id

    async def prepare_texts(
        self, request_id: str, model: str, inputs: Sequence[str | list[int]], options: EncodingOptions
    ) -> EncodingRequest:
        """Encode the texts (token ids are taken as they are), and check everything.

        Raises:
            RequestError: the client's mistake, with the field at fault.
            NotReady: the model cannot be served now.
        """
        served = await self._served(model)
        self._check_number(len(inputs), "input")
        size = served.engine.info.row_size
        if options.dimensions is not None and not 1 <= options.dimensions <= size:
            raise InvalidRequest(
                f"dimensions must be between 1 and {size}, which the model's vectors have, got {options.dimensions}.",
                "dimensions",
            )
        instruction = _instruction(served.text, options.prompt_name)
        return await self._texts.in_thread(lambda: _encode_texts(request_id, served, inputs, instruction, options))

    async def prepare_pairs(
        self, request_id: str, model: str, pairs: Sequence[tuple[str, str]], params: Sequence[str], cut_to: int | None
    ) -> EncodingRequest:
        """Encode pairs of texts. ``params``: what each pair is called in an error. Raises as ``prepare_texts``."""
        served = await self._served(model)
        self._check_number(len(pairs), params[0].partition("[")[0] if params else "documents")
        labels = served.engine.info.row_size
        if labels != 1:
            raise InvalidRequest(
                f"Model {model} sorts texts into {labels} classes: it has no score for pairs.", "model"
            )
        return await self._texts.in_thread(lambda: _encode_pairs(request_id, served, pairs, params, cut_to))

    async def run(self, request: EncodingRequest) -> Encoded:
        """All inputs' rows, in their order. Cancelled, the request ends in the worker too.

        Raises:
            FirstTokenTimeout: the engine took too long to begin.
            StepFailed: the engine lost the request.
            RequestFailed: the model gave what is no number. Other exceptions are the engine's own.
        """
        engine = request.model.engine
        run = EncoderRun(request.request_id, request.model.entry, request.inputs, request.texts, self._log)
        outputs = engine.encode(Encode(request.request_id, request.inputs))
        rows = await run.rows(outputs, engine.info.row_size, self._settings.first_token_seconds)
        if request.dimensions is not None:
            rows = rows[:, : request.dimensions]
            rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        if not np.isfinite(rows).all():
            raise RequestFailed("The model's output for one of the inputs is not a number.")
        return Encoded(rows, request.num_tokens)

    async def _served(self, model: str) -> ServedModel:
        entry = self._models.resolve(model)
        engine = entry.engine
        text, _ = await self._texts.of(entry)
        return ServedModel(entry, engine, text)

    def _check_number(self, number: int, param: str) -> None:
        limit = self._settings.max_inputs
        if number > limit:
            raise InvalidRequest(f"{param} has {number} entries, and this server takes {limit} (max_inputs).", param)


def _instruction(text: ModelText, name: str | None) -> str:
    """What goes before each text.

    Raises:
        InvalidRequest: the model has none of this name.
    """
    known = text.instructions
    chosen = known.default if name is None else name
    if chosen is None:
        return ""
    if chosen not in known.prompts:
        names = ", ".join(known.prompts) or "none"
        raise InvalidRequest(f"prompt_name: the model has no prompt {chosen[:64]!r}. It has: {names}.", "prompt_name")
    return known.prompts[chosen]


def _encode_texts(
    request_id: str,
    served: ServedModel,
    inputs: Sequence[str | list[int]],
    instruction: str,
    options: EncodingOptions,
) -> EncodingRequest:
    info = served.engine.info
    is_text = bool(inputs) and isinstance(inputs[0], str)
    if not is_text and options.prompt_name is not None:
        raise InvalidRequest("prompt_name needs texts: token ids are taken as they are.", "prompt_name")
    params = [f"input[{i}]" if len(inputs) > 1 else "input" for i in range(len(inputs))]
    texts: list[str] | None = None
    num_instruction_tokens = 0
    if is_text:
        for text, param in zip(inputs, params, strict=True):
            if not text:
                raise InvalidRequest(f"{param} must not be empty.", param)
        texts = [instruction + str(text) for text in inputs]
        rows = served.text.encode_inputs(texts)
        if instruction:
            num_instruction_tokens = len(served.text.encode_inputs([instruction])[0]) - served.text.num_final_tokens()
    else:
        rows = [list(each) for each in inputs if not isinstance(each, str)]
        for token_ids, param in zip(rows, params, strict=True):
            if not token_ids:
                raise InvalidRequest(f"{param} must not be empty.", param)
            check_token_ids(token_ids, info.vocab_size, param)
    encoded = []
    for token_ids, param in zip(rows, params, strict=True):
        cut = _cut(EncodedPair(token_ids, [], 0), served, options.cut_to, param)
        encoded.append(EncoderInput(cut.token_ids, [], num_instruction_tokens))
    return EncodingRequest(request_id, served, texts, encoded, options.dimensions)


def _encode_pairs(
    request_id: str,
    served: ServedModel,
    pairs: Sequence[tuple[str, str]],
    params: Sequence[str],
    cut_to: int | None,
) -> EncodingRequest:
    encoded = []
    for pair, param in zip(served.text.encode_pairs(pairs), params, strict=True):
        cut = _cut(pair, served, cut_to, param)
        encoded.append(EncoderInput(cut.token_ids, cut.token_type_ids))
    return EncodingRequest(request_id, served, ["\n".join(pair) for pair in pairs], encoded)


def _cut(pair: EncodedPair, served: ServedModel, cut_to: int | None, param: str) -> EncodedPair:
    """The input, cut at the end of its (second) text if that is allowed and needed.

    Raises:
        InputTooLong: it is needed and not allowed.
        InvalidRequest: nothing would be left of the text.
    """
    limit = _limit(served.engine.info, cut_to)
    num_tokens = len(pair.token_ids)
    if num_tokens <= limit:
        return pair
    if cut_to is None:
        raise InputTooLong(limit=limit, num_tokens=num_tokens, param=param)
    num_final = served.text.num_final_tokens()
    least = max(1, pair.begin) + 1 + num_final
    if limit < least:
        raise InvalidRequest(
            f"{param} cannot be cut to {limit} tokens: nothing of it would be left, {least} are needed.", param
        )
    token_ids, types = (_without_middle(x, limit, num_final) for x in (pair.token_ids, pair.token_type_ids))
    return EncodedPair(token_ids, types, pair.begin)


def _limit(info: RunnerInfo, cut_to: int | None) -> int:
    return info.max_model_len if cut_to is None or cut_to == WHOLE else min(cut_to, info.max_model_len)


def _without_middle(items: list[int], length: int, num_final: int) -> list[int]:
    return items[: length - num_final] + items[len(items) - num_final :] if items else items
