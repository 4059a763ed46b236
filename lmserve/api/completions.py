"""``POST /v1/completions``: how a continuation is asked for and answered. No template, ever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from lmserve.api.generate import Dialect, Renderer, clamp_logprob
from lmserve.api.schema.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from lmserve.api.schema.usage import UsageAnswer
from lmserve.service.answer import ChoiceAnswer
from lmserve.service.deltas import CallDelta, Finished, PositionLogprobs, ReasoningDelta, TextDelta, TokenLogprob
from lmserve.service.generation import GenerationService
from lmserve.service.request import GenerationRequest


async def _prepare(
    service: GenerationService, request_id: str, model_id: str, body: CompletionRequest
) -> GenerationRequest:
    options = replace(body.options(body.num_logprobs()), echo=bool(body.echo))
    return await service.prepare_completion(request_id, model_id, body.prompts(), options)


class CompletionRenderer(Renderer[CompletionChoice]):
    """OpenAI's older shapes: each choice ends with an empty text."""

    def beginnings(self) -> list[CompletionChoice]:
        return []

    def piece(self, delta: TextDelta | ReasoningDelta | CallDelta) -> CompletionChoice:
        assert isinstance(delta, TextDelta), "a completion is text"
        return CompletionChoice(delta.choice, delta.text, _logprobs(delta.logprobs) if delta.logprobs else None)

    def end(self, finished: Finished) -> CompletionChoice:
        return CompletionChoice(finished.choice, "", None, finished.finish_reason)

    def chunk(self, choices: list[CompletionChoice], usage: UsageAnswer | None | msgspec.UnsetType) -> Completion:
        o = self.outline
        return Completion(o.id, "text_completion", o.created, o.model, choices, o.system_fingerprint, usage)

    def choice(self, index: int, answer: ChoiceAnswer, finish_reason: str) -> CompletionChoice:
        logprobs = _logprobs(answer.logprobs) if self.outline.with_logprobs else None
        return CompletionChoice(index, answer.text, logprobs, finish_reason)

    def answer(self, choices: list[CompletionChoice], usage: UsageAnswer) -> Completion:
        return self.chunk(choices, usage)


COMPLETION = Dialect(CompletionRequest, "cmpl", _prepare, CompletionRenderer)


def _logprobs(positions: Sequence[PositionLogprobs]) -> CompletionLogprobs:
    return CompletionLogprobs(
        text_offset=[position.text_offset for position in positions],
        token_logprobs=[None if p.is_unpredicted else clamp_logprob(p.sampled.logprob) for p in positions],
        tokens=[_name(position.sampled) for position in positions],
        top_logprobs=[None if position.is_unpredicted else _top(position) for position in positions],
    )


def _top(position: PositionLogprobs) -> dict[str, float]:
    """The likeliest tokens and the sampled one; of tokens that look the same, the likelier."""
    top: dict[str, float] = {}
    for token in (*position.top, position.sampled):
        top.setdefault(_name(token), clamp_logprob(token.logprob))
    return top


def _name(token: TokenLogprob) -> str:
    """The token's text or, where it is no text by itself, its bytes as OpenAI writes them."""
    try:
        return token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
