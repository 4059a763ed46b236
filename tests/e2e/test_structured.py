"""Structured output against a real server, asked for in each way that clients have."""

from __future__ import annotations

import json
import re
from datetime import date
from typing import Any, Literal

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.e2e.conftest import STARTER
from tests.e2e.serving import Server

CHAT: list[Any] = [{"role": "user", "content": "Give me a short record of a city."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 20},
        "kind": {"enum": ["town", "capital"]},
        "people": {"type": "integer", "minimum": 1, "maximum": 30_000_000},
    },
    "required": ["city", "kind", "people"],
    "additionalProperties": False,
}
FORMAT: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}


class Landmark(BaseModel):
    """Something to look at."""

    name: str = Field(min_length=1, max_length=16)
    kind: Literal["tower", "bridge", "park"]


class City(BaseModel):
    name: str = Field(min_length=1, max_length=16)
    founded: date
    rating: int = Field(ge=1, le=5)
    landmarks: list[Landmark] = Field(min_length=1, max_length=2)
    twin: Literal["Rome", "Berlin"] | None


@pytest.fixture
def client(starter_server: Server) -> OpenAI:
    return starter_server.client()


def ask(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": STARTER, "messages": CHAT, "max_tokens": 80, **options})


def text(client: OpenAI, **options: Any) -> str:
    choice = ask(client, **options).choices[0]
    assert choice.finish_reason == "stop"
    return str(choice.message.content)


def is_city(value: Any) -> bool:
    return (
        list(value) == ["city", "kind", "people"]
        and 1 <= len(value["city"]) <= 20
        and value["kind"] in ("town", "capital")
        and 1 <= value["people"] <= 30_000_000
    )


def refused(client: OpenAI, **options: Any) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    assert caught.value.type == "invalid_request_error"
    return caught.value


def test_parse_gives_pydantic_models(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=STARTER, messages=CHAT, response_format=City, temperature=1, seed=1, n=3, max_tokens=200
    )
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, City)  # pydantic has validated every bound
        assert choice.message.refusal is None


def test_parse_says_that_an_output_was_cut(client: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError) as caught:
        client.chat.completions.parse(model=STARTER, messages=CHAT, response_format=City, max_tokens=5)
    assert caught.value.completion.choices[0].finish_reason == "length"
    assert caught.value.completion.usage is not None
    assert caught.value.completion.usage.completion_tokens == 5


def test_parse_reads_forced_calls(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=STARTER,
        messages=CHAT,
        tools=[openai.pydantic_function_tool(Landmark), openai.pydantic_function_tool(City)],
        tool_choice={"type": "function", "function": {"name": "Landmark"}},
        temperature=0,
        max_tokens=80,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Landmark)


def test_the_streaming_helper_parses_a_format(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=STARTER, messages=CHAT, response_format=Landmark, temperature=0, max_tokens=80
    ) as stream:
        events = list(stream)
    deltas = "".join(event.delta for event in events if event.type == "content.delta")
    (done,) = [event for event in events if event.type == "content.done"]
    assert done.content == deltas
    assert isinstance(done.parsed, Landmark)
    final = stream.get_final_completion()
    assert final.choices[0].message.parsed == done.parsed == Landmark.model_validate_json(deltas)
    partial = [event.parsed for event in events if event.type == "content.delta" and event.parsed is not None]
    assert len(partial) > 1  # it was readable on its way


def test_the_streaming_helper_parses_a_call(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=STARTER,
        messages=CHAT,
        tools=[openai.pydantic_function_tool(Landmark, name="show")],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=80,
    ) as stream:
        events = list(stream)
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert {piece.name for piece in pieces} == {done.name} == {"show"}
    assert "".join(piece.arguments_delta for piece in pieces) == done.arguments
    assert len(pieces) > 2
    assert isinstance(done.parsed_arguments, Landmark)
    (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == done.parsed_arguments


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": FORMAT},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": "true"}}},
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": {"type": "json_object", "value": SCHEMA}},
        {"response_format": {"type": "json", "value": SCHEMA}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_spellings_of_a_schema(starter_server: Server, fields: dict[str, Any]) -> None:
    """As raw bodies: some of them no client's types allow."""
    body = {"model": STARTER, "messages": CHAT, "max_tokens": 80, "temperature": 1, "seed": 3, **fields}
    answer = httpx.post(f"{starter_server.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert is_city(json.loads(choice["message"]["content"]))


def test_huggingface_hub(starter_server: Server) -> None:
    """Its types know a schema's name and strictness, too."""
    client = InferenceClient(base_url=f"{starter_server.url}/v1", api_key="any")
    written: Any = FORMAT  # a dict stands for its type, as in its documentation
    answer = client.chat_completion(CHAT, model=STARTER, response_format=written, max_tokens=80, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert is_city(json.loads(answer.choices[0].message.content or ""))


def test_json_objects(client: OpenAI) -> None:
    """Without a schema the model ends when it likes, or is cut."""
    answer = ask(client, response_format={"type": "json_object"}, temperature=1, seed=0, n=8, max_tokens=100)
    ended = [choice.message.content for choice in answer.choices if choice.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)
    for choice in answer.choices:
        assert choice.message.content.startswith("{")
        assert choice.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": r"(\+49|0)[1-9][0-9]{4,8}"}, r"(\+49|0)[1-9][0-9]{4,8}"),
        ({"response_format": {"type": "regex", "value": "[A-Z]{3}-[0-9]{2}"}}, "[A-Z]{3}-[0-9]{2}"),
        ({"structured_outputs": {"regex": "ja|nein"}}, "ja|nein"),
        ({"guided_choice": ["größer", "kleiner, oder", 'a "third"']}, 'größer|kleiner, oder|a "third"'),
        ({"structured_outputs": {"choice": ["🌧", "☀️"]}}, "🌧|☀️"),
        ({"guided_grammar": 'start: INT ("+" INT)~2\nINT: /[0-9]{1,2}/'}, r"[0-9]{1,2}(\+[0-9]{1,2}){2}"),
        ({"structured_outputs": {"grammar": 'start: "SELECT " NAME\nNAME: /[a-z]{1,6}/'}}, "SELECT [a-z]{1,6}"),
    ],
)
def test_extensions(client: OpenAI, fields: dict[str, Any], pattern: str) -> None:
    answer = ask(client, extra_body=fields, temperature=1, seed=1, n=3)
    assert all(re.fullmatch(pattern, choice.message.content) for choice in answer.choices)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_completions_have_formats_too(client: OpenAI) -> None:
    answer = client.completions.create(
        model=STARTER, prompt="A city:", max_tokens=80, temperature=1, seed=1, extra_body={"response_format": FORMAT}
    )
    assert is_city(json.loads(answer.choices[0].text))


def test_a_text_format_enforces_nothing(client: OpenAI) -> None:
    options = {"temperature": 0, "max_tokens": 8}
    with_format = ask(client, response_format={"type": "text"}, **options).choices[0].message.content
    assert with_format == ask(client, **options).choices[0].message.content


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"type": "object", "properties": {"a": {"not": {}}}}, ".properties.a.not"),
        ({"type": "array", "items": {"type": "string", "length": 3}}, ".items.length"),
        ({"type": "array", "uniqueItems": True}, ".uniqueItems"),
        ({"$ref": "https://elsewhere.example/schema"}, ".$ref"),
    ],
)
def test_what_cannot_be_enforced_is_named(client: OpenAI, schema: dict[str, Any], path: str) -> None:
    described = {"name": "x", "schema": schema}
    error = refused(client, response_format={"type": "json_schema", "json_schema": described})
    assert error.param == f"response_format.json_schema.schema{path}"
    assert error.param in error.message


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"response_format": FORMAT, "extra_body": {"min_tokens": 3}}, "min_tokens"),
        ({"response_format": FORMAT, "extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"response_format": FORMAT, "extra_body": {"guided_regex": "a"}}, "guided_regex"),
        (
            {"extra_body": {"guided_choice": ["a"], "structured_outputs": {"regex": "a"}}},
            "structured_outputs.regex",
        ),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex"),
        ({"extra_body": {"guided_grammar": "start: nothing"}}, "guided_grammar"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice"),
        ({"extra_body": {"guided_choice": ["a", ""]}}, "guided_choice[1]"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"extra_body": {"grammar": 'root ::= "a"'}}, "grammar"),
    ],
)
def test_refusals_name_the_field(client: OpenAI, options: dict[str, Any], param: str) -> None:
    error = refused(client, **options)
    assert error.param == param
    assert param in error.message


def test_json_that_is_cut_says_so(client: OpenAI) -> None:
    answer = ask(client, response_format=FORMAT, max_tokens=4, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content.startswith("{")
    assert answer.usage.completion_tokens == 4


def test_three_choices_each_have_the_format(client: OpenAI) -> None:
    answer = ask(client, response_format=FORMAT, n=3, temperature=1, seed=5, max_tokens=80)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(is_city(json.loads(each)) for each in texts)
    assert len(set(texts)) == 3


def test_deltas_add_up_and_seeds_reproduce(client: OpenAI) -> None:
    options = {"response_format": FORMAT, "temperature": 1, "seed": 11}
    chunks = list(ask(client, **options, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert is_city(json.loads("".join(pieces)))
    assert len([piece for piece in pieces if piece]) > 5
    assert chunks[-1].usage.completion_tokens > 5
    assert "".join(pieces) == text(client, **options) == text(client, **options)
    assert "".join(pieces) != text(client, **{**options, "seed": 12})


def test_logprobs_are_those_of_allowed_tokens(client: OpenAI) -> None:
    answer = ask(
        client, logprobs=True, top_logprobs=5, temperature=0, extra_body={"guided_choice": ["alpha", "beta"]}
    ).choices[0]
    assert "".join(entry.token for entry in answer.logprobs.content) == answer.message.content
    assert answer.message.content in ("alpha", "beta")
