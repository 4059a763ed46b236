"""The fields by which tools and reasoning are asked for, wherever a chat is rendered."""

from __future__ import annotations

from typing import Any, Protocol

from lmserve.api.schema.fields import honoured
from lmserve.api.schema.sampling import ANY
from lmserve.service.chat_template import EFFORTS
from lmserve.service.tools import MAX_TOOLS, NAME_PATTERN, Toolbox, make_toolbox

TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": NAME_PATTERN},
                "description": {"type": ["string", "null"]},
                "parameters": {"type": ["object", "null"]},
                "strict": {},
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
TOOLS = honoured(
    "functions that the model may call",
    kind="array of objects",
    allowed=f"at most {MAX_TOOLS}",
    schema={"type": ["array", "null"], "items": TOOL},
)
TOOL_CHOICE = honoured(
    "none, auto, required, or a function that has to be called; the last two are enforced",
    kind="string or object",
    default="auto with tools, else none",
    schema={"anyOf": [{"enum": ["none", "auto", "required", None]}, {"type": "object"}]},
)
PARALLEL_TOOL_CALLS = honoured("the model may call more than once in one answer", default="true")
FUNCTIONS = honoured("what tools were called before", kind="array of objects")
FUNCTION_CALL = honoured("what tool_choice was called before", kind="string or object", schema=ANY)
REASONING_EFFORT = honoured(
    "how much the model shall think, as far as its chat template reads it",
    default="the template's",
    allowed=", ".join(EFFORTS),
    schema={"enum": [*EFFORTS, None]},
)
TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "reasoning_effort")


class HasTools(Protocol):
    """A body with these fields. What they may hold is the service's to say."""

    tools: list[Any] | None
    tool_choice: Any
    parallel_tool_calls: bool | None
    functions: list[Any] | None
    function_call: Any


def toolbox_of(body: HasTools) -> Toolbox | None:
    """Raises ``InvalidRequest`` as ``make_toolbox``."""
    return make_toolbox(
        body.tools,
        body.tool_choice,
        body.parallel_tool_calls,
        functions=body.functions,
        function_call=body.function_call,
    )
