"""What one request asks of sampling. Standard library only: the word is shared by every room."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lmserve.errors import InvalidRequest

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 4096
MAX_STOP_TOKEN_IDS = 256


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a parameter may be."""

    low: float
    high: float
    low_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.low_open else self.low <= value
        return math.isfinite(value) and above and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.low_open else '['}{self.low}, {self.high}]"


RANGES: Mapping[str, Range] = MappingProxyType(
    {
        "temperature": Range(0, 2),
        "top_p": Range(0, 1, low_open=True),
        "min_p": Range(0, 1),
        "typical_p": Range(0, 1, low_open=True),
        "repeat_penalty": Range(0, 10, low_open=True),
        "presence_penalty": Range(-2, 2),
        "frequency_penalty": Range(-2, 2),
        "logit_bias": Range(-100, 100),
        "top_k": Range(0, 2**31 - 1),
        "n": Range(1, MAX_CHOICES),
        "max_tokens": Range(0, 2**31 - 1),
        "seed": Range(-(2**63), 2**63 - 1),
        "top_logprobs": Range(0, MAX_LOGPROBS),
    }
)
"""By the parameters' names on the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, checked when made.

    ``seed`` and ``max_tokens`` are concrete: whoever makes the object draws a seed and works out the room that the
    context leaves, so that the engine never has to.

    Raises:
        InvalidRequest: a value is out of range; ``param`` names the field.
    """

    max_tokens: int
    """New tokens at most, at least 0."""
    seed: int = 0
    """Any 64-bit integer. A sampled token depends on the logits and on (seed, choice, position) alone."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    """Over prompt and output, as transformers defines it; 1 is off."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Both over generated tokens, OpenAI's definition."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    n: int = 1
    """Choices that share the prompt."""
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    """None: no log-probabilities. k >= 0: that of each sampled token and of the k likeliest ones."""
    prompt_logprobs: int | None = None
    """The same of each token of the prompt but the first, which nothing predicts. Choice 0 reports them for all."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "top_k"):
            _in_range(name, getattr(self, name))
        for name in ("n", "max_tokens", "seed"):
            _in_range(name, getattr(self, name))
        _in_range("repeat_penalty", self.repetition_penalty)
        _in_range("min_tokens", self.min_tokens, Range(0, self.max_tokens))
        if self.logprobs is not None:
            _in_range("top_logprobs", self.logprobs)
        if self.prompt_logprobs is not None:
            _in_range("logprobs", self.prompt_logprobs, RANGES["top_logprobs"])
        at_most("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for _, bias in self.logit_bias:
            _in_range("logit_bias", bias)
        at_most("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def _in_range(param: str, value: float, allowed: Range | None = None) -> None:
    allowed = allowed or RANGES[param]
    if value not in allowed:
        raise InvalidRequest(f"{param} must be in {allowed}, got {value}.", param)


def at_most(param: str, count: int, limit: int) -> None:
    """Raises InvalidRequest for more than ``limit`` entries."""
    if count > limit:
        raise InvalidRequest(f"{param} may have at most {limit} entries, got {count}.", param)
