"""Grammars as text, in llguidance's own form: what travels to the worker and is compiled on both sides.

A grammar is a *body* (a JSON schema, a regular expression, some choices, a Lark grammar, tool calls) and what may stand
before it, the model's reasoning. Control tokens are asked for by their ids: see ``vocabulary``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import regex_to_lark

from lmserve.grammar.schema import JSON_OPTIONS

MAX_CALLS = 16
"""In one answer: a weak model would not stop by itself."""


@dataclass(frozen=True, slots=True)
class JsonBody:
    """A JSON text that a schema describes."""

    schema: Mapping[str, Any]
    """Out of ``enforceable``."""


@dataclass(frozen=True, slots=True)
class RegexBody:
    """A text that a regular expression matches as a whole (Rust's syntax)."""

    pattern: str


@dataclass(frozen=True, slots=True)
class ChoiceBody:
    """One of some texts."""

    choices: Sequence[str]


@dataclass(frozen=True, slots=True)
class LarkBody:
    """A text that a Lark grammar derives from its rule ``start``."""

    grammar: str


@dataclass(frozen=True, slots=True)
class Call:
    """A tool's call: the text around its arguments, and their schema."""

    before: str
    schema: Mapping[str, Any]
    after: str


@dataclass(frozen=True, slots=True)
class CallsBody:
    """One call or more: ``begin call (separator call)* end``."""

    calls: Sequence[Call]
    begin: str
    separator: str
    end: str
    repeats: bool


Body = JsonBody | RegexBody | ChoiceBody | LarkBody | CallsBody


@dataclass(frozen=True, slots=True)
class ReasoningFirst:
    """Reasoning may come before the body."""

    begin: str
    end: str
    state: Literal["begun", "possible"]
    """Whether the prompt has begun it, so that it has to be ended, or the model may begin it."""


@dataclass(frozen=True, slots=True)
class Structure:
    """What an output has to be."""

    bodies: Sequence[Body]
    """One of them."""
    reasoning: ReasoningFirst | None = None
    before_body: Sequence[str] = ()
    """Marker texts that have to come before each of the bodies; none: nothing has to."""
    healed: str = ""
    """Ordinary text that the whole begins with."""


def grammar_text(structure: Structure, control_ids: Mapping[str, int]) -> str:
    """``control_ids``: by name, the tokens that llguidance takes for control tokens."""
    bodies = [_body(body, control_ids) for body in structure.bodies]
    befores = [_literal(text, control_ids) for text in structure.before_body] or [""] * len(bodies)
    if structure.reasoning is None and len(bodies) == 1 and not any(befores) and not structure.healed:
        return json.dumps({"grammars": bodies})
    named = [{**body, "name": f"body{i}"} for i, body in enumerate(bodies)]
    alternatives = " | ".join(f"{before} @body{i}".strip() for i, before in enumerate(befores))
    healed = f"{json.dumps(structure.healed)} " if structure.healed else ""
    lines = [f"start: {healed}{_reasoning_prefix(structure.reasoning)}( {alternatives} )"]
    if structure.reasoning is not None:
        lines += _reasoning_rules(structure.reasoning, control_ids)
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(lines)}, *named]})


def body_text(body: Body) -> str:
    """A body alone, to be proved: it has no control tokens."""
    return json.dumps({"grammars": [_body(body, {})]})


def _reasoning_prefix(reasoning: ReasoningFirst | None) -> str:
    if reasoning is None:
        return ""
    return "thought BLANKS " if reasoning.state == "begun" else "(open thought BLANKS)? "


def _reasoning_rules(reasoning: ReasoningFirst, control_ids: Mapping[str, int]) -> list[str]:
    rules = [r"BLANKS: /[ \n\t]{0,4}/"]
    if reasoning.state == "possible":
        rules.append(f"open: {_literal(reasoning.begin, control_ids)}")
    end = _literal(reasoning.end, control_ids)
    if end.startswith("<["):  # no text has a control token in it, so that the first one is the end
        return [*rules, f"thought: ANYTHING {end}", r"ANYTHING: /(.|\n)*/"]
    return [*rules, rf"thought[lazy]: /(.|\n)*{regex_to_lark(re.escape(reasoning.end))}/"]


def _body(body: Body, control_ids: Mapping[str, int]) -> dict[str, Any]:
    match body:
        case JsonBody(schema):
            return {"json_schema": {**schema, "x-guidance": JSON_OPTIONS}}
        case RegexBody(pattern):
            return {"lark_grammar": f"start: /{regex_to_lark(pattern)}/"}
        case ChoiceBody(choices):
            return {"lark_grammar": "start: " + " | ".join(map(json.dumps, choices))}
        case LarkBody(grammar):
            return {"lark_grammar": grammar}
        case CallsBody():
            return {"lark_grammar": _calls(body, control_ids)}


def _calls(body: CallsBody, control_ids: Mapping[str, int]) -> str:
    def literal(text: str) -> str:
        return _literal(text, control_ids)

    more = f"({literal(body.separator)} call){{0,{MAX_CALLS - 1}}}" if body.repeats else ""
    lines = [
        f"start: {literal(body.begin)} call {more} {literal(body.end)}",
        "call: " + " | ".join(f"call{i}" for i in range(len(body.calls))),
    ]
    for i, call in enumerate(body.calls):
        schema = json.dumps({**call.schema, "x-guidance": JSON_OPTIONS})
        lines += [
            f"call{i}: {literal(call.before)} arguments{i} {literal(call.after)}",
            f"arguments{i}: %json {schema}",
        ]
    return "\n".join(lines)


def _literal(text: str, control_ids: Mapping[str, int]) -> str:
    """A text in Lark, each control token in it by its id."""
    names = sorted(filter(text.__contains__, control_ids), key=len, reverse=True)
    pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
    return " ".join(
        f"<[{control_ids[piece]}]>" if piece in control_ids else json.dumps(piece) for piece in pieces if piece
    )
