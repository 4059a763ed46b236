from __future__ import annotations

from typing import Any

import pytest

from lmserve.errors import InvalidRequest, RequestError, UnsupportedField
from lmserve.service.messages import ImagePart, PartStyle, normalize_messages


def one(message: dict[str, Any], template: str = "") -> dict[str, Any]:
    [normalized] = normalize_messages([message], template).messages
    return normalized


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hi", "hi"),
        ("", ""),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_content_of_every_shape_in_every_role(role: str, content: object, text: str) -> None:
    assert one({"role": role, "content": content}) == {"role": role, "content": text}


def test_absent_content_is_empty() -> None:
    assert one({"role": "assistant"}) == {"role": "assistant", "content": ""}


def test_roles_that_the_template_does_not_mention_are_renamed() -> None:
    assert one({"role": "developer", "content": ""})["role"] == "system"
    assert one({"role": "function", "content": ""})["role"] == "tool"
    assert one({"role": "function", "content": ""}, "call.type == 'function'")["role"] == "tool"
    assert one({"role": "developer", "content": ""}, "{% if role == 'developer' %}")["role"] == "developer"


def test_unknown_keys_reach_the_template_and_null_is_absent() -> None:
    message = {"role": "user", "content": "x", "name": "Ann", "refusal": None, "mood": "good"}
    assert one(message) == {"role": "user", "content": "x", "name": "Ann", "mood": "good"}


@pytest.mark.parametrize(
    ("content", "text"), [({"città": "Roma"}, '{"città": "Roma"}'), ({}, "{}"), (21.5, "21.5"), (False, "false")]
)
def test_a_tools_content_may_be_a_value(content: object, text: str) -> None:
    assert one({"role": "tool", "content": content})["content"] == text


def test_arguments_of_tool_calls_become_objects() -> None:
    def call(arguments: object) -> dict[str, Any]:
        return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}

    normalized = one({"role": "assistant", "tool_calls": [call('{"x": 1}'), call(""), call("{broken")]})
    assert [c["function"]["arguments"] for c in normalized["tool_calls"]] == [{"x": 1}, {}, "{broken"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "x"}, "messages[0].role"),
        ({"role": "wizard", "content": "x"}, "messages[0].role"),
        ({"role": ["user"], "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        ({"role": "user", "content": [3]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"text": "x"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "assistant", "tool_calls": {}}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[0].tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": ["f"]}, "messages[0].tool_calls[0]"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": 3, "function": {"name": "f"}}]},
            "messages[0].tool_calls[0].id",
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": '{"a":' * 9999 + "1" + "}" * 9999}}],
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 99 + "]" * 99}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"role": "assistant", "function_call": "f"}, "messages[0].function_call"),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": []}}, "messages[0].function_call.arguments"),
        ({"role": "assistant", "reasoning_content": ["x"]}, "messages[0].reasoning_content"),
        ({"role": "tool", "tool_call_id": 3, "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "tool", "content": [{"city": "Paris"}]}, "messages[0].content[0].type"),
    ],
)
def test_what_is_malformed_is_named(message: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        one(message)
    assert caught.value.param == param


def test_an_image_is_refused_by_its_path() -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(UnsupportedField) as caught:
        one({"role": "user", "content": parts})
    assert caught.value.param == "messages[0].content[1]"


def test_no_messages() -> None:
    with pytest.raises(InvalidRequest, match="at least one"):
        normalize_messages([], "")


def test_deep_nesting_is_refused() -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(RequestError, match="levels deep"):
        one({"role": "user", "content": "x", "extra": deep})


def test_a_call_written_the_old_way_is_a_tool_call() -> None:
    call = {"name": "f", "arguments": '{"a": 1}'}
    message = one({"role": "assistant", "content": None, "function_call": call})
    assert "function_call" not in message
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]


URL = "data:image/png;base64,AAAA"


def seen(content: object, style: PartStyle = "either") -> tuple[object, list[ImagePart]]:
    """The content as the template gets it, and the images."""
    found = normalize_messages([{"role": "user", "content": content}], "", style, no_images=None)
    return found.messages[0]["content"], found.images


def test_images_leave_a_place_in_their_order() -> None:
    text = {"type": "text", "text": "a"}
    content = [text, {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, "b"]
    content.append({"type": "image_url", "image_url": "http://x/y"})
    parts, images = seen(content)
    assert parts == [text, {"type": "image"}, {"type": "text", "text": "b"}, {"type": "image"}]
    assert images == [
        ImagePart("messages[0].content[1].image_url.url", URL, "low"),
        ImagePart("messages[0].content[3].image_url", "http://x/y", "auto"),
    ]


def test_contents_in_the_style_that_the_template_reads() -> None:
    assert seen("a", "either") == ("a", [])
    assert seen("a", "parts") == ([{"type": "text", "text": "a"}], [])
    assert seen(None, "parts") == ([{"type": "text", "text": ""}], [])
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert seen(parts, "either") == seen(parts, "parts") == (parts, [])
    assert seen(parts, "text") == ("a\nb", [])


@pytest.mark.parametrize(
    ("part", "style", "no_images", "words"),
    [
        ({"image_url": {"url": URL}}, "either", "this model reads text only", "but this model reads text only"),
        ({"image_url": {"url": URL}}, "text", None, "has no place for one"),
        ({"image_url": {}}, "parts", None, "url is required"),
        ({"image_url": None}, "parts", None, "url is required"),
        ({"image_url": {"url": URL, "detail": "x"}}, "parts", None, "detail must be one of auto, low, high"),
    ],
)
def test_images_that_are_refused(part: dict[str, Any], style: PartStyle, no_images: str | None, words: str) -> None:
    message = {"role": "user", "content": [{"type": "image_url", **part}]}
    with pytest.raises(RequestError, match=words) as caught:
        normalize_messages([message], "", style, no_images)
    assert caught.value.param is not None
    assert caught.value.param.startswith("messages[0].content[0]")
