"""A whole answer, folded from the same deltas that a stream sends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from lmserve.service.deltas import CallDelta, Delta, Finished, PositionLogprobs, ReasoningDelta, TextDelta, Usage


@dataclass(slots=True)
class CallAnswer:
    """One tool call, complete."""

    id: str
    name: str
    arguments: str
    """JSON text."""


@dataclass(slots=True)
class ChoiceAnswer:
    """One choice, complete."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallAnswer] = field(default_factory=list)
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
    thoughts: list[list[str]] = [[] for _ in range(num_choices)]
    answer = Answer([ChoiceAnswer() for _ in range(num_choices)], Usage(0, 0, 0))
    async for delta in deltas:
        match delta:
            case TextDelta(choice, text, logprobs):
                texts[choice].append(text)
                answer.choices[choice].logprobs.extend(logprobs)
            case ReasoningDelta(choice, text):
                thoughts[choice].append(text)
            case CallDelta(choice, _, str(call_id), str(name), arguments):
                answer.choices[choice].calls.append(CallAnswer(call_id, name, arguments))
            case CallDelta(choice, index, _, _, arguments):
                answer.choices[choice].calls[index].arguments += arguments
            case Finished(choice):
                answer.choices[choice].finished = delta
            case Usage():
                answer.usage = delta
    for choice_answer, pieces, thought in zip(answer.choices, texts, thoughts, strict=True):
        choice_answer.text, choice_answer.reasoning = "".join(pieces), "".join(thought)
    return answer
