"""``POST /v1/embeddings``: the body."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from lmserve.api.schema.completions import PROMPT
from lmserve.api.schema.fields import honoured, ignored
from lmserve.api.schema.numbers import Int


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """The body."""

    input: Annotated[
        str | list[str | int | list[int]],
        honoured(
            "what to embed", kind="string, array of strings, array of token ids, or array of such arrays", schema=PROMPT
        ),
    ]
    model: Annotated[str | None, honoured("an embedding model's id")] = None
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        honoured("how vectors are written", kind="string", default="float", allowed="float or base64"),
    ] = None
    dimensions: Annotated[Int, honoured("cut the vectors, and normalise again")] = None
    user: Annotated[Any, ignored("string", "it changes no answer")] = None
