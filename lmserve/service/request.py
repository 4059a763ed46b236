"""A request that is ready to run: everything a user can get wrong has been refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from lmserve.errors import ContextLengthExceeded, InvalidRequest, PromptTooLong
from lmserve.runtime.interface import RunnerInfo
from lmserve.sampling_params import SamplingParams
from lmserve.service.chat_template import Prompt
from lmserve.service.choice import Parsing
from lmserve.service.echo import Echo, echo_prompt
from lmserve.service.messages import TEXT_ONLY
from lmserve.service.model_text import ModelText, SamplingDefaults
from lmserve.service.protocols import Engine, ModelEntry
from lmserve.service.stop_strings import StopPatterns
from lmserve.service.structure import OutputFormat

MAX_STOP_CHARACTERS = 1024
MAX_ECHO_LOGPROBS = 1 << 20
"""Log-probabilities of echoed tokens in one answer: choices times prompt tokens times entries at each position."""
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for completions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """Sampling parameters as asked for; None is not asked for. Types are checked, ranges are not."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    """-1 is no limit."""
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    logprobs: int | None = None
    echo: bool = False
    """The answer begins with the prompt; ``logprobs`` are then also of its tokens, and ``max_tokens`` may be 0."""
    priority: int | None = None
    output: OutputFormat | None = None
    """What the output has to be; None for anything."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that answers: its entry, its engine, its text."""

    entry: ModelEntry
    engine: Engine
    text: ModelText


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One or more prompts to one model; choice ``i`` of prompt ``p`` has the number ``p * n + i``."""

    request_id: str
    model: ServedModel
    prompts: tuple[Prompt, ...]
    sampling: tuple[SamplingParams, ...]
    """One for each prompt: they differ in ``max_tokens`` and in a seed that was drawn."""
    stop: tuple[str, ...]
    stop_patterns: StopPatterns
    priority: int
    begins_text: bool
    echoes: tuple[Echo, ...] = ()
    """One for each prompt; none unless asked for."""
    grammars: tuple[str, ...] = ()
    """One for each prompt: what its outputs have to be. None: anything."""
    ignored: tuple[str, ...] = ()
    """Fields that change nothing with this model."""
    make_parsing: Callable[[], Parsing] | None = None
    """How a choice's output is taken apart: one for each choice; None: it is content as it is."""

    @property
    def echo(self) -> bool:
        """Whether each choice begins with its prompt."""
        return bool(self.echoes)

    @property
    def context_length(self) -> int:
        """Tokens that prompt and output of one choice may have together."""
        return context_length(self.model.engine.info)

    @property
    def fingerprint(self) -> str:
        """While it stays, a seed promises the same answer."""
        return self.model.engine.info.fingerprint

    @property
    def n(self) -> int:
        """Choices of each prompt."""
        return self.sampling[0].n

    @property
    def num_choices(self) -> int:
        return self.n * len(self.prompts)


class ServiceSettings(Protocol):
    """What service needs of the configuration: limits, and sampling defaults, of which None leaves it to the model."""

    @property
    def max_n(self) -> int: ...
    @property
    def max_choices(self) -> int:
        """Prompts times ``n`` of one request."""
        ...

    @property
    def max_stop(self) -> int: ...
    @property
    def max_prompt_tokens(self) -> int:
        """0: what the context allows."""
        ...

    @property
    def max_inputs(self) -> int:
        """Texts or pairs of one request to an encoder."""
        ...

    @property
    def first_token_seconds(self) -> float: ...
    @property
    def default_temperature(self) -> float | None: ...
    @property
    def default_top_p(self) -> float | None: ...
    @property
    def default_top_k(self) -> int | None: ...
    @property
    def default_min_p(self) -> float | None: ...
    @property
    def default_repeat_penalty(self) -> float | None: ...


def context_length(info: RunnerInfo) -> int:
    """Tokens that prompt and output of one sequence may have together: the model's limit or the KV cache's.

    Of an encoder, tokens that one input may have.
    """
    if info.task != "generate":
        return info.max_model_len
    return min(info.max_model_len, info.kv_cache_tokens)


def why_no_images(info: RunnerInfo) -> str | None:
    """Why the model may have no images, the rest of a sentence; None if it may."""
    if info.images != "none":
        return None
    return f"this model cannot be given any here: {info.no_images}" if info.no_images else TEXT_ONLY


def make_request(
    request_id: str,
    model: ServedModel,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    settings: ServiceSettings,
    *,
    prompt_param: str,
    default_max_tokens: int | None = None,
    begins_text: bool = False,
    make_grammar: Callable[[str], str] | None = None,
    make_parsing: Callable[[], Parsing] | None = None,
    ignored: Sequence[str] = (),
) -> GenerationRequest:
    """The request, with everything checked that a user can get wrong.

    ``default_max_tokens``: None is as many as the context leaves. ``begins_text``: the output does not continue a text.
    ``make_grammar``: what outputs have to be, behind the healed text. ``prompt_param`` is the field to blame.

    Raises:
        InvalidRequest: a value is out of range.
        ContextLengthExceeded: prompt and output do not fit.
    """
    info = model.engine.info
    check_choices(len(prompts), options.n or 1, settings.max_choices, settings)
    _check_stop(options.stop, settings.max_stop)
    _check_option_ids(options, info.vocab_size)
    if make_grammar is not None:
        _check_beside_grammar(options)
    for prompt in prompts:
        _check_prompt(prompt, info.vocab_size, settings.max_prompt_tokens, prompt_param)

    if options.echo and options.logprobs is not None:
        _check_echo(prompts, options.n or 1, options.logprobs)

    def max_tokens(prompt: Prompt) -> int:
        again = 1 if prompt.healed else 0  # a token that is taken back and written once more
        used = len(prompt.token_ids) + again
        return again + _max_tokens(options, used, context_length(info), default_max_tokens, prompt_param)

    sampling = [resolve_sampling(options, max_tokens(prompt), model, settings) for prompt in prompts]
    return GenerationRequest(
        request_id=request_id,
        model=model,
        prompts=tuple(prompts),
        sampling=tuple(sampling),
        stop=options.stop,
        stop_patterns=StopPatterns(options.stop),
        priority=options.priority or 0,
        begins_text=begins_text and make_grammar is None,  # a blank that a grammar asks for is not to be dropped
        grammars=() if make_grammar is None else tuple(make_grammar(prompt.healed) for prompt in prompts),
        make_parsing=make_parsing,
        ignored=tuple(ignored),
        echoes=tuple(echo_prompt(prompt, model.text) for prompt in prompts) if options.echo else (),
    )


def resolve_sampling(
    options: GenerationOptions, max_tokens: int, model: ServedModel, server: ServiceSettings
) -> SamplingParams:
    """Concrete sampling parameters.

    The first word counts: the request's, the server's, that of the model's generation config, its preset's, OpenAI's.

    Raises:
        InvalidRequest: a value is out of range.
    """
    seed = random.getrandbits(53) if options.seed is None else options.seed  # 53: what a JavaScript number can hold
    values: dict[str, Any] = {
        name: _first(getattr(options, name), *words) for name, words in _default_words(model, server).items()
    }
    if values["top_k"] is not None:
        values["top_k"] = 0 if values["top_k"] == -1 else int(values["top_k"])
    for name in ("presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos", "n", "logprobs"):
        values[name] = getattr(options, name)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed - 2**64 if seed >= 2**63 else seed,
        logit_bias=tuple(options.logit_bias.items()),
        stop_token_ids=options.stop_token_ids,
        prompt_logprobs=options.logprobs if options.echo else None,
        **{name: value for name, value in values.items() if value is not None},
    )


def _default_words(model: ServedModel, server: ServiceSettings) -> dict[str, tuple[float | None, ...]]:
    """What server, generation config and preset say, for each parameter that they may speak of."""
    configured = {
        "temperature": server.default_temperature,
        "top_p": server.default_top_p,
        "top_k": server.default_top_k,
        "min_p": server.default_min_p,
        "repetition_penalty": server.default_repeat_penalty,
    }
    preset = model.entry.sampling
    return {
        name: (configured.get(name), getattr(model.text.defaults, name), preset.get(name))
        for name in (key.name for key in fields(SamplingDefaults))
    }


def _check_prompt(prompt: Prompt, vocab_size: int, max_tokens: int, param: str) -> None:
    if not prompt.token_ids:
        raise InvalidRequest(f"{param}: an empty prompt cannot be continued.", param)
    if 0 < max_tokens < len(prompt.token_ids):
        raise PromptTooLong(limit=max_tokens, num_prompt_tokens=len(prompt.token_ids), param=param)
    check_token_ids(prompt.token_ids, vocab_size, param)


def _check_beside_grammar(options: GenerationOptions) -> None:
    """Where a grammar is at its end there is nothing to go on with."""
    for name, asked in (("min_tokens", options.min_tokens), ("ignore_eos", options.ignore_eos)):
        if asked:
            raise InvalidRequest(f"{name} and an enforced format exclude each other: the format says the end.", name)


def _check_echo(prompts: Sequence[Prompt], n: int, logprobs: int) -> None:
    entries = n * (1 + logprobs) * sum(len(prompt.token_ids) for prompt in prompts)
    if entries > MAX_ECHO_LOGPROBS:
        raise InvalidRequest(
            f"logprobs: an echo of {entries} log-probabilities in all choices, the limit is {MAX_ECHO_LOGPROBS}.",
            "logprobs",
        )


def check_choices(num_prompts: int, n: int, engine_limit: int, settings: ServiceSettings) -> None:
    """Raises InvalidRequest for more choices than are allowed, or than the engine's slots and queue hold together."""
    if n > settings.max_n:
        raise InvalidRequest(f"n must be at most {settings.max_n}, got {n}.", "n")
    limit = min(settings.max_choices, engine_limit)
    if num_prompts * n > limit:
        message = f"{num_prompts * n} choices in all prompts together, the limit is {limit}."
        raise InvalidRequest(f"prompt: {message}", "prompt")


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest for ids that the model has not."""
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        raise InvalidRequest(f"{param} holds token ids outside of the vocabulary, which has {vocab_size}.", param)


def _check_option_ids(options: GenerationOptions, vocab_size: int) -> None:
    for param, token_ids in (("logit_bias", options.logit_bias), ("stop_token_ids", options.stop_token_ids)):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(f"{param}: {token_id} is no token id; the vocabulary has {vocab_size}.", param)


def _check_stop(stop: tuple[str, ...], max_stop: int) -> None:
    """Refuse stop strings that are too many, too long, or empty."""
    if len(stop) > max_stop:
        raise InvalidRequest(f"stop may have at most {max_stop} strings, got {len(stop)}.", "stop")
    if not all(0 < len(s) <= MAX_STOP_CHARACTERS for s in stop):
        raise InvalidRequest(f"Each stop string must have 1 to {MAX_STOP_CHARACTERS} characters.", "stop")


def _max_tokens(options: GenerationOptions, used: int, limit: int, default: int | None, prompt_param: str) -> int:
    asked = default if options.max_tokens is None else options.max_tokens
    if asked is None or asked == -1:
        if used >= limit:
            raise ContextLengthExceeded(limit=limit, num_prompt_tokens=used, max_tokens=1, param=prompt_param)
        return limit - used
    least = 0 if options.echo else 1  # without an echo 0 would ask for nothing
    if asked < least:
        raise InvalidRequest(f"max_tokens must be at least {least}, or -1 for no limit, got {asked}.", "max_tokens")
    if used + asked > limit:
        if options.max_tokens is None and used < limit:
            return limit - used
        raise ContextLengthExceeded(limit=limit, num_prompt_tokens=used, max_tokens=asked, param=prompt_param)
    return asked


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
