"""Tools, formats and reasoning on the wire: OpenAI's shapes, and refusals by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.api.running_server import RunningServer, says
from tests.api.test_chat import events

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '[TOOL_REQUEST]{"name": "weather", "arguments": {"city": "Rome"}}[END_TOOL_REQUEST]'


@pytest.fixture
def calling(server: RunningServer) -> RunningServer:
    server.engine.script = says(f"Well. {CALL}\n{CALL}")
    return server


def test_a_call(calling: RunningServer) -> None:
    body = calling.chat(tools=[TOOL]).json()
    known = ChatCompletion.model_validate(body, strict=True)
    assert body == known.model_dump(exclude_unset=True)
    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Well."
    first, second = choice["message"]["tool_calls"]
    assert first["type"] == "function"
    assert first["function"] == second["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert first["id"] != second["id"]


def test_an_answer_that_is_calls_only_has_no_content(server: RunningServer) -> None:
    server.engine.script = says(CALL)
    message = server.chat(tools=[TOOL]).json()["choices"][0]["message"]
    assert message["content"] is None
    server.engine.script = says("")
    message = server.chat(tools=[TOOL]).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "", "refusal": None}


def test_a_stream_of_calls(calling: RunningServer) -> None:
    *chunks, done = events(calling.chat(tools=[TOOL], stream=True).text)
    assert done == "[DONE]"
    for chunk in chunks:
        known = ChatCompletionChunk.model_validate(chunk, strict=True)
        assert chunk == known.model_dump(exclude_unset=True)
    pieces = [piece for c in chunks for piece in c["choices"][0]["delta"].get("tool_calls", [])]
    begins = [piece for piece in pieces if "id" in piece]
    assert [(piece["index"], piece["type"], piece["function"]) for piece in begins] == [
        (0, "function", {"name": "weather", "arguments": ""}),
        (1, "function", {"name": "weather", "arguments": ""}),
    ]
    assert [list(piece) for piece in pieces if "id" not in piece] == [["index", "function"]] * (len(pieces) - 2)
    for index in range(2):
        arguments = "".join(piece["function"]["arguments"] for piece in pieces if piece["index"] == index)
        assert json.loads(arguments) == {"city": "Rome"}
    last = chunks[-1]["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")


def test_the_official_client_puts_a_stream_together(calling: RunningServer) -> None:
    with calling.client.chat.completions.stream(
        model="stub",
        messages=[{"role": "user", "content": "Hi"}],
        tools=[TOOL],  # type: ignore[list-item]
    ) as stream:
        stream.until_done()
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert [call.function.arguments for call in message.tool_calls] == ['{"city": "Rome"}'] * 2


def test_without_tools_the_same_text_is_content(calling: RunningServer) -> None:
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        [choice] = calling.chat(**fields).json()["choices"]
        assert choice["message"]["content"] == f"Well. {CALL}\n{CALL}"
        assert choice["finish_reason"] == "stop"


def test_the_model_is_told_of_the_tools_it_may_call(calling: RunningServer) -> None:
    other = {"type": "function", "function": {"name": "other_tool"}}
    prompts = []
    for choice in ("auto", "none", {"type": "function", "function": {"name": "weather"}}):
        calling.chat(tools=[TOOL, other], tool_choice=choice)
        sent = calling.engine.requests[-1]
        prompts.append(calling.post("/detokenize", {"tokens": sent.prompt_token_ids}).json()["prompt"])
    assert ["weather" in prompt for prompt in prompts] == [True, False, True]
    assert ["other_tool" in prompt for prompt in prompts] == [True, False, False]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL] * 2}, "tools[1].function.name"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"tools": [TOOL], "functions": [TOOL["function"]]}, "functions"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format.json_schema.schema.not",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 3}}},
            "response_format.json_schema.strict",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"shema": {}}}},
            "response_format.json_schema.shema",
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "(?=a)"}, "guided_regex"),
        ({"guided_grammar": "start: x"}, "guided_grammar"),
        ({"structured_outputs": {"xml": 1}}, "structured_outputs.xml"),
        ({"structured_outputs": {"choice": ["a"]}, "guided_regex": "a"}, "structured_outputs.choice"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"grammar": "root ::= x"}, "grammar"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_refusals_name_their_field(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    response = server.chat(**fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert server.engine.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}, "strict": "true"}}},
        {"response_format": {"type": "json_schema", "schema": {"type": "integer"}}},
        {"response_format": {"type": "json_object", "value": {"type": "integer"}}},
        {"response_format": {"type": "json_object", "schema": {"type": "integer"}}},
        {"response_format": {"type": "json", "value": '{"type": "integer"}'}},
        {"guided_json": {"type": "integer"}},
        {"guided_json": '{"type": "integer"}'},
        {"structured_outputs": {"json": {"type": "integer"}, "choice": None}},
    ],
    ids=json.dumps,
)
def test_a_schema_in_every_dress_is_the_same_grammar(server: RunningServer, fields: dict[str, Any]) -> None:
    for response in (server.chat(**fields), server.complete(**fields)):
        assert response.status_code == 200, response.text
    chat, completion = (sent.grammar for sent in server.engine.requests)
    assert chat == completion
    assert '"type": "integer"' in chat
    assert server.engine.vocabulary is not None


def test_text_is_no_format(server: RunningServer) -> None:
    assert server.chat(response_format={"type": "text"}).status_code == 200
    assert server.engine.requests[0].grammar == ""


def test_reasoning_effort_that_no_template_reads_is_reported(server: RunningServer) -> None:
    for stream in (False, True):
        response = server.chat(reasoning_effort="low", user="me", stream=stream)
        assert response.status_code == 200
        assert response.headers["x-lmserve-ignored"] == "user, reasoning_effort"


def test_functions_as_they_were_called_before_tools(calling: RunningServer) -> None:
    answer = calling.chat(functions=[TOOL["function"]], function_call={"name": "weather"}).json()
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert "weather" in calling.engine.requests[0].grammar
