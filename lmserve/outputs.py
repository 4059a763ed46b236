"""What the engine says about a request, step by step. Standard library only: shared by engine and service."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class FinishReason(str, Enum):
    """Why a request ended."""

    STOP = "stop"
    """End of sequence, a stop token, or (decided in service) a stop string."""
    LENGTH = "length"
    """``max_tokens`` or the context limit."""
    ABORT = "abort"
    """The client went away, or service asked for it."""
    ERROR = "error"
    """The step that held it failed; ``RequestOutput.error`` says how."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the distribution as the model gave it (before any sampling parameter)."""

    logprob: float
    """That of the sampled token, or of the prompt's token."""
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability) of the likeliest tokens, best first; as many as asked for."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """News of one choice of one request, after one step."""

    request_id: str
    choice: int
    token_ids: tuple[int, ...] = ()
    """The new tokens only. An end-of-sequence or stop token that ended the choice is the last of them."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """As many as ``token_ids`` if asked for, else empty."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache (the same number in every output of a choice)."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    may_retry: bool = True
    """After an error: whether the same request may fare better when it is sent again."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """If asked for, of the prompt's tokens from the second on: those that this step computed, each reported once, in
    order. Choice 0 alone has them."""


@dataclass(frozen=True, slots=True)
class EncoderOutput:
    """News of one request to an encoder, after one step: some of its inputs are done, or it has failed."""

    request_id: str
    indices: tuple[int, ...] = ()
    """The inputs that are done, by their place in the request. Each is reported once, in any order."""
    rows: bytes = b""
    """As many rows of float32 (little-endian): each an embedding, or the logits of a pair."""
    error: str | None = None
    """Nothing more comes after it."""
