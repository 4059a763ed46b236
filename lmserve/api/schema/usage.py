"""Token counts in OpenAI's shape."""

from __future__ import annotations

import msgspec

from lmserve.service.deltas import Usage


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class UsageAnswer(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, usage: Usage) -> UsageAnswer:
        return cls(
            prompt_tokens=usage.num_prompt_tokens,
            completion_tokens=usage.num_completion_tokens,
            total_tokens=usage.num_prompt_tokens + usage.num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(usage.num_cached_tokens),
            completion_tokens_details=CompletionTokensDetails(usage.num_reasoning_tokens),
        )
