"""What a chat template does with tools, calls, results and reasoning: seen by rendering small chats with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser

from lmserve.service.messages import PartStyle

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Where an assistant's message may have what the model thought, the most usual first."""
REASONING_SWITCHES = ("reasoning_effort", "enable_thinking", "thinking")
"""Variables by which templates let people control reasoning."""

Render = Callable[[list[dict[str, Any]], "list[dict[str, Any]] | None"], str]
"""Messages and tools made into text. Raises whatever a template may raise."""

_QUESTION, _ANSWER = "lmserve asks", "lmserve answers"
_CALLED = ("lmserve_first", "lmserve_second")
_RESULTS = ("lmserve found this", "lmserve found that")
_DESCRIPTION = "lmserve describes"
_KEY, _VALUE = "lmserve_key", "lmserve value"
_SHORT_IDS = ("abcDEF123", "abcDEF456")  # what Mistral's templates demand: nine letters and digits
_LONG_ID = "call_0123456789abcdefghijklmn"
_TOOL = {
    "type": "function",
    "function": {
        "name": "lmserve_tool",
        "description": _DESCRIPTION,
        "parameters": {"type": "object", "properties": {"lmserve_option": {"type": "string"}}},
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateAbilities:
    """What one template can do. Where it raises at a probe, it cannot."""

    takes_system: bool = False
    """A system message is shown."""
    shows_tools: bool = False
    call_arguments: Literal["object", "string"] | None = None
    """How the arguments of an assistant's calls must be given; None: it does not show calls."""
    max_calls: int | None = None
    """How many calls of one message it shows; None: all."""
    shows_results: bool = False
    """Of calls. False also where calls are not known: such a template writes any role alike (plain ChatML), and then
    the model never learned the role of a tool."""
    wants_short_ids: bool = False
    """Ids of calls must be nine letters and digits."""
    reasoning_key: str | None = None
    """Where it reads the reasoning of an assistant's message. Most show that of the latest turn alone."""
    reasoning_excludes_content: bool = False
    """A message with calls may have reasoning or content, not both."""


def find_abilities(render: Render, style: PartStyle, *, with_tools: bool) -> TemplateAbilities:
    """A dozen renderings at most, of a few words each.

    ``with_tools``: chats are probed with a tool at hand, for which a tokenizer may have a template of its own.
    """
    probe = _Probe(render, style, [_TOOL] if with_tools else None)
    takes_system = probe.takes_system()
    shows_tools = with_tools and probe.shows_tools()
    arguments = probe.call_arguments()
    if arguments is None:
        return TemplateAbilities(
            takes_system=takes_system, shows_tools=shows_tools, reasoning_key=probe.reasoning_key(None)
        )
    reasoning_key = probe.reasoning_key(arguments)
    return TemplateAbilities(
        takes_system=takes_system,
        shows_tools=shows_tools,
        call_arguments=arguments,
        max_calls=None if probe.shows_two_calls(arguments) else 1,
        shows_results=probe.shows_result(arguments),
        wants_short_ids=not probe.shows_call(arguments, _LONG_ID),
        reasoning_key=reasoning_key,
        reasoning_excludes_content=reasoning_key is not None and probe.reasoning_excludes(reasoning_key, arguments),
    )


def switches_read(sources: Sequence[str]) -> frozenset[str]:
    """Which of REASONING_SWITCHES a template looks at, by the names of its variables."""
    environment = jinja2.Environment(extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    found: set[str] = set()
    for source in sources:
        try:
            found |= jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError:  # it cannot be rendered, either
            continue
    return frozenset(found.intersection(REASONING_SWITCHES))


class _GenerationTag(jinja2.ext.Extension):
    """transformers' own tag, around what the assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Probe:
    """One template, and the questions that are asked of it."""

    def __init__(self, render: Render, style: PartStyle, tools: list[dict[str, Any]] | None) -> None:
        self._render = render
        self._style = style
        self._tools = tools
        self._user = self._message("user", _QUESTION)

    def takes_system(self) -> bool:
        return _ANSWER in self._text([self._message("system", _ANSWER), self._user])

    def shows_tools(self) -> bool:
        text = self._text([self._user])
        return "lmserve_tool" in text and _DESCRIPTION in text

    def call_arguments(self) -> Literal["object", "string"] | None:
        if self.shows_call("object"):
            return "object"
        return "string" if self.shows_call("string") else None

    def shows_call(self, arguments: str, call_id: str = _SHORT_IDS[0]) -> bool:
        """Also if only before a result, or only where there is none."""
        call = self._calling([self._call(0, arguments, call_id)])
        result = self._result(0, call_id)
        return any(_is_call(self._text(chat), arguments) for chat in ([self._user, call, result], [self._user, call]))

    def shows_two_calls(self, arguments: str) -> bool:
        calls = self._calling([self._call(i, arguments, _SHORT_IDS[i]) for i in range(2)])
        text = self._text([self._user, calls, *(self._result(i, _SHORT_IDS[i]) for i in range(2))])
        return all(name in text for name in _CALLED)

    def shows_result(self, arguments: str) -> bool:
        call = self._calling([self._call(0, arguments, _SHORT_IDS[0])])
        return _RESULTS[0] in self._text([self._user, call, self._result(0, _SHORT_IDS[0])])

    def reasoning_key(self, arguments: str | None) -> str | None:
        """Asked of the last message, and, if calls are shown, of one that waits for a result."""
        thoughts = {key: f"lmserve thinks in {key}." for key in REASONING_KEYS}
        chats = [[self._user, {**self._message("assistant", _ANSWER), **thoughts}]]
        if arguments is not None:
            call = {**self._calling([self._call(0, arguments, _SHORT_IDS[0])]), **thoughts}
            chats.append([self._user, call, self._result(0, _SHORT_IDS[0])])
        for chat in chats:
            text = self._text(chat)
            for key, thought in thoughts.items():
                if thought in text:
                    return key
        return None

    def reasoning_excludes(self, key: str, arguments: str) -> bool:
        call = {**self._calling([self._call(0, arguments, _SHORT_IDS[0])]), key: _DESCRIPTION}
        call["content"] = self._content(_ANSWER)
        return not self._text([self._user, call, self._result(0, _SHORT_IDS[0])])

    def _text(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self._render(messages, self._tools)
        except Exception:  # a template of another mind
            return ""

    def _message(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": self._content(text)}

    def _content(self, text: str) -> str | list[dict[str, str]]:
        return [{"type": "text", "text": text}] if self._style == "parts" else text

    def _calling(self, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._message("assistant", ""), "tool_calls": calls}

    def _call(self, i: int, arguments: str, call_id: str) -> dict[str, Any]:
        given = {_KEY: _VALUE} if arguments == "object" else f'{{"{_KEY}": "{_VALUE}"}}'
        return {"id": call_id, "type": "function", "function": {"name": _CALLED[i], "arguments": given}}

    def _result(self, i: int, call_id: str) -> dict[str, Any]:
        return {**self._message("tool", _RESULTS[i]), "tool_call_id": call_id, "name": _CALLED[i]}


def _is_call(text: str, arguments: str) -> bool:
    """Whether a call is there, its arguments neither in Python's notation nor quoted once more."""
    if _CALLED[0] not in text:
        return False
    if arguments == "string":
        return f'{{"{_KEY}": "{_VALUE}"}}' in text
    return _KEY in text and _VALUE in text and f"'{_KEY}'" not in text
