"""The fields that chat and completions share, as they stand on the wire."""

from __future__ import annotations

from typing import Annotated, Any

from lmserve.api.schema.fields import honoured, ignored, refused
from lmserve.api.schema.lifetime import ModelLifetime, same
from lmserve.api.schema.numbers import Int, integer
from lmserve.api.schema.output import FORMAT_TYPES, output_format
from lmserve.errors import InvalidRequest
from lmserve.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, RANGES, at_most
from lmserve.service.request import GenerationOptions

MAX_PRIORITY = 2**31 - 1
MODEL = honoured("the model's id, a unique end of it, or an alias", default="the one that is loaded")
"""Every body's field ``model``."""
_MODELS_ELSE_ONE = "the model's, else 1"
FROM_MINUS_ONE = {"type": ["integer", "null"], "minimum": -1}
_ELSEWHERE = "response_format takes a schema"
ANY: dict[str, Any] = {}
RESPONSE_FORMAT = {
    "anyOf": [
        {"type": "null"},
        {
            "type": "object",
            "properties": {
                "type": {"enum": list(FORMAT_TYPES)},
                "json_schema": {
                    "type": ["object", "null"],
                    "properties": {"name": {"type": ["string", "null"]}, "schema": {}, "strict": {}},
                },
            },
            "required": ["type"],
        },
    ]
}


class SamplingFields(ModelLifetime, kw_only=True):
    """What chat and completions have in common. null is the same as absent, for every one."""

    model: Annotated[str | None, MODEL] = None
    temperature: Annotated[
        float | None,
        honoured(
            "0 is greedy; 1 samples from the model's own distribution",
            default=_MODELS_ELSE_ONE,
            allowed=RANGES["temperature"],
        ),
    ] = None
    top_p: Annotated[
        float | None,
        honoured("keep the likeliest tokens up to this share", default=_MODELS_ELSE_ONE, allowed=RANGES["top_p"]),
    ] = None
    top_k: Annotated[
        Int,
        honoured(
            "keep this many of the likeliest tokens",
            default="the model's, else off",
            allowed="at least 0; 0 or -1: off",
            schema=FROM_MINUS_ONE,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        honoured(
            "keep tokens at least this likely, relative to the likeliest",
            default="the model's, else 0",
            allowed=RANGES["min_p"],
        ),
    ] = None
    typical_p: Annotated[
        float | None,
        honoured(
            "keep the most typical tokens up to this share", default=_MODELS_ELSE_ONE, allowed=RANGES["typical_p"]
        ),
    ] = None
    repeat_penalty: Annotated[
        float | None,
        honoured(
            "divides the logits of tokens in prompt and output, as transformers defines it; 1: off",
            default=_MODELS_ELSE_ONE,
            allowed=RANGES["repeat_penalty"],
        ),
    ] = None
    repetition_penalty: Annotated[float | None, honoured("another name of repeat_penalty")] = None
    presence_penalty: Annotated[
        float | None,
        honoured("taken from the logits of generated tokens, once", default="0", allowed=RANGES["presence_penalty"]),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        honoured(
            "taken from the logits of generated tokens, each time", default="0", allowed=RANGES["frequency_penalty"]
        ),
    ] = None
    logit_bias: Annotated[
        dict[str, Any] | None,
        honoured(
            "added to the logits of these tokens: token id to bias",
            allowed=f"biases in {RANGES['logit_bias']}, at most {MAX_LOGIT_BIAS}",
        ),
    ] = None
    seed: Annotated[
        Int,
        honoured(
            "the same seed gives the same answer while system_fingerprint stays",
            default="drawn",
            allowed="any 64-bit integer",
        ),
    ] = None
    stop: Annotated[
        str | list[str] | None, honoured("texts that end the output and are no part of it", allowed="see --max-stop")
    ] = None
    stop_token_ids: Annotated[
        list[int | float] | None,
        honoured(
            "tokens that end the output",
            kind="array of integers",
            allowed=f"at most {MAX_STOP_TOKEN_IDS}",
            schema={"type": ["array", "null"], "items": {"type": "integer"}, "maxItems": MAX_STOP_TOKEN_IDS},
        ),
    ] = None
    max_tokens: Annotated[
        Int,
        honoured(
            "new tokens at most",
            default="what the context leaves",
            allowed="at least 1; -1: what the context leaves",
            schema=FROM_MINUS_ONE,
        ),
    ] = None
    max_completion_tokens: Annotated[Int, honoured("another name of max_tokens")] = None
    min_tokens: Annotated[
        Int, honoured("new tokens before anything may end the output", default="0", allowed="0 to max_tokens")
    ] = None
    ignore_eos: Annotated[bool | None, honoured("go on after the end-of-sequence token", default="false")] = None
    n: Annotated[Int, honoured("choices", default="1", allowed=f"{RANGES['n']}, see --max-n")] = None
    priority: Annotated[
        Int, honoured("lower runs earlier", default="0", allowed=f"-{MAX_PRIORITY} to {MAX_PRIORITY}")
    ] = None
    stream: Annotated[bool | None, honoured("answer with server-sent events", default="false")] = None
    stream_options: Annotated[
        dict[str, Any] | None,
        honoured("include_usage (boolean): one more chunk, with the usage", allowed="for streams only"),
    ] = None
    user: Annotated[Any, ignored("string", "it changes no answer")] = None
    draft_model: Annotated[Any, ignored("string", "speculative decoding changes no answer; it is not offered yet")] = (
        None
    )
    images: Annotated[Any, refused("array of strings", "images come in messages, as image_url parts", [])] = None
    response_format: Annotated[
        dict[str, Any] | None,
        honoured(
            "what the output has to be: type text, json_object (or its schema or value), json_schema, regex (value)",
            default="text",
            allowed="JSON Schema keywords that can be enforced; see docs/structured-output.md",
            schema=RESPONSE_FORMAT,
        ),
    ] = None
    guided_json: Annotated[Any, honoured("the output is JSON of this schema", kind="object or string", schema=ANY)] = (
        None
    )
    guided_regex: Annotated[str | None, honoured("the output matches this regular expression (Rust's syntax)")] = None
    guided_choice: Annotated[list[str] | None, honoured("the output is one of these texts")] = None
    guided_grammar: Annotated[str | None, honoured("the output follows this Lark grammar")] = None
    structured_outputs: Annotated[
        dict[str, Any] | None, honoured("one of json, regex, choice, grammar, json_object, as the fields above")
    ] = None
    json_schema: Annotated[Any, refused("object", _ELSEWHERE)] = None
    grammar: Annotated[Any, refused("string", "GBNF is not read; guided_grammar takes Lark", "")] = None
    regex: Annotated[Any, refused("string", "guided_regex takes one")] = None
    format: Annotated[Any, refused("object or string", _ELSEWHERE, "")] = None

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
        penalty = same("repeat_penalty", self.repeat_penalty, "repetition_penalty", self.repetition_penalty)
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
            output=output_format(self),
            priority=integer(self.priority, "priority", -MAX_PRIORITY, MAX_PRIORITY),
        )

    def _max_tokens(self) -> int | None:
        max_tokens = integer(self.max_tokens, "max_tokens")
        max_completion_tokens = integer(self.max_completion_tokens, "max_completion_tokens")
        asked = same("max_tokens", max_tokens, "max_completion_tokens", max_completion_tokens)
        return None if asked is None else int(asked)


def _logit_bias(biases: dict[str, Any]) -> dict[int, float]:
    result = {}
    at_most("logit_bias", len(biases), MAX_LOGIT_BIAS)
    for key, bias in biases.items():
        path = f"logit_bias.{key}"
        if not (key.isascii() and key.isdigit() and len(key) < 12 and str(int(key)) == key):
            raise InvalidRequest(f"logit_bias: {key[:32]!r} is no token id.", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise InvalidRequest(f"{path} must be a number.", path)
        if not -100 <= bias <= 100:
            raise InvalidRequest(f"{path} must be in [-100, 100], got {bias}.", path)
        result[int(key)] = float(bias)
    return result


def _token_ids(values: list[int | float], param: str) -> tuple[int, ...]:
    at_most(param, len(values), MAX_STOP_TOKEN_IDS)
    ids = (integer(value, f"{param}[{i}]") for i, value in enumerate(values))
    return tuple(token_id for token_id in ids if token_id is not None)
