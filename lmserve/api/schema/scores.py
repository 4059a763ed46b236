"""``POST /v1/rerank`` and ``/v1/score``: the bodies and the answers, in the shapes of Jina's and vLLM's APIs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from lmserve.api.schema.embeddings import CUT, EmbeddingUsage
from lmserve.api.schema.fields import honoured, ignored
from lmserve.api.schema.lifetime import ModelLifetime
from lmserve.api.schema.numbers import Int, integer
from lmserve.errors import InvalidRequest


class Document(msgspec.Struct, frozen=True):
    text: str


_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}


class RerankRequest(ModelLifetime, kw_only=True):
    """The body of ``/v1/rerank``."""

    query: Annotated[str, honoured("what the documents are compared with")]
    documents: Annotated[
        list[str | Document],
        honoured(
            "what to put in order",
            kind="array of strings or of objects with text",
            schema={"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}, "minItems": 1},
        ),
    ]
    model: Annotated[str | None, honoured("a cross-encoder's id")] = None
    top_n: Annotated[Int, honoured("report the best only", default="all", allowed="at least 1")] = None
    return_documents: Annotated[bool | None, honoured("with the documents' texts", default="true")] = None
    truncate_prompt_tokens: Annotated[Int, CUT] = None
    user: Annotated[Any, ignored("string", "it changes no answer")] = None

    def texts(self) -> list[str]:
        """The documents'. Raises InvalidRequest if there are none."""
        if not self.documents:
            raise InvalidRequest("documents must not be an empty array.", "documents")
        return [each if isinstance(each, str) else each.text for each in self.documents]

    def num_best(self) -> int:
        """How many to report. Raises InvalidRequest if it is no number."""
        number = integer(self.top_n, "top_n")
        if number is not None and number < 1:
            raise InvalidRequest(f"top_n must be at least 1, got {number}.", "top_n")
        return len(self.documents) if number is None else min(number, len(self.documents))


class RerankResult(msgspec.Struct, frozen=True, omit_defaults=True):
    index: int
    """The document's place in the request."""
    relevance_score: float
    document: Document | None = None


class RerankAnswer(msgspec.Struct, frozen=True):
    """The answer of ``/v1/rerank``: best first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: EmbeddingUsage


class ScoreRequest(ModelLifetime, kw_only=True):
    """The body of ``/v1/score``."""

    text_1: Annotated[
        str | list[str], honoured("the first texts of the pairs", kind="string or array of strings", schema=_TEXTS)
    ]
    text_2: Annotated[
        str | list[str],
        honoured(
            "the second texts of the pairs: as many, or one of the two is one text for all",
            kind="string or array of strings",
            schema=_TEXTS,
        ),
    ]
    model: Annotated[str | None, honoured("a cross-encoder's id")] = None
    truncate_prompt_tokens: Annotated[Int, CUT] = None
    user: Annotated[Any, ignored("string", "it changes no answer")] = None

    def pairs(self) -> tuple[list[tuple[str, str]], list[str]]:
        """The pairs, and what each is called in an error. Raises InvalidRequest if the numbers do not go together."""
        first, second = ([each] if isinstance(each, str) else each for each in (self.text_1, self.text_2))
        for texts, name in ((first, "text_1"), (second, "text_2")):
            if not texts:
                raise InvalidRequest(f"{name} must not be an empty array.", name)
        if 1 not in (len(first), len(second)) and len(first) != len(second):
            raise InvalidRequest(
                f"text_1 has {len(first)} entries and text_2 {len(second)}: as many, or one of them one text.", "text_2"
            )
        name = "text_2" if len(second) > 1 else "text_1"
        count = max(len(first), len(second))
        if len(first) < count:
            first = first * count
        if len(second) < count:
            second = second * count
        return list(zip(first, second, strict=True)), [f"{name}[{i}]" for i in range(count)]


class Score(msgspec.Struct, frozen=True):
    index: int
    object: Literal["score"]
    score: float


class ScoreAnswer(msgspec.Struct, frozen=True):
    """The answer of ``/v1/score``."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: EmbeddingUsage
