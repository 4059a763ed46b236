"""Prompts of a wanted number of tokens, for any server: how many words that takes is found out by asking it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import httpx

from lmserve.cli.bench.load import LoadFailed, Messages, Target

WORDS = (
    *("river", "stone", "window", "garden", "letter", "silver", "morning", "engine", "market", "shadow", "bridge"),
    *("winter", "paper", "candle", "forest", "ocean", "ladder", "mirror", "planet", "basket", "thunder", "pocket"),
)
PROBES = (16, 128)


def words(count: int, seed: str) -> str:
    """``count`` words, the first of which is nobody else's: the same for the same seed."""
    return " ".join([seed, *random.Random(seed).choices(WORDS, k=max(0, count - 1))])


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Tokens as a straight line over words, template and all."""

    base: float
    per_word: float

    @classmethod
    def ask(cls, target: Target) -> PromptMaker:
        """Two probes of one token. Raises LoadFailed."""
        few, many = (count_tokens(target, words(count, f"probe{count}")) for count in PROBES)
        per_word = max(0.1, (many - few) / (PROBES[1] - PROBES[0]))
        return cls(few - per_word * PROBES[0], per_word)

    def user(self, num_tokens: int, seed: str) -> Messages:
        """One message that takes about ``num_tokens``, the template's included; different from the first word on."""
        return [{"role": "user", "content": words(round((num_tokens - self.base) / self.per_word), seed)}]

    def shared(self, shared_tokens: int, num_tokens: int, seed: str) -> Messages:
        """A system prompt that is the same for all seeds, and a message of one's own."""
        system = words(round(shared_tokens / self.per_word), "shared")
        return [{"role": "system", "content": system}, *self.user(num_tokens, seed)]


def accepted(target: Target, say: Callable[[str], None]) -> Target:
    """The target, without the fields that go beyond OpenAI's if it refuses them. Raises LoadFailed."""
    try:
        count_tokens(target, "hello")
    except LoadFailed as error:
        plain = replace(target, extra_body={})
        count_tokens(plain, "hello")
        say(f"fields beyond OpenAI's are left out, so answers may end early: {error}")
        return plain
    return target


def count_tokens(target: Target, text: str) -> int:
    """As the server counts a chat of one message. Raises LoadFailed."""
    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    body: dict[str, Any] = {
        "model": target.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 1,
        "temperature": 0,
    }
    body.update(target.extra_body)
    try:
        answer = httpx.post(
            f"{target.base_url}/v1/chat/completions", json=body, headers=headers, timeout=300.0, trust_env=False
        )
    except httpx.HTTPError as error:
        raise LoadFailed(f"{target.base_url} does not answer: {error}") from error
    if answer.status_code != httpx.codes.OK:
        raise LoadFailed(f"a request was refused with {answer.status_code}: {answer.text[:500]}")
    count: int = answer.json()["usage"]["prompt_tokens"]
    return count
