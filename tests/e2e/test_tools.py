"""Tools against a real server: shapes of calls, whole and streamed, and of the chats that hold them.

The model is too weak to call a tool by itself, so that calls here are forced: their form is what is looked at.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.e2e.conftest import STARTER
from tests.e2e.serving import Server

CHAT: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
CLOCK: dict[str, Any] = {"name": "get_time", "description": "The time of day."}
TOOLS: list[Any] = [{"type": "function", "function": function} for function in (WEATHER, CLOCK)]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture
def client(starter_server: Server) -> OpenAI:
    return starter_server.client()


def ask(client: OpenAI, **options: Any) -> Any:
    settings = {"model": STARTER, "messages": CHAT, "tools": TOOLS, "temperature": 0, "max_tokens": 64}
    return client.chat.completions.create(**{**settings, **options})


def is_weather(arguments: str) -> bool:
    value = json.loads(arguments)
    return list(value) == ["city", "unit"] and len(value["city"]) <= 12 and value["unit"] in ("celsius", "fahrenheit")


def fold(chunks: list[Any], index: int = 0) -> tuple[list[dict[str, str]], str | None]:
    """The calls of a choice, and its finish reason; asserts that each part comes as OpenAI sends it."""
    calls: list[dict[str, str]] = []
    finish = None
    for choice in (choice for chunk in chunks for choice in chunk.choices if choice.index == index):
        assert finish is None, "nothing comes after the finish reason"
        finish = choice.finish_reason
        for delta in choice.delta.tool_calls or []:
            if delta.index == len(calls):  # a call begins: all of its head at once
                assert (delta.type, bool(delta.id), bool(delta.function.name)) == ("function", True, True)
                calls.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
            else:
                assert delta.index == len(calls) - 1
                assert (delta.type, delta.id, delta.function.name) == (None, None, None)
            calls[-1]["arguments"] += delta.function.arguments or ""
    return calls, finish


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_whole_and_streamed(client: OpenAI, choice: Any) -> None:
    whole = ask(client, tool_choice=choice, parallel_tool_calls=False).choices[0]
    (call,) = whole.message.tool_calls
    assert (whole.finish_reason, whole.message.content, call.type) == ("tool_calls", None, "function")
    chunks = list(ask(client, tool_choice=choice, parallel_tool_calls=False, stream=True))
    (folded,), finish = fold(chunks)
    assert finish == "tool_calls"
    assert (folded["name"], folded["arguments"]) == (call.function.name, call.function.arguments)
    assert folded["id"] != call.id
    if choice is NAMED:
        assert call.function.name == "get_weather"
        assert is_weather(call.function.arguments)
        pieces = [chunk for chunk in chunks if chunk.choices[0].delta.tool_calls]
        assert len(pieces) > 5  # the arguments come as they are written
    assert all(chunk.choices[0].delta.content in (None, "") for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"


def test_several_calls_streamed_fold_to_the_whole(client: OpenAI) -> None:
    """Sampled, so that the model goes on calling in some of the choices; each call has its index and its own id."""
    options = {"tool_choice": "required", "temperature": 1, "seed": 0, "n": 4, "max_tokens": 80}
    choices = ask(client, **options).choices
    chunks = list(ask(client, stream=True, **options))
    for choice in choices:
        calls, finish = fold(chunks, choice.index)
        assert finish == choice.finish_reason
        assert [(call["name"], call["arguments"]) for call in calls] == [
            (call.function.name, call.function.arguments) for call in choice.message.tool_calls
        ]
        assert len({call["id"] for call in calls}) == len(calls)
    assert max(len(choice.message.tool_calls) for choice in choices) > 1


def test_one_call_where_they_are_not_parallel(client: OpenAI) -> None:
    answer = ask(client, tool_choice="required", parallel_tool_calls=False, temperature=1, seed=0, n=4)
    for choice in answer.choices:
        (call,) = choice.message.tool_calls
        assert call.function.name in ("get_weather", "get_time")
        assert choice.finish_reason == "tool_calls"


def test_a_tool_without_parameters_takes_none(client: OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "get_time"}}
    (call,) = ask(client, tool_choice=choice).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {}


def test_usage_counts_the_call(client: OpenAI) -> None:
    answer = ask(client, tool_choice=NAMED)
    *_, last = ask(client, tool_choice=NAMED, stream=True, stream_options={"include_usage": True})
    without = ask(client, tools=openai.omit, max_tokens=1)
    assert answer.usage.completion_tokens > 10
    assert last.usage.completion_tokens == answer.usage.completion_tokens
    assert answer.usage.prompt_tokens > without.usage.prompt_tokens + 20  # the tools are in the prompt


def test_two_choices_call_each_for_itself(client: OpenAI) -> None:
    options = {"n": 2, "tool_choice": NAMED, "temperature": 1, "seed": 2}
    whole = [choice.message.tool_calls[0] for choice in ask(client, **options).choices]
    chunks = list(ask(client, stream=True, **options))
    streamed = [fold(chunks, index)[0][0] for index in (0, 1)]
    assert [call["arguments"] for call in streamed] == [call.function.arguments for call in whole]
    assert all(is_weather(call["arguments"]) for call in streamed)
    assert len({call.id for call in whole}) == len({call["id"] for call in streamed}) == 2


def test_auto_answers_or_calls(client: OpenAI) -> None:
    """What a weak model makes of tools is its own; the answer is well-formed all the same, whole and streamed."""
    options = {"tool_choice": "auto", "temperature": 1, "seed": 0, "n": 4, "max_tokens": 32}
    chunks = list(ask(client, stream=True, **options))
    for choice in ask(client, **options).choices:
        calls, finish = fold(chunks, choice.index)
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        text = "".join(each.delta.content or "" for each in mine)
        assert calls or text
        assert finish == choice.finish_reason
        assert text == (choice.message.content or "")
        assert len(calls) == len(choice.message.tool_calls or [])


def test_a_format_beside_tools_holds_for_what_is_no_call(client: OpenAI) -> None:
    described = {"name": "x", "schema": {"enum": ["sunny", "rainy"]}}
    answer = ask(
        client,
        response_format={"type": "json_schema", "json_schema": described},
        parallel_tool_calls=False,
        temperature=1,
        seed=0,
        n=4,
    )
    for choice in answer.choices:
        if choice.message.tool_calls:
            assert choice.message.tool_calls[0].function.name in ("get_weather", "get_time")
        else:
            assert json.loads(choice.message.content) in ("sunny", "rainy")


def test_none_leaves_the_tools_out(client: OpenAI) -> None:
    silent = ask(client, tool_choice="none", max_tokens=8)
    without = ask(client, tools=openai.omit, max_tokens=8)
    assert silent.choices[0].message.tool_calls is None
    assert silent.choices[0].message.content == without.choices[0].message.content
    assert silent.usage.prompt_tokens == without.usage.prompt_tokens


def test_an_allowed_tool_is_the_only_one(client: OpenAI) -> None:
    one = [{"type": "function", "function": {"name": "get_time"}}]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": one}}
    answer = ask(client, tool_choice=allowed, parallel_tool_calls=False, temperature=1, seed=0, n=4)
    assert [choice.message.tool_calls[0].function.name for choice in answer.choices] == ["get_time"] * 4


def call(call_id: str, arguments: Any = '{"city": "Paris", "unit": "celsius"}', **more: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}, **more}


def calling(*calls: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


def result(call_id: str, content: Any = "18 °C") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


HISTORIES: dict[str, list[Any]] = {
    "one call": [calling(call("a")), result("a")],
    "two calls, results in the other order": [calling(call("a"), call("b")), result("b", "rain"), result("a")],
    "two rounds": [calling(call("a")), result("a"), calling(call("b")), result("b")],
    "text beside the call": [calling(call("a"), content="Let me look."), result("a")],
    "an empty text": [calling(call("a"), content=""), result("a")],
    "no content at all": [{"role": "assistant", "tool_calls": [call("a")]}, result("a")],
    "parts as the result": [calling(call("a")), result("a", [{"type": "text", "text": "18 °C"}])],
    "a JSON object as the result": [calling(call("a")), result("a", '{"celsius": 18}')],
    "arguments that are an object": [calling(call("a", {"city": "Paris"})), result("a")],
    "arguments that are no JSON": [calling(call("a", '{"city": "Pa')), result("a")],
    "no arguments": [calling(call("a", "")), result("a")],
    "a call without a result": [calling(call("a")), {"role": "user", "content": "Well?"}],
    "a result of no call": [result("nobody")],
    "a user between": [calling(call("a")), result("a"), {"role": "user", "content": "Tell me more."}],
    "functions": [
        {"role": "assistant", "content": None, "function_call": {"name": "get_weather", "arguments": "{}"}},
        {"role": "function", "name": "get_weather", "content": "18 °C"},
    ],
    "reasoning": [calling(call("a"), reasoning_content="I have to look."), result("a")],
}


@pytest.mark.parametrize("name", HISTORIES)
def test_histories(client: OpenAI, name: str) -> None:
    """With tools and without, every shape is an answer."""
    for tools in (TOOLS, openai.omit):
        answer = ask(client, messages=[*CHAT, *HISTORIES[name]], tools=tools, max_tokens=4)
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage.completion_tokens > 0


def test_a_result_is_read(client: OpenAI) -> None:
    """The model repeats what only the result says."""
    chat = [
        {"role": "user", "content": "What is the name of my dog? Use the tool."},
        calling({"id": "a", "type": "function", "function": {"name": "get_dog", "arguments": "{}"}}),
        result("a", "The name of your dog is Barnaby."),
    ]
    answer = ask(client, messages=chat, tools=openai.omit, max_tokens=24)
    assert "Barnaby" in answer.choices[0].message.content


def test_functions_as_they_were_before_tools(client: OpenAI) -> None:
    options = {"tools": openai.omit, "functions": [WEATHER], "function_call": {"name": "get_weather"}}
    (called,) = ask(client, **options).choices[0].message.tool_calls
    assert is_weather(called.function.arguments)
    for choice in ("auto", "none"):
        answer = ask(client, **{**options, "function_call": choice}, max_tokens=4)
        assert answer.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "x"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "ä"}}]}, "tools[0].function.name"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters.type",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "x", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools[0].function.parameters.not",
        ),
        ({"tools": openai.omit, "tool_choice": "required"}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "nobody"}}},
            "tool_choice.function.name",
        ),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"functions": [WEATHER]}, "functions"),
        ({"tool_choice": "required", "extra_body": {"min_tokens": 2}}, "min_tokens"),
        ({"messages": [*CHAT, calling({"id": "a", "type": "function"})]}, "messages[1].tool_calls[0].function"),
    ],
)
def test_errors_name_the_field(client: OpenAI, options: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, stream=stream, **options)
        assert caught.value.param == param
        assert param in caught.value.message
