"""What an output has to be: a client's words made into a grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lmserve.errors import InvalidRequest
from lmserve.grammar.build import (
    Body,
    Call,
    CallsBody,
    ChoiceBody,
    JsonBody,
    LarkBody,
    ReasoningFirst,
    RegexBody,
    Structure,
    grammar_text,
)
from lmserve.grammar.closed import closed
from lmserve.grammar.schema import enforceable
from lmserve.service.parsing.family import CallSyntax, Family, Reasoning
from lmserve.service.tools import Tool, Toolbox

MAX_CHOICES = 1024
MAX_CHOICE_CHARACTERS = 4096
MAX_PATTERN_CHARACTERS = 8192
MAX_LARK_CHARACTERS = 65_536
Kind = Literal["json", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """What a client wants the output to be."""

    kind: Kind
    value: Any
    """A JSON schema, a regular expression, a list of texts, or a Lark grammar."""
    path: str
    """Of the field that says so."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A part of a structure, to be proved by itself, so that a refusal can name its field."""

    body: Body
    path: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A structure and its parts."""

    claims: Sequence[Claim]
    bodies: Sequence[Body]
    """The output is one of them."""
    num_calls: int = 0
    """How many of the bodies, from the first one, are calls."""


def make_plan(output: OutputFormat | None, toolbox: Toolbox | None, syntax: CallSyntax) -> Plan | None:
    """None if the output is free. Raises ``InvalidRequest`` as ``enforceable``.

    A required or named tool leaves nothing but calls. Where the model may call, an output format holds for what it says
    otherwise: the output is calls, or of the format.
    """
    claims: list[Claim] = []
    bodies: list[Body] = []
    mode = "none" if toolbox is None else toolbox.choice.mode
    if toolbox is not None and (mode == "required" or (mode == "auto" and output is not None)):
        schemas = {tool.name: _arguments(tool, i) for i, tool in enumerate(toolbox.tools)}
        wanted = toolbox.callable_tools
        claims += [
            Claim(JsonBody(schemas[tool.name]), _path(i)) for i, tool in enumerate(toolbox.tools) if tool in wanted
        ]
        repeats = toolbox.parallel and toolbox.choice.name is None and syntax.may_repeat
        bodies.append(_calls([(tool.name, schemas[tool.name]) for tool in wanted], syntax, repeats=repeats))
    num_calls = len(bodies)
    if output is not None and mode != "required":
        plan = make_output_plan(output)
        claims += plan.claims
        bodies += plan.bodies
    return Plan(claims, bodies, num_calls) if bodies else None


def make_output_plan(output: OutputFormat) -> Plan:
    """Of an output without calls. Raises ``InvalidRequest``."""
    body = _output_body(output)
    return Plan([Claim(body, output.path)], [body])


def make_grammar(plan: Plan, family: Family, prompt: str, control_ids: Mapping[str, int], healed: str = "") -> str:
    """The grammar of a chat's answer: the model may think first, as far as the prompt's end allows it."""
    befores = [""] * plan.num_calls + [family.before_content] * (len(plan.bodies) - plan.num_calls)
    reasoning = None if family.reasoning is None else _reasoning(family.reasoning, prompt)
    return grammar_text(Structure(plan.bodies, reasoning, befores, healed), control_ids)


def make_plain_grammar(plan: Plan, control_ids: Mapping[str, int], healed: str = "") -> str:
    """The grammar of a completion."""
    return grammar_text(Structure(plan.bodies, healed=healed), control_ids)


def _output_body(output: OutputFormat) -> Body:
    value, path = output.value, output.path
    match output.kind:
        case "json":
            return JsonBody(closed(enforceable(value, path)))
        case "regex":
            return RegexBody(_text(value, path, MAX_PATTERN_CHARACTERS))
        case "lark":
            return LarkBody(_text(value, path, MAX_LARK_CHARACTERS))
        case "choice":
            return ChoiceBody(_choices(value, path))


def _choices(value: object, path: str) -> Sequence[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise InvalidRequest(f"{path} must be an array of at least one string.", path)
    if len(value) > MAX_CHOICES:
        raise InvalidRequest(f"{path}: {len(value)} choices, the limit is {MAX_CHOICES}.", path)
    for i, text in enumerate(value):
        if not 0 < len(text) <= MAX_CHOICE_CHARACTERS:
            where = f"{path}[{i}]"
            raise InvalidRequest(f"{where} must have 1 to {MAX_CHOICE_CHARACTERS} characters.", where)
    return value


def _text(value: object, path: str, limit: int) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        raise InvalidRequest(f"{path} must be a string of 1 to {limit} characters.", path)
    return value


def _arguments(tool: Tool, index: int) -> dict[str, Any]:
    """The schema of a tool's arguments. A tool whose parameters say nothing of them gets an empty object."""
    schema = closed(enforceable({"type": "object", **tool.parameters}, _path(index)))
    return (
        {"type": "object", "properties": {}, "additionalProperties": False} if schema == {"type": "object"} else schema
    )


def _path(index: int) -> str:
    return f"tools[{index}].function.parameters"


def _calls(tools: Sequence[tuple[str, dict[str, Any]]], syntax: CallSyntax, *, repeats: bool) -> CallsBody:
    calls = [
        Call(f"{syntax.before_name}{name}{syntax.after_name}", schema, syntax.after_arguments) for name, schema in tools
    ]
    return CallsBody(calls, syntax.begin, syntax.separator, syntax.end, repeats)


def _reasoning(reasoning: Reasoning, prompt: str) -> ReasoningFirst | None:
    end = prompt.rstrip()
    if end.endswith(reasoning.end.rstrip()):
        return None  # the prompt says that nothing is to be thought
    begun = end.endswith(reasoning.begin.rstrip())
    return ReasoningFirst(reasoning.begin, reasoning.end, "begun" if begun else "possible")
