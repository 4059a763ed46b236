"""Finding a model's family, and what holds for each of them: any text is parsed, and what is enforced is read."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmserve.service.parsing.events import CONTROL_BEGIN, CONTROL_END, ContentText, control
from lmserve.service.parsing.family import CallSyntax, ParserInput
from lmserve.service.parsing.reader import CONTROL
from lmserve.service.parsing.table import FAMILIES, REASONINGS, find_family, needs_parser
from tests.service.parsing.replay import BY_NAME, Folded, fold, replay, tool

TOOLS = [
    tool("get_weather", {"type": "object", "properties": {"city": {"type": "string"}}}),
    tool("list-all.v2", {}),
]
CALLS = [("get_weather", '{"city": "Os\\"lo"}'), ("list-all.v2", "{}"), ("get_weather", '{"a": [{"b": "}"}, null]}')]
HARMONY_PROMPT = "<|start|>assistant"
NAMES = [line.name for line in FAMILIES]


class Tokenizer:
    """The part of a tokenizer that families are found by."""

    def __init__(self, *added: str) -> None:
        self._added = added

    def get_added_vocab(self) -> dict[str, int]:
        return {text: index for index, text in enumerate(self._added)}


def written(syntax: CallSyntax, calls: Sequence[tuple[str, str]]) -> str:
    bodies = [f"{syntax.before_name}{name}{syntax.after_name}{args}{syntax.after_arguments}" for name, args in calls]
    return syntax.begin + syntax.separator.join(bodies) + syntax.end


def as_controls(text: str, names: Sequence[str]) -> str:
    if not names:
        return text
    longest_first = sorted(names, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda match: control(match.group()), text)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_grammar_enforces_is_read_as_those_calls(name: str, special: bool) -> None:
    """Also behind reasoning, and however it is cut."""
    family = BY_NAME[name]
    names = family.markers if special else ()
    thoughts = [""]
    if family.reasoning is not None:
        thoughts.append(f"{family.reasoning.begin}Hm.{family.reasoning.end}")
    for calls in [CALLS[:1], CALLS[1:2], *([CALLS] if family.syntax.may_repeat else [])]:
        for thought in thoughts:
            text = as_controls(thought + written(family.syntax, calls), names)
            prompt = HARMONY_PROMPT if name == "harmony" else ""
            parser_input = ParserInput(prompt, TOOLS, frozenset(names).__contains__)
            for pieces in ([text], list(text)):
                assert fold(replay(family, parser_input, pieces)) == Folded("Hm." if thought else None, None, calls)


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_before_content_is_no_content(name: str) -> None:
    family = BY_NAME[name]
    text = f"{family.before_content}Yes."
    if family.reasoning is not None:
        text = f"{family.reasoning.begin}Hm.{family.reasoning.end}{text}"
    prompt = HARMONY_PROMPT if name == "harmony" else ""
    events = replay(family, ParserInput(prompt, (), lambda _: False), [text])
    assert fold(events) == Folded(None if family.reasoning is None else "Hm.", "Yes.", [])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "harmony"])
def test_reasoning_that_the_prompt_begins_is_known_before_any_text(name: str) -> None:
    family = BY_NAME[name]
    assert family.reasoning is not None
    parser = family.make_parser(ParserInput(f"…{family.reasoning.begin}\n", (), lambda _: False))
    assert parser.is_reasoning
    parser.push(f"Hm.{family.reasoning.end}Yes.")
    assert not parser.is_reasoning


BITS = sorted(
    {
        *(marker for family in BY_NAME.values() for marker in family.markers),
        *(way.end for way in REASONINGS),
        *(part for line in FAMILIES for part in (line.syntax.before_name, line.syntax.after_name) if part),
        *'{}[]()":,;=\\ \n',
        *("call:", "to=functions.", "thought\n", "analysis", "<function=", "<parameter=city>", "</parameter>"),
        *("</function>", "get_weather", '"name"', '"arguments"', "null", "city", "Oslo", "é", "\\n", "<", "<|", "```"),
        *(written(line.syntax, CALLS[:1]) for line in FAMILIES),
    }
)
SOUPS = st.lists(st.sampled_from(BITS), max_size=14)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(NAMES), bits=SOUPS, special=st.booleans(), has_tools=st.booleans(), data=st.data())
def test_any_text_is_parsed_and_every_cut_agrees(
    name: str, bits: list[str], special: bool, has_tools: bool, data: st.DataObject
) -> None:
    family = BY_NAME[name]
    names = family.markers if special else ()
    text = as_controls("".join(bits), names)
    prompt = data.draw(st.sampled_from(["", "<think>\n", HARMONY_PROMPT, "<|channel>thought\n"]))
    parser_input = ParserInput(prompt, TOOLS if has_tools else (), frozenset(names).__contains__)
    whole = replay(family, parser_input, [text])
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=5).map(sorted))
    borders = [0, *cuts, len(text)]
    pieces = [text[start:end] for start, end in zip(borders, borders[1:], strict=False)]
    assert fold(replay(family, parser_input, pieces)) == fold(replay(family, parser_input, list(text))) == fold(whole)
    end = 0
    for event in whole:
        if isinstance(event, ContentText):
            assert event.start >= end
            end = event.start + len(event.text)
            assert text[event.start : end] == event.text
            assert CONTROL_BEGIN not in event.text
            assert CONTROL_END not in event.text
    if not has_tools:
        assert not fold(whole).calls


REMOVED = re.compile(
    "|".join(
        re.escape("".join(marker.split()))
        for marker in (
            *(marker for way in REASONINGS for marker in (way.begin, way.end)),
            *("<response>", "</response>", "<|channel>thought", "thought", "<channel|>"),
        )
    )
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from([name for name in NAMES if name != "harmony"]), bits=SOUPS, special=st.booleans())
def test_without_tools_all_but_markers_of_reasoning_and_blanks_is_kept(
    name: str, bits: list[str], special: bool
) -> None:
    """Harmony is left out: its headers say nothing, and may hold anything."""
    family = BY_NAME[name]
    names = family.markers if special else ()
    text = as_controls("".join(bits), names)
    folded = fold(replay(family, ParserInput("", (), frozenset(names).__contains__), [text]))
    kept = "".join(((folded.reasoning or "") + "\n" + (folded.content or "")).split())
    plain = "".join(CONTROL.sub("", text).split())
    assert sorted(REMOVED.sub("", kept)) == sorted(REMOVED.sub("", plain))


def test_a_family_is_known_by_its_template() -> None:
    templates = {
        "harmony": "<|start|>assistant<|channel|>analysis<|message|>",
        "gemma4": "<|turn>model <|tool_call>call:",
        "function_gemma": "<start_function_call>call:",
        "deepseek_v3": "<｜tool▁call▁begin｜>' + type + '<｜tool▁sep｜>' + name + '```json",
        "deepseek_v31": "<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>",
        "mistral_named": "[TOOL_CALLS]' + name + '[ARGS]",
        "mistral": "[AVAILABLE_TOOLS] [TOOL_CALLS] [",
        "granite": "<|start_of_role|>assistant<|end_of_role|><|tool_call|>",
        "glm": "<tool_call>{name}<arg_key>",
        "qwen_xml": "<tool_call>\n<function=example>\n<parameter=one>",
        "hermes": "<tool_call>\n{name, arguments}</tool_call>",
        "pythonic": "<|header_start|>ipython<|header_end|>",
        "llama": "<|start_header_id|>ipython<|end_header_id|> <|python_tag|>",
        "tool_request": "<|im_start|>",
    }
    assert list(templates) == NAMES
    for name, source in templates.items():
        assert find_family(source, Tokenizer()).name == name
    assert find_family(None, Tokenizer("<tool_call>")).name == "tool_request"


def test_reasoning_is_known_by_template_or_vocabulary() -> None:
    assert find_family("<tool_call>", Tokenizer()).reasoning is None
    for family in (
        find_family("<tool_call>{{ content.split('</think>') }}", Tokenizer()),
        find_family("<tool_call>", Tokenizer("<think>", "</think>")),
        find_family(None, Tokenizer("<think>")),
    ):
        assert family.reasoning is not None
        assert family.reasoning.begin == "<think>"
        assert {"<think>", "</think>"} <= set(family.markers)
    harmony = find_family("<|channel|><|message|><think>", Tokenizer())
    assert harmony.reasoning is not None
    assert harmony.reasoning.begin == "<|channel|>analysis<|message|>"


def test_a_parser_is_needed_for_tools_and_for_reasoning() -> None:
    plain, thinking = find_family("<tool_call>", Tokenizer()), find_family("<tool_call><think>", Tokenizer())
    assert [needs_parser(plain, ()), needs_parser(thinking, ()), needs_parser(plain, TOOLS)] == [False, True, True]


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_calls_differ_and_have_their_familys_shape(name: str) -> None:
    ids = {BY_NAME[name].make_call_id() for _ in range(50)}
    shape = r"[0-9A-Za-z]{9}" if name.startswith("mistral") else r"call_[0-9a-f]{24}"
    assert len(ids) == 50
    assert all(re.fullmatch(shape, each) for each in ids)
