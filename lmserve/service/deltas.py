"""What the service says about a request: pieces of text, ends, and at last the usage."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum

from lmserve.outputs import FinishReason, TokenLogprobs
from lmserve.service.token_table import TokenTable


class StopReason(str, Enum):
    """Why a choice ended, in LM Studio's words; finer than ``FinishReason``."""

    EOS_FOUND = "eosFound"
    STOP_STRING_FOUND = "stopStringFound"
    MAX_PREDICTED_TOKENS_REACHED = "maxPredictedTokensReached"
    CONTEXT_LENGTH_REACHED = "contextLengthReached"
    USER_STOPPED = "userStopped"
    MODEL_UNLOADED = "modelUnloaded"
    FAILED = "failed"
    TOOL_CALLS = "toolCalls"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability."""

    token_id: int
    bytes: bytes
    logprob: float

    @property
    def text(self) -> str:
        """Lone bytes of a longer character show as U+FFFD."""
        return self.bytes.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The sampled token (in an echo the prompt's), and the likeliest ones, best first."""

    sampled: TokenLogprob
    top: tuple[TokenLogprob, ...]
    text_offset: int
    """Where the token's text begins in the choice's text, the echo included, in characters."""
    is_unpredicted: bool = False
    """The first token of an echo. Nothing comes before it, so it has no log-probability: ``sampled.logprob`` is 0, the
    logarithm of certainty, and ``top`` is empty."""

    @classmethod
    def of(cls, token_id: int, logprobs: TokenLogprobs, table: TokenTable, text_offset: int) -> PositionLogprobs:
        """The engine's log-probabilities with the bytes of their tokens."""
        return cls(
            TokenLogprob(token_id, table.piece(token_id), logprobs.logprob),
            tuple(TokenLogprob(top_id, table.piece(top_id), logprob) for top_id, logprob in logprobs.top),
            text_offset,
        )

    def at(self, text_offset: int) -> PositionLogprobs:
        """The same at another place."""
        return self if text_offset == self.text_offset else replace(self, text_offset=text_offset)

    @classmethod
    def unpredicted(cls, token_id: int, table: TokenTable, text_offset: int) -> PositionLogprobs:
        """The first token of an echo."""
        return cls(TokenLogprob(token_id, table.piece(token_id), 0.0), (), text_offset, is_unpredicted=True)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of one choice. Empty text comes only with log-probabilities.

    Where the prompt is echoed, it is the whole of each choice's first delta, and no other delta comes before it.
    """

    choice: int
    text: str
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks in one choice."""

    choice: int
    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A tool call of one choice begins, or goes on."""

    choice: int
    index: int
    """Of the choice's calls: 0, 1, …"""
    id: str | None
    """With ``name``, in the call's first delta only."""
    name: str | None
    arguments: str
    """More of the arguments, as JSON text; empty in the first delta."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one choice."""

    choice: int
    reason: FinishReason
    """``STOP`` or ``LENGTH``: everything else is an exception."""
    stop_reason: StopReason
    calls_tools: bool = False

    @property
    def finish_reason(self) -> str:
        """OpenAI's word. An answer whose calls were cut off says so."""
        return "tool_calls" if self.calls_tools and self.reason is FinishReason.STOP else self.reason.value


@dataclass(frozen=True, slots=True)
class Usage:
    """What a whole request took, in tokens and seconds: the last delta of a stream."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    """Of the prompts, how many tokens the prefix cache had."""
    num_reasoning_tokens: int = 0
    """Of the completions."""
    time_to_first_token: float = field(default=math.inf, compare=False)
    """Seconds; infinite if there was none."""
    generation_time: float = field(default=0.0, compare=False)
    """Seconds from the first token to the last."""

    def __add__(self, other: Usage) -> Usage:
        """Of prompts that ran side by side."""
        return Usage(
            self.num_prompt_tokens + other.num_prompt_tokens,
            self.num_completion_tokens + other.num_completion_tokens,
            self.num_cached_tokens + other.num_cached_tokens,
            self.num_reasoning_tokens + other.num_reasoning_tokens,
            min(self.time_to_first_token, other.time_to_first_token),
            max(self.generation_time, other.generation_time),
        )


ChoiceDelta = TextDelta | ReasoningDelta | CallDelta | Finished
Delta = ChoiceDelta | Usage
