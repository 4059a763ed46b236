"""Formats and forced calls by the hundred: a weak model at temperature 1, many requests at once, all outputs valid."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice

from tests.e2e.conftest import STARTER
from tests.e2e.serving import Server
from tests.grammar.schemas import COUNT, DATE, EMAIL, SCHEMAS, SHORT, UUID, WORD, Schema, one_of, record, some
from tests.grammar.test_promise import violations

THREADS = 16
LEAST_ENDED = 0.6
"""The share of outputs that have to end by themselves, so that the test sees whole ones."""
FORMAT_TOKENS = 96
CALL_TOKENS = 80

PARAMETERS: dict[str, Schema | None] = {
    "get_weather": {**record(city=SHORT, unit=one_of("celsius", "fahrenheit")), "additionalProperties": False},
    "look_around": None,
    "send_mail": record(to=EMAIL, priority={"type": "integer", "minimum": 1, "maximum": 3}),
    "book-room": record(day=DATE, guests=COUNT, wishes=some(WORD, 0, 2)),
    "find.order": {"type": "object", "properties": {"id": UUID, "state": one_of("new", "paid")}, "required": ["id"]},
}
"""Of the tools, by name."""


def tools() -> list[Any]:
    described = {name: {} if schema is None else {"parameters": schema} for name, schema in PARAMETERS.items()}
    return [{"type": "function", "function": {"name": name, **more}} for name, more in described.items()]


def ask(client: OpenAI, text: str, **options: Any) -> ChatCompletion:
    answer: ChatCompletion = client.chat.completions.create(
        model=STARTER, messages=[{"role": "user", "content": text}], **options
    )
    return answer


@pytest.mark.slow
def test_two_hundred_schemas(starter_server: Server) -> None:
    """What ends is valid, and what is cut says so."""
    client = starter_server.client(timeout=600)

    def sample(seed: int, name: str) -> Choice:
        described = {"name": f"schema-{seed}", "strict": True, "schema": SCHEMAS[name]}
        return ask(
            client,
            f"Write JSON: {name}",
            temperature=1,
            seed=seed,
            max_tokens=FORMAT_TOKENS,
            response_format={"type": "json_schema", "json_schema": described},
        ).choices[0]

    with ThreadPoolExecutor(THREADS) as threads:
        choices = dict(zip(SCHEMAS, threads.map(sample, range(len(SCHEMAS)), SCHEMAS), strict=True))
    ended = {name: choice.message.content or "" for name, choice in choices.items() if choice.finish_reason == "stop"}
    assert {name: found for name, text in ended.items() if (found := violations(SCHEMAS[name], text.encode()))} == {}
    assert {choice.finish_reason for choice in choices.values()} <= {"stop", "length"}
    assert len(ended) >= LEAST_ENDED * len(SCHEMAS)
    assert len(set(ended.values())) > len(ended) / 2  # the model's own words, not the shortest texts


def check_calls(choice: Choice, allowed: set[str]) -> list[str]:
    """The names that are called. All calls are valid; where the output was cut, the last one may be a piece."""
    calls: list[Any] = list(choice.message.tool_calls or [])
    assert choice.finish_reason in ("tool_calls", "length")
    whole = calls if choice.finish_reason == "tool_calls" else calls[:-1]
    assert whole or choice.finish_reason == "length"
    if choice.finish_reason == "tool_calls":  # one that is cut before its arguments is shown as text
        assert choice.message.content is None
    assert len({call.id for call in calls}) == len(calls)
    for call in whole:
        assert call.type == "function"
        assert call.function.name in allowed
        schema = PARAMETERS[call.function.name]
        if schema is None:
            assert json.loads(call.function.arguments) == {}
        else:
            assert violations(schema, call.function.arguments.encode()) == []
    return [call.function.name for call in whole]


@pytest.mark.slow
def test_a_hundred_forced_calls(starter_server: Server) -> None:
    """Half of them name the tool, half leave the choice of the tool to the model."""
    client = starter_server.client(timeout=600)
    names = list(PARAMETERS)

    def sample(seed: int) -> tuple[str, list[str]]:
        name = names[seed % len(names)]
        is_named = seed % 2 == 0
        choice = ask(
            client,
            f"Please {name} for guest {seed}.",
            temperature=1,
            seed=seed,
            max_tokens=CALL_TOKENS,
            tools=tools(),
            tool_choice={"type": "function", "function": {"name": name}} if is_named else "required",
            parallel_tool_calls=seed % 4 == 1,
        ).choices[0]
        called = check_calls(choice, {name} if is_named else set(names))
        assert len(choice.message.tool_calls or []) <= 1 or seed % 4 == 1
        return choice.finish_reason, called

    with ThreadPoolExecutor(THREADS) as threads:
        samples = list(threads.map(sample, range(100)))
    reasons = Counter(reason for reason, _ in samples)
    assert reasons["tool_calls"] >= LEAST_ENDED * len(samples)
    assert {name for _, called in samples for name in called} == set(names)


@pytest.mark.slow
def test_free_text_beside_formats_is_what_it_is_alone(starter_server: Server) -> None:
    """Masks of one request touch no other: to the token, and to the probability's third digit."""
    client = starter_server.client(timeout=600)
    chats = ["Tell me about the sea.", "What is the capital of France?", "Count to ten.", "Name two fruits."]

    def free(text: str) -> list[tuple[str, float]]:
        logprobs = ask(client, text, temperature=0, max_tokens=16, logprobs=True).choices[0].logprobs
        assert logprobs is not None
        return [(entry.token, entry.logprob) for entry in logprobs.content or []]

    def enforced(seed: int) -> str:
        formats: list[dict[str, Any]] = [
            {"response_format": {"type": "json_object"}},
            {"extra_body": {"guided_regex": "[0-9]{4,40}"}},
            {"extra_body": {"guided_choice": ["yes, of course", "no, never"]}},
            {"tools": tools(), "tool_choice": "required", "parallel_tool_calls": False},
        ]
        options = {"max_tokens": 24, "temperature": 1, "seed": seed, **formats[seed % len(formats)]}
        return ask(client, f"Number {seed}?", **options).choices[0].finish_reason

    alone = [free(chat) for chat in chats]
    with ThreadPoolExecutor(32 + len(chats)) as threads:
        reasons = [threads.submit(enforced, seed) for seed in range(32)]
        together = list(threads.map(free, chats))
        assert {each.result() for each in reasons} <= {"stop", "length", "tool_calls"}
    for before, beside in zip(alone, together, strict=True):
        assert [token for token, _ in beside] == [token for token, _ in before]
        assert [logprob for _, logprob in beside] == pytest.approx([logprob for _, logprob in before], abs=1e-3)
