"""The fields that chat and completions share, as they stand on the wire."""

from __future__ import annotations

from typing import Any

import msgspec

from lmserve.api.schema.numbers import Int, integer
from lmserve.errors import InvalidRequest
from lmserve.service.request import GenerationOptions

MAX_PRIORITY = 2**31 - 1


class SamplingFields(msgspec.Struct, kw_only=True):
    """Sampling parameters. null is the same as absent, for every one."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    seed: Int = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int | float] | None = None
    max_tokens: Int = None
    max_completion_tokens: Int = None
    min_tokens: Int = None
    ignore_eos: bool | None = None
    n: Int = None
    priority: Int = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage.

        Raises:
            InvalidRequest: it is no boolean, or there is no stream.
        """
        include = (self.stream_options or {}).get("include_usage")
        if include is not None and not isinstance(include, bool):
            raise InvalidRequest("stream_options.include_usage must be a boolean.", "stream_options.include_usage")
        if include and not self.stream:
            raise InvalidRequest("stream_options is for streams only; set stream to true.", "stream_options")
        return bool(include)

    def ignored(self) -> list[str]:
        """Paths of nested keys that nobody reads."""
        options = self.stream_options or {}
        return [
            f"stream_options.{key}" for key, value in options.items() if key != "include_usage" and value is not None
        ]

    def names(self) -> dict[str, str]:
        """Our name of a parameter -> the client's, where it wrote another."""
        names = {}
        if self.max_tokens is None and self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        if self.repeat_penalty is None and self.repetition_penalty is not None:
            names["repeat_penalty"] = "repetition_penalty"
        return names

    def options(self, logprobs: int | None) -> GenerationOptions:
        """As the service wants them.

        Raises:
            InvalidRequest: an integer that is none, or two names of one parameter with different values.
        """
        penalty = _same("repeat_penalty", self.repeat_penalty, "repetition_penalty", self.repetition_penalty)
        return GenerationOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=integer(self.top_k, "top_k"),
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_logit_bias(self.logit_bias or {}),
            seed=integer(self.seed, "seed"),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=_token_ids(self.stop_token_ids or [], "stop_token_ids"),
            max_tokens=self._max_tokens(),
            min_tokens=integer(self.min_tokens, "min_tokens"),
            ignore_eos=self.ignore_eos,
            n=integer(self.n, "n"),
            logprobs=logprobs,
            priority=integer(self.priority, "priority", -MAX_PRIORITY, MAX_PRIORITY),
        )

    def _max_tokens(self) -> int | None:
        max_tokens = integer(self.max_tokens, "max_tokens")
        max_completion_tokens = integer(self.max_completion_tokens, "max_completion_tokens")
        asked = _same("max_tokens", max_tokens, "max_completion_tokens", max_completion_tokens)
        return None if asked is None else int(asked)


def _same(name: str, value: float | None, alias: str, alias_value: float | None) -> float | None:
    if value is not None and alias_value is not None and value != alias_value:
        raise InvalidRequest(f"{name} and {alias} are the same parameter and were given different values.", alias)
    return alias_value if value is None else value


def _logit_bias(biases: dict[str, Any]) -> dict[int, float]:
    result = {}
    for key, bias in biases.items():
        path = f"logit_bias.{key}"
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise InvalidRequest(f"logit_bias: {key[:32]!r} is no token id.", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise InvalidRequest(f"{path} must be a number.", path)
        if not -100 <= bias <= 100:
            raise InvalidRequest(f"{path} must be in [-100, 100], got {bias}.", path)
        result[int(key)] = float(bias)
    return result


def _token_ids(values: list[int | float], param: str) -> tuple[int, ...]:
    ids = (integer(value, f"{param}[{i}]") for i, value in enumerate(values))
    return tuple(token_id for token_id in ids if token_id is not None)
