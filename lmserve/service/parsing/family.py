"""How the models of one family write reasoning and calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmserve.service.parsing.events import OutputParser
from lmserve.service.tools import Tool


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The markers around what a model thinks. Control tokens are written by their names."""

    begin: str
    end: str


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How calls whose arguments are JSON are written: ``begin call (separator call)* end``.

    A call is ``before_name NAME after_name ARGUMENTS after_arguments``. Control tokens are written by their names. This
    is what a grammar enforces for ``tool_choice`` "required" or a named tool; the family's parser reads it.
    """

    before_name: str
    after_name: str
    after_arguments: str
    begin: str = ""
    separator: str = ""
    end: str = ""
    may_repeat: bool = True
    """Whether an answer may have several calls."""


@dataclass(frozen=True, slots=True)
class ParserInput:
    """What a parser has to know."""

    prompt: str
    """The rendered prompt, or its end: it may have begun the reasoning, or closed it."""
    tools: Sequence[Tool]
    """That may be called; empty: calls are not looked for, and what looks like one is content."""
    is_control: Callable[[str], bool]
    """Whether a marker is a control token of this model's tokenizer: then it comes as ``control(name)``; else text."""


@dataclass(frozen=True, slots=True)
class Family:
    """One line of the table."""

    name: str
    syntax: CallSyntax
    reasoning: Reasoning | None
    make_parser: Callable[[ParserInput], OutputParser]
    markers: tuple[str, ...]
    """Control tokens, by name, that the parser wants to see. Others are left out of its input."""
    make_call_id: Callable[[], str]
    before_content: str = ""
    """What stands before an answer without calls, after the reasoning if there is any. A grammar begins behind it."""
