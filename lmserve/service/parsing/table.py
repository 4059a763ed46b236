"""Which models write which way: one line for each family, and how a model's family is found."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmserve.service.parsing import (
    deepseek,
    gemma,
    glm,
    granite,
    harmony,
    hermes,
    llama,
    mistral,
    pythonic,
    qwen_xml,
    tool_request,
)
from lmserve.service.parsing.answers import Openings, read_reasoning, read_text_and_calls
from lmserve.service.parsing.events import OutputParser
from lmserve.service.parsing.family import CallSyntax, Family, ParserInput, Reasoning
from lmserve.service.parsing.reader import Steps
from lmserve.service.parsing.response_template import ResponseTemplateParser, parser_maker, template_reasoning
from lmserve.service.parsing.turn import Answer, GeneratorParser, Turn
from lmserve.service.tools import Tool

_MISTRAL_ID = string.ascii_letters + string.digits

REASONINGS = (
    Reasoning("<think>", "</think>"),
    mistral.THINK,
    Reasoning("<seed:think>", "</seed:think>"),
    Reasoning("<|START_THINKING|>", "<|END_THINKING|>"),
    Reasoning("<reasoning>", "</reasoning>"),
    granite.PHRASES,
)
"""Of families that have none of their own; a model has those that its template or vocabulary knows."""

Ways = tuple[Reasoning, ...]


@dataclass(frozen=True, slots=True)
class FamilyLine:
    """One line of the table."""

    name: str
    recognised_by: tuple[tuple[str, ...], ...]
    """A model is of this family whose template holds all texts of one of these groups."""
    syntax: CallSyntax
    answer: Callable[[Ways], Answer]
    """Of the model's ways of reasoning, how its answers are read."""
    markers: tuple[str, ...]
    reasoning: Reasoning | None = None
    """The family's own, which each of its models has; ``REASONINGS`` are not looked for."""
    before_content: str = ""
    make_call_id: Callable[[], str] = lambda: f"call_{secrets.token_hex(12)}"

    def family(self, ways: Ways) -> Family:
        """As a model of these ways of reasoning has it."""
        answer = self.answer(ways)
        reasoning = self.reasoning or (ways[0] if ways else None)
        of_reasoning = tuple(marker for way in ways for marker in (way.begin, way.end))
        return Family(
            name=self.name,
            syntax=self.syntax,
            reasoning=reasoning,
            make_parser=lambda given: GeneratorParser(given, answer),
            markers=(*self.markers, *(marker for marker in of_reasoning if marker not in self.markers)),
            make_call_id=self.make_call_id,
            before_content=self.before_content,
        )


def _mistral_id() -> str:
    """Nine characters: templates of this family refuse others."""
    return "".join(secrets.choice(_MISTRAL_ID) for _ in range(9))


def _text(
    *openings: Callable[[Turn], Openings], before: Callable[[Turn], Steps] | None = None
) -> Callable[[Ways], Answer]:
    """Reasoning, then text with calls. ``before``: what is read first, where the request has tools."""

    def of(ways: Ways) -> Answer:
        def answer(turn: Turn) -> Steps:
            yield from read_reasoning(turn, ways)
            if before is not None and turn.tools:
                yield from before(turn)
            found = {marker: call for some in openings for marker, call in some(turn).items()} if turn.tools else {}
            yield from read_text_and_calls(turn, found)

        return answer

    return of


def _granite(ways: Ways) -> Answer:
    def answer(turn: Turn) -> Steps:
        yield from read_reasoning(turn, ways)
        responds = yield from granite.read_response_marker(turn)
        calls = granite.openings(turn) if turn.tools else {}
        yield from read_text_and_calls(turn, {**calls, **(granite.response_end(turn) if responds else {})})

    return answer


def _gemma_4(_: Ways) -> Answer:
    def answer(turn: Turn) -> Steps:
        yield from gemma.read_begun_thought(turn)
        calls = {**gemma.openings(turn), **tool_request.openings(turn)} if turn.tools else {}
        yield from read_text_and_calls(turn, {turn.marker(gemma.CHANNEL): gemma.read_channel, **calls})

    return answer


_REQUEST = tool_request.openings

FAMILIES = (
    FamilyLine(
        "harmony",
        ((harmony.CHANNEL, harmony.MESSAGE),),
        harmony.SYNTAX,
        lambda _: harmony.answer,
        harmony.MARKERS,
        harmony.REASONING,
        harmony.BEFORE_CONTENT,
    ),
    FamilyLine(
        "gemma4",
        ((gemma.GEMMA_4.open,), (gemma.THOUGHT.begin.rstrip(),)),
        tool_request.SYNTAX,
        _gemma_4,
        (*gemma.MARKERS, *tool_request.MARKERS),
        gemma.THOUGHT,
    ),
    FamilyLine(
        "function_gemma",
        ((gemma.FUNCTION_GEMMA.open,),),
        tool_request.SYNTAX,
        _text(gemma.function_openings, _REQUEST),
        (*gemma.FUNCTION_MARKERS, *tool_request.MARKERS),
    ),
    FamilyLine(
        "deepseek_v3",
        ((deepseek.CALL, "```json"),),
        deepseek.FENCED_SYNTAX,
        _text(deepseek.openings),
        deepseek.MARKERS,
    ),
    FamilyLine("deepseek_v31", ((deepseek.CALL,),), deepseek.PLAIN_SYNTAX, _text(deepseek.openings), deepseek.MARKERS),
    FamilyLine(
        "mistral_named",
        ((mistral.OPEN, mistral.ARGS),),
        mistral.NAMED_SYNTAX,
        _text(mistral.openings),
        mistral.MARKERS,
        make_call_id=_mistral_id,
    ),
    FamilyLine(
        "mistral",
        ((mistral.OPEN,),),
        mistral.ARRAY_SYNTAX,
        _text(mistral.openings),
        mistral.MARKERS,
        make_call_id=_mistral_id,
    ),
    FamilyLine(
        "granite",
        ((granite.OPEN,), ("<|start_of_role|>", granite.PHRASES.begin)),
        granite.SYNTAX,
        _granite,
        granite.MARKERS,
    ),
    FamilyLine(
        "glm", ((glm.KEY,),), tool_request.SYNTAX, _text(glm.openings, _REQUEST), (*glm.MARKERS, *tool_request.MARKERS)
    ),
    FamilyLine(
        "qwen_xml",
        ((qwen_xml.FUNCTION, qwen_xml.PARAMETER),),
        tool_request.SYNTAX,
        _text(qwen_xml.openings, _REQUEST),
        (*qwen_xml.MARKERS, *tool_request.MARKERS),
    ),
    FamilyLine("hermes", ((hermes.OPEN,),), hermes.SYNTAX, _text(hermes.openings), hermes.MARKERS),
    FamilyLine(
        "pythonic",
        ((pythonic.OPEN,), ("func_name1(params_name1=",), ("<|header_start|>", "ipython")),
        tool_request.SYNTAX,
        _text(pythonic.openings, _REQUEST, before=llama.read_whole),
        (*pythonic.MARKERS, *tool_request.MARKERS),
    ),
    FamilyLine(
        "llama",
        ((llama.TAG,), ("<|start_header_id|>", "ipython"), ("<|start_header_id|>", '"parameters"')),
        llama.SYNTAX,
        _text(llama.openings, before=llama.read_whole),
        llama.MARKERS,
    ),
    FamilyLine("tool_request", (), tool_request.SYNTAX, _text(_REQUEST), tool_request.MARKERS),
)
"""A model is of the first family that it is recognised as."""
_DEFAULT = FAMILIES[-1]


def find_family(template_source: str | None, tokenizer: Any) -> Family:
    """Of a model, by its chat template and its tokenizer.

    The template says what the model is used to: a marker that only the vocabulary has may be a relative's. Reasoning
    markers are looked for in both, for templates leave them out of what they render. Where no line of the table fits
    and the tokenizer has a response template, it is that.
    """
    source = template_source or ""
    added = frozenset(_added_tokens(tokenizer))
    ways = tuple(way for way in REASONINGS if any(mark in source or mark in added for mark in (way.begin, way.end)))
    for line in FAMILIES:
        if any(all(text in source for text in group) for group in line.recognised_by):
            return line.family(ways if line.reasoning is None else ())
    if getattr(tokenizer, "response_template", None) is not None:
        try:
            return _by_response_template(tokenizer, added)
        except ValueError:
            pass  # a template that cannot be used is as good as none
    return _DEFAULT.family(ways)


def needs_parser(family: Family, tools: Sequence[Tool]) -> bool:
    """Whether an output has to be parsed at all. If not, all of it is content."""
    return bool(tools) or family.reasoning is not None


def _by_response_template(tokenizer: Any, added: frozenset[str]) -> Family:
    make = parser_maker(tokenizer)

    def make_parser(given: ParserInput) -> OutputParser:
        return ResponseTemplateParser(given, make)

    return replace(
        _DEFAULT.family(()),
        name="response_template",
        reasoning=template_reasoning(tokenizer),
        make_parser=make_parser,
        markers=tuple(sorted(added)),
    )


def _added_tokens(tokenizer: Any) -> Sequence[str]:
    read = getattr(tokenizer, "get_added_vocab", None)
    return tuple(read()) if read is not None else ()
