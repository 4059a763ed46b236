"""``POST /v1/embeddings``: the body and the answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from lmserve.api.schema.completions import PROMPT, one_or_many
from lmserve.api.schema.fields import honoured, ignored
from lmserve.api.schema.lifetime import ModelLifetime
from lmserve.api.schema.numbers import Int, integer
from lmserve.errors import InvalidRequest
from lmserve.service.encoding import WHOLE, EncodingOptions

CUT = honoured(
    "cut longer inputs to so many tokens",
    default="they are refused",
    allowed="at least 1; -1: what the model takes",
    schema={"type": ["integer", "null"], "minimum": -1},
)


class EmbeddingRequest(ModelLifetime, kw_only=True):
    """The body."""

    input: Annotated[
        str | list[str | int | list[int]],
        honoured(
            "what to embed; token ids are taken as they are",
            kind="string, array of strings, array of token ids, or array of such arrays",
            schema=PROMPT,
        ),
    ]
    model: Annotated[str | None, honoured("an embedding model's id")] = None
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        honoured("how vectors are written", kind="string", default="float", allowed="float or base64"),
    ] = None
    dimensions: Annotated[
        Int, honoured("cut the vectors to so many, and scale them to length 1", allowed="1 to the model's size")
    ] = None
    prompt_name: Annotated[
        str | None,
        honoured("the model's instruction that goes before each text (query, document, …)", default="the model's own"),
    ] = None
    truncate_prompt_tokens: Annotated[Int, CUT] = None
    user: Annotated[Any, ignored("string", "it changes no answer")] = None

    def inputs(self) -> list[str | list[int]]:
        """One or many texts or token sequences. Raises InvalidRequest if it mixes kinds, or is empty."""
        return one_or_many(self.input, "input")

    def options(self) -> EncodingOptions:
        """As the service wants them. Raises InvalidRequest for an integer that is none, or is out of range."""
        dimensions = integer(self.dimensions, "dimensions")
        return EncodingOptions(
            dimensions=dimensions, prompt_name=self.prompt_name, cut_to=cut_to(self.truncate_prompt_tokens)
        )


def cut_to(value: float | None) -> int | None:
    """``truncate_prompt_tokens`` as the service wants it. Raises InvalidRequest if it is none."""
    number = integer(value, "truncate_prompt_tokens")
    if number is not None and number != WHOLE and number < 1:
        raise InvalidRequest("truncate_prompt_tokens must be at least 1, or -1.", "truncate_prompt_tokens")
    return number


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, frozen=True):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """base64 of float32, little-endian, if that was asked for."""


class EmbeddingList(msgspec.Struct, frozen=True):
    """The answer."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
