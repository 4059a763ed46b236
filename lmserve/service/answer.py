"""A whole answer, folded from the same deltas that a stream sends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from lmserve.service.deltas import Delta, Finished, PositionLogprobs, TextDelta, Usage


@dataclass(slots=True)
class ChoiceAnswer:
    """One choice, complete."""

    text: str = ""
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finished: Finished | None = None


@dataclass(slots=True)
class Answer:
    """All choices in order, and what they took."""

    choices: list[ChoiceAnswer]
    usage: Usage


async def collect(deltas: AsyncIterator[Delta], num_choices: int) -> Answer:
    """Wait for everything."""
    texts: list[list[str]] = [[] for _ in range(num_choices)]
    answer = Answer([ChoiceAnswer() for _ in range(num_choices)], Usage(0, 0, 0))
    async for delta in deltas:
        match delta:
            case TextDelta(choice, text, logprobs):
                texts[choice].append(text)
                answer.choices[choice].logprobs.extend(logprobs)
            case Finished(choice):
                answer.choices[choice].finished = delta
            case Usage():
                answer.usage = delta
    for choice_answer, pieces in zip(answer.choices, texts, strict=True):
        choice_answer.text = "".join(pieces)
    return answer
