"""``POST /v1/completions``: the body, the answer, the chunks of a stream (which have the answer's shape)."""

from __future__ import annotations

from typing import Literal

import msgspec

from lmserve.api.schema.numbers import Int, integer
from lmserve.api.schema.sampling import SamplingFields
from lmserve.api.schema.usage import UsageAnswer
from lmserve.errors import InvalidRequest, UnsupportedField


class CompletionRequest(SamplingFields, kw_only=True):
    """The body."""

    prompt: str | list[str | int | list[int]]
    logprobs: Int = None
    best_of: Int = None

    def prompts(self) -> list[str | list[int]]:
        """One or many texts or token sequences.

        Raises:
            InvalidRequest: the prompt mixes kinds, or is empty.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise InvalidRequest("prompt must not be an empty array.", "prompt")
        kind = type(prompt[0])
        for i, item in enumerate(prompt):
            if type(item) is not kind:
                raise InvalidRequest("prompt must hold strings, token ids or arrays of token ids only.", f"prompt[{i}]")
        if kind is int:
            return [[item for item in prompt if isinstance(item, int)]]
        return [item for item in prompt if not isinstance(item, int)]

    def num_logprobs(self) -> int | None:
        """How many likeliest tokens to report at each position; None: no log-probabilities.

        Raises:
            UnsupportedField: ``best_of`` asks for more than ``n``.
        """
        best_of = integer(self.best_of, "best_of")
        if best_of is not None and best_of != (self.n or 1):
            raise UnsupportedField("best_of other than n is not offered.", "best_of")
        return integer(self.logprobs, "logprobs")

    def names(self) -> dict[str, str]:
        return {**super().names(), "top_logprobs": "logprobs"}


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """OpenAI's older shape: parallel lists."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct, frozen=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: UsageAnswer | None | msgspec.UnsetType = msgspec.UNSET
