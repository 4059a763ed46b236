from __future__ import annotations

from typing import Any

import pytest

from lmserve.service.call_history import fit_history, has_history
from lmserve.service.messages import PartStyle, normalize_messages
from lmserve.service.parsing.family import CallSyntax
from lmserve.service.parsing.tool_request import SYNTAX as DEFAULT_SYNTAX
from lmserve.service.template_abilities import TemplateAbilities

KNOWS_ALL = TemplateAbilities(takes_system=True, shows_tools=True, call_arguments="object", shows_results=True)
KNOWS_NOTHING = TemplateAbilities(takes_system=True)
QUESTION = {"role": "user", "content": "Weather?"}

Message = dict[str, Any]


def fit(
    messages: list[Message],
    abilities: TemplateAbilities,
    *,
    syntax: CallSyntax = DEFAULT_SYNTAX,
    style: PartStyle = "text",
) -> list[Message]:
    """As a chat template does it: normalized first."""
    normalized = normalize_messages(messages, "", style, no_images=None).messages
    return fit_history(normalized, abilities, syntax, style)


def call(name: str = "f", arguments: object = "{}", call_id: str | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if call_id is None else {"id": call_id, **made}


def calls(*made: dict[str, Any], **keys: Any) -> Message:
    return {"role": "assistant", "content": None, "tool_calls": list(made), **keys}


def result(content: object, call_id: str | None = None, **keys: Any) -> Message:
    made = {"role": "tool", "content": content, **keys}
    return made if call_id is None else {**made, "tool_call_id": call_id}


def arguments_of(messages: list[Message]) -> list[object]:
    return [made["function"]["arguments"] for message in messages for made in message.get("tool_calls", [])]


def test_a_chat_without_calls_or_reasoning_needs_nothing() -> None:
    assert not has_history([QUESTION, {"role": "assistant", "content": "Rain."}, QUESTION])
    assert has_history([QUESTION, calls(call())])
    assert has_history([QUESTION, result("x")])
    assert has_history([{"role": "assistant", "content": "x", "reasoning": "y"}])


def test_a_template_that_knows_all_gets_calls_and_results_as_they_are() -> None:
    messages = [QUESTION, calls(call("f", '{"a": 1}', "x"), call("g", "{}", "y")), result("1", "x"), result("2", "y")]
    assert fit(messages, KNOWS_ALL) == [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call("f", {"a": 1}, "x"), call("g", {}, "y")]},
        result("1", "x", name="f"),
        result("2", "y", name="g"),
    ]


def test_results_stand_in_the_order_of_their_calls() -> None:
    messages = [calls(call("f", "{}", "x"), call("g", "{}", "y")), result("2", "y"), result("1", "x"), result("?", "z")]
    assert [message["content"] for message in fit(messages, KNOWS_ALL)[1:]] == ["1", "2", "?"]
    written = fit(messages, KNOWS_NOTHING)[1]["content"]
    assert written.index("f: 1") < written.index("g: 2") < written.index("[TOOL_RESULT]?")


@pytest.mark.parametrize(
    ("given", "as_object", "as_string"),
    [
        ('{"a": "é"}', {"a": "é"}, '{"a": "é"}'),
        ({"a": [1, None]}, {"a": [1, None]}, '{"a": [1, null]}'),
        ("", {}, "{}"),
        (None, {}, "{}"),
        ("null", {}, "{}"),
        ("{broken", {"arguments": "{broken"}, "{broken"),
        ("[1]", {"arguments": "[1]"}, "[1]"),
        ('{"a": "\\ud800"}', {"arguments": '{"a": "\\ud800"}'}, '{"a": "\\ud800"}'),
    ],
)
def test_arguments_in_the_templates_shape(given: object, as_object: object, as_string: str) -> None:
    takes_strings = TemplateAbilities(call_arguments="string", shows_results=True)
    assert arguments_of(fit([calls(call("f", given))], KNOWS_ALL)) == [as_object]
    assert arguments_of(fit([calls(call("f", given))], takes_strings)) == [as_string]
    [written] = fit([calls(call("f", given))], KNOWS_NOTHING)
    assert written["content"] == f'[TOOL_REQUEST]{{"name": "f", "arguments": {as_string}}}[END_TOOL_REQUEST]'


def test_ids_that_a_template_refuses_are_mapped_alike_in_calls_and_results() -> None:
    short = TemplateAbilities(call_arguments="object", shows_results=True, wants_short_ids=True)
    messages = [calls(call("f", "{}", "call_1"), call("g", "{}", "abcDEF123")), result("1", "call_1"), result("2", "x")]
    message, first, other = fit(messages, short)
    ids = [made["id"] for made in message["tool_calls"]]
    assert ids[1] == "abcDEF123"
    assert first["tool_call_id"] == ids[0] != "call_1"
    assert other["tool_call_id"] not in ("x", *ids)
    assert all(len(each) == 9 and each.isalnum() for each in (*ids, other["tool_call_id"]))
    assert fit(messages, short) == fit(messages, short), "a prompt that changes could not be cached"


def test_missing_ids_and_types_are_filled_in() -> None:
    untyped = {"id": None, "function": {"name": "f", "arguments": "{}"}}
    messages = [calls(untyped, call("g", "{}", "call00000")), result("1"), result("2", "call00000")]
    message, first, second = fit(messages, KNOWS_ALL)
    ids = [made["id"] for made in message["tool_calls"]]
    assert [made["type"] for made in message["tool_calls"]] == ["function", "function"]
    assert ids == ["call00001", "call00000"], "not that of another call"
    assert (first["content"], first["tool_call_id"]) == ("1", ids[0])
    assert (second["content"], second["tool_call_id"]) == ("2", ids[1])


def test_the_old_way_of_calls_and_results() -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    message, found = fit([old, {"role": "function", "name": "f", "content": "1"}], KNOWS_ALL)
    assert message["tool_calls"] == [call("f", {"a": 1}, found["tool_call_id"])]
    assert found == result("1", found["tool_call_id"], name="f")


def test_results_without_ids_find_their_calls_by_name() -> None:
    messages = [calls(call("f", "{}", "x"), call("g", "{}", "y")), result("2", name="g"), result("1", name="f")]
    assert [(m["tool_call_id"], m["content"]) for m in fit(messages, KNOWS_ALL)[1:]] == [("x", "1"), ("y", "2")]


def test_a_result_with_an_id_goes_before_one_without() -> None:
    messages = [calls(call("f", "{}", "x"), call("f", "{}", "y")), result("2"), result("1", "x")]
    assert [(m["tool_call_id"], m["content"]) for m in fit(messages, KNOWS_ALL)[1:]] == [("x", "1"), ("y", "2")]


def test_calls_beyond_the_first_get_messages_of_their_own() -> None:
    one = TemplateAbilities(call_arguments="object", shows_results=True, max_calls=1, reasoning_key="thinking")
    messages = [
        QUESTION,
        calls(call("f", "{}", "x"), call("g", "{}", "y"), content="Let me see.", reasoning_content="Hm."),
        result("2", "y"),
        result("1", "x"),
        {"role": "assistant", "content": "Done."},
    ]
    empty = {"role": "assistant", "content": ""}
    assert fit(messages, one) == [
        QUESTION,
        {**empty, "content": "Let me see.", "thinking": "Hm.", "tool_calls": [call("f", {}, "x")]},
        result("1", "x", name="f"),
        {**empty, "tool_calls": [call("g", {}, "y")]},
        result("2", "y", name="g"),
        {"role": "assistant", "content": "Done."},
    ]


def test_what_a_template_does_not_know_is_written_and_turns_alternate() -> None:
    messages = [
        QUESTION,
        calls(call("f", '{"a": 1}', "x"), call("g", "{}", "y"), content="Let me see."),
        result("1", "x"),
        result([{"type": "text", "text": "2"}], "y"),
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Rain."},
    ]
    assert fit(messages, KNOWS_NOTHING) == [
        QUESTION,
        {
            "role": "assistant",
            "content": 'Let me see.\n[TOOL_REQUEST]{"name": "f", "arguments": {"a": 1}}[END_TOOL_REQUEST]\n'
            '[TOOL_REQUEST]{"name": "g", "arguments": {}}[END_TOOL_REQUEST]',
        },
        {
            "role": "user",
            "content": "[TOOL_RESULT]f: 1[END_TOOL_RESULT]\n[TOOL_RESULT]g: 2[END_TOOL_RESULT]\n\nAnd?",
        },
        {"role": "assistant", "content": "Rain."},
    ]


def test_a_result_of_no_call_joins_the_users_words() -> None:
    assert fit([QUESTION, result("1", "x")], KNOWS_NOTHING) == [
        {"role": "user", "content": "Weather?\n[TOOL_RESULT]1[END_TOOL_RESULT]"}
    ]
    assert fit([QUESTION, result("1", "x")], KNOWS_ALL) == [QUESTION, result("1", "x")]


def test_a_syntax_for_one_call_is_not_repeated() -> None:
    once = CallSyntax(before_name="<", after_name="|", after_arguments=">", may_repeat=False)
    messages = [calls(call("f", "{}", "x"), call("g", "{}", "y")), result("1", "x"), result("2", "y")]
    contents = [message["content"] for message in fit(messages, KNOWS_NOTHING, syntax=once)]
    assert contents[0::2] == ["<f|{}>", "<g|{}>"]
    assert contents[1::2] == ["[TOOL_RESULT]f: 1[END_TOOL_RESULT]", "[TOOL_RESULT]g: 2[END_TOOL_RESULT]"]


def test_contents_of_parts_stay_parts() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [calls(call("f", "{}", "x")), result([picture], "x"), QUESTION]
    written, found = fit(messages, KNOWS_NOTHING, style="parts")
    assert written["content"] == [
        {"type": "text", "text": '[TOOL_REQUEST]{"name": "f", "arguments": {}}[END_TOOL_REQUEST]'}
    ]
    assert found["content"] == [
        {"type": "text", "text": "[TOOL_RESULT]f: "},
        {"type": "image"},
        {"type": "text", "text": "[END_TOOL_RESULT]\n\nWeather?"},
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_the_templates_key_or_none(key: str) -> None:
    message = {"role": "assistant", "content": "Rain.", key: "Hm."}
    bare = {"role": "assistant", "content": "Rain."}
    reads = TemplateAbilities(reasoning_key="reasoning_content")
    assert fit([message], reads) == [{**bare, "reasoning_content": "Hm."}]
    assert fit([message], KNOWS_NOTHING) == [bare]
    assert fit([{**message, key: None}], reads) == [bare]
    assert fit([{**message, key: ""}], reads) == [bare]


def test_content_beside_a_call_is_reasoning_where_both_may_not_be() -> None:
    either = TemplateAbilities(
        call_arguments="object", max_calls=1, reasoning_key="thinking", reasoning_excludes_content=True
    )
    [message] = fit([calls(call(), content="Let me see.", reasoning="Hm.")], either)
    assert (message["thinking"], message["content"]) == ("Hm.\n\nLet me see.", "")
    [message] = fit([calls(call(), content="Let me see.")], either)
    assert (message.get("thinking"), message["content"]) == (None, "Let me see.")
    [message] = fit([{"role": "assistant", "content": "Rain.", "reasoning": "Hm."}], either)
    assert (message["thinking"], message["content"]) == ("Hm.", "Rain.")


def test_no_calls_is_nothing() -> None:
    assert fit([calls(content="Rain.")], KNOWS_ALL) == [{"role": "assistant", "content": "Rain."}]


def test_the_clients_messages_are_left_as_they_are() -> None:
    messages = [calls(call("f", '{"a": 1}', "call_1")), result("1", "call_1"), QUESTION]
    before = str(messages)
    for abilities in (KNOWS_ALL, KNOWS_NOTHING, TemplateAbilities(call_arguments="object", wants_short_ids=True)):
        fit(messages, abilities)
    assert str(messages) == before
