"""Tools, calls and results in our own words, for chat templates that have none for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lmserve.service.messages import PartStyle
from lmserve.service.parsing.family import CallSyntax
from lmserve.service.tools import Tool, Toolbox


def describe_tools(toolbox: Toolbox, syntax: CallSyntax) -> str:
    """What a model is told of the tools that it may call. Short: models of 135M parameters read it."""
    tools = "\n".join(to_json(show_tool(tool)["function"]) for tool in toolbox.callable_tools)
    several = toolbox.parallel and toolbox.choice.name is None and syntax.may_repeat
    call = write_calls([("NAME", '{"ARGUMENT": VALUE}')], syntax)
    twice = " You may write several calls, one after the other." if several else ""
    return (
        f"You have these tools:\n{tools}\n"
        f"To call a tool, write its name and its arguments exactly so:\n{call}\n"
        f"Then wait for the result.{twice} {_choice(toolbox)}"
    )


def put_in_front(
    messages: Sequence[dict[str, Any]], text: str, *, takes_system: bool, style: PartStyle = "text"
) -> list[dict[str, Any]]:
    """The chat with ``text`` in its system message, after what stands there; else in the first of the user's."""
    roles = ("system", "developer") if takes_system else ("user",)
    at = next((i for i, message in enumerate(messages) if message["role"] in roles), None)
    if at is None or (takes_system and at > 0):
        content = [{"type": "text", "text": text}] if style == "parts" else text
        return [{"role": roles[0], "content": content}, *messages]
    own = messages[at]["content"]
    content = join_contents(own, text, "\n\n") if takes_system else join_contents(text, own, "\n\n")
    return [*messages[:at], {**messages[at], "content": content}, *messages[at + 1 :]]


def _choice(toolbox: Toolbox) -> str:
    if toolbox.choice.name is not None:
        return f"You must call {toolbox.choice.name} now, and write nothing else."
    if toolbox.choice.mode == "required":
        return "You must call a tool now, and write nothing else."
    return "Where no tool helps, answer without a call."


def show_tool(tool: Tool) -> dict[str, Any]:
    """As chat templates read it. Some iterate over the properties without a look whether there are any."""
    defaults: dict[str, Any] = {"type": "object", "properties": {}}
    missing = {key: value for key, value in defaults.items() if key not in tool.parameters}
    function = {"name": tool.name, "description": tool.description, "parameters": {**missing, **tool.parameters}}
    return {"type": "function", "function": function}


def write_calls(calls: Sequence[tuple[str, str]], syntax: CallSyntax) -> str:
    """Calls as the model would have written them. ``calls``: each a name and the JSON text of its arguments."""
    written = (f"{syntax.before_name}{name}{syntax.after_name}{text}{syntax.after_arguments}" for name, text in calls)
    return f"{syntax.begin}{syntax.separator.join(written)}{syntax.end}"


def write_result(name: str, content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
    """What a call came to, as a user says it. ``name``: of the tool; empty if unknown."""
    begin = f"[TOOL_RESULT]{name}: " if name else "[TOOL_RESULT]"
    return join_contents(join_contents(begin, content, ""), "[END_TOOL_RESULT]", "")


def join_contents(
    first: str | list[dict[str, str]], second: str | list[dict[str, str]], between: str
) -> str | list[dict[str, str]]:
    """One content of two. ``between``: the text that stands between two texts."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}{between}{second}" if first and second else first or second
    parts = [*_parts(first), *_parts(second)]
    at = len(_parts(first))
    if 0 < at < len(parts) and parts[at - 1]["type"] == parts[at]["type"] == "text":
        text = parts[at - 1]["text"] + between + parts[at]["text"]
        parts[at - 1 : at + 1] = [{"type": "text", "text": text}]
    return parts


def _parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [part for part in content if part != {"type": "text", "text": ""}]


def to_json(value: Any) -> str:
    """Readable by models: no escapes for what is not ASCII."""
    return json.dumps(value, ensure_ascii=False)
