"""``POST /v1/completions``: the body, the answer, the chunks of a stream (which have the answer's shape)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

import msgspec

from lmserve.api.schema.fields import honoured, refused
from lmserve.api.schema.numbers import Int, integer
from lmserve.api.schema.sampling import FROM_MINUS_ONE, SamplingFields
from lmserve.api.schema.stats import WithStats
from lmserve.api.schema.usage import UsageAnswer
from lmserve.errors import InvalidRequest, UnsupportedField
from lmserve.sampling_params import RANGES

PROMPT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "minItems": 1}, "minItems": 1},
    ]
}
"""The four shapes of a prompt, in JSON Schema."""


def one_or_many(value: str | list[str | int | list[int]], param: str) -> list[str | list[int]]:
    """The texts or token sequences in any of the four shapes.

    Raises:
        InvalidRequest: it mixes kinds, or is empty.
    """
    if isinstance(value, str):
        return [value]
    if not value:
        raise InvalidRequest(f"{param} must not be an empty array.", param)
    kind, *others = set(map(type, value))
    if others:
        i = next(i for i, item in enumerate(value) if type(item) is not type(value[0]))
        raise InvalidRequest(f"{param} must hold strings, token ids or arrays of token ids only.", f"{param}[{i}]")
    if kind is int:
        return [cast(list[int], value)]
    return cast(list[str | list[int]], value)


class CompletionRequest(SamplingFields, kw_only=True):
    """The body."""

    prompt: Annotated[
        str | list[str | int | list[int]],
        honoured(
            "what to continue; no template is applied",
            kind="string, array of strings, array of token ids, or array of such arrays",
            schema=PROMPT,
        ),
    ]
    max_tokens: Annotated[
        Int,
        honoured(
            "new tokens at most",
            default="16",
            allowed="at least 1, with echo at least 0; -1: what the context leaves",
            schema=FROM_MINUS_ONE,
        ),
    ] = None
    logprobs: Annotated[
        Int,
        honoured(
            "report log-probabilities, and this many of the likeliest tokens at each position",
            default="none",
            allowed=RANGES["top_logprobs"],
        ),
    ] = None
    best_of: Annotated[Int, honoured("only as many as n", default="n", allowed="n")] = None
    echo: Annotated[bool | None, honoured("begin each choice with the prompt", default="false")] = None
    suffix: Annotated[Any, refused("string", "fill-in-the-middle is not offered yet", "")] = None

    def prompts(self) -> list[str | list[int]]:
        """One or many texts or token sequences.

        Raises:
            InvalidRequest: the prompt mixes kinds, or is empty.
        """
        return one_or_many(self.prompt, "prompt")

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
    token_logprobs: list[float | None]
    """null only for the first token of an echo, which nothing predicts."""
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(WithStats, frozen=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: UsageAnswer | None | msgspec.UnsetType = msgspec.UNSET
