"""Tools that a client offers to the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from lmserve.errors import InvalidRequest
from lmserve.service.messages import check_nesting

MAX_TOOLS = 128
NAME_PATTERN = "^[a-zA-Z0-9_.-]{1,64}$"
_STRICT = {None: False, False: False, True: True, "false": False, "true": True}
"""Some clients write the boolean as a string."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON Schema of the arguments, an object; as the client wrote it. Empty: any object."""
    strict: bool = False
    """The arguments are enforced also where the model is free to call or not."""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What the model may do with the tools."""

    mode: Literal["none", "auto", "required"]
    """``required``: at least one call, and nothing else."""
    name: str | None = None
    """With ``required``: of this tool, exactly once."""


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of one request."""

    tools: tuple[Tool, ...]
    choice: ToolChoice
    parallel: bool = True
    """Whether the model may call more than once in one answer."""

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """Those that the choice leaves."""
        if self.choice.mode == "none":
            return ()
        if self.choice.name is not None:
            return tuple(tool for tool in self.tools if tool.name == self.choice.name)
        return self.tools


def make_toolbox(
    tools: object = None,
    tool_choice: object = None,
    parallel_tool_calls: object = None,
    *,
    functions: object = None,
    function_call: object = None,
) -> Toolbox | None:
    """The tools of a request, from the fields of its body; None if it offers none.

    ``functions`` and ``function_call`` are how tools were written before ``tools`` and ``tool_choice``, and mean the
    same. The parameters' schemas are checked where they are compiled.

    Raises:
        InvalidRequest: ``param`` is the path of what is at fault.
    """
    for old, new, names in (
        (functions, tools, ("functions", "tools")),
        (function_call, tool_choice, ("function_call", "tool_choice")),
    ):
        if old is not None and new is not None:
            raise InvalidRequest(f"{names[0]} and {names[1]} exclude each other.", names[0])
    if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
        raise InvalidRequest("parallel_tool_calls must be a boolean.", "parallel_tool_calls")
    offered = _read_tools(tools) if functions is None else _read_functions(functions)
    if function_call is not None:
        choice = _read_function_call(function_call)
    else:
        choice, allowed = _read_choice(tool_choice)
        if allowed is not None:
            offered = _restrict(offered, allowed)
    _check_choice(choice, offered, "function_call" if function_call is not None else "tool_choice")
    return Toolbox(offered, choice, parallel_tool_calls is not False) if offered else None


def _read_tools(tools: object) -> tuple[Tool, ...]:
    found = []
    for i, tool in enumerate(_array(tools, "tools")):
        path = f"tools[{i}]"
        if not isinstance(tool, dict):
            raise InvalidRequest(f"{path} must be an object.", path)
        kind = tool.get("type")
        if kind != "function":
            words = f"{path}.type must be 'function'" if kind is None else f"{path}.type is {kind!r}"
            raise InvalidRequest(f"{words}: tools of other types, custom ones too, are not offered.", f"{path}.type")
        function = tool.get("function")
        if function is None and "name" in tool:
            raise InvalidRequest(
                f"{path}.function is required: name, description and parameters stand in it, not beside type.",
                f"{path}.function",
            )
        found.append(_read_function(function, f"{path}.function"))
    return _distinct(found, "tools[{}].function.name")


def _read_functions(functions: object) -> tuple[Tool, ...]:
    found = [_read_function(each, f"functions[{i}]") for i, each in enumerate(_array(functions, "functions"))]
    return _distinct(found, "functions[{}].name")


def _array(value: object, path: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidRequest(f"{path} must be an array.", path)
    if len(value) > MAX_TOOLS:
        raise InvalidRequest(f"{path} has {len(value)} entries, the limit is {MAX_TOOLS}.", path)
    return value


def _read_function(function: object, path: str) -> Tool:
    if not isinstance(function, dict):
        raise InvalidRequest(f"{path} is required and must be an object.", path)
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name, re.ASCII):
        raise InvalidRequest(
            f"{path}.name is required: 1 to 64 characters of a-z, A-Z, 0-9, '_', '.' and '-'.", f"{path}.name"
        )
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(f"{path}.description must be a string.", f"{path}.description")
    strict = function.get("strict")
    if not isinstance(strict, (bool, str, type(None))) or strict not in _STRICT:
        raise InvalidRequest(f"{path}.strict must be a boolean.", f"{path}.strict")
    parameters = _read_parameters(function.get("parameters"), f"{path}.parameters")
    return Tool(name, description or "", parameters, _STRICT[strict])


def _read_parameters(parameters: object, path: str) -> dict[str, Any]:
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"{path} must be a JSON Schema, an object.", path)
    if parameters.get("type", "object") != "object":
        raise InvalidRequest(f"{path}.type must be 'object': arguments have names.", f"{path}.type")
    check_nesting(parameters, path)
    return parameters


def _distinct(tools: list[Tool], path: str) -> tuple[Tool, ...]:
    """``path``: of a name, with a place for the index."""
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in seen:
            where = path.format(i)
            raise InvalidRequest(f"{where}: there is another {tool.name!r}.", where)
        seen.add(tool.name)
    return tuple(tools)


def _read_choice(choice: object) -> tuple[ToolChoice, list[str] | None]:
    """And the names that it allows, in their order; None: all."""
    if choice is None or choice == "auto":
        return ToolChoice("auto"), None
    if choice == "none":
        return ToolChoice("none"), None
    if choice == "required":
        return ToolChoice("required"), None
    if not isinstance(choice, dict):
        raise InvalidRequest("tool_choice must be 'none', 'auto', 'required' or an object.", "tool_choice")
    kind = choice.get("type", "function")  # huggingface_hub leaves it out
    if kind == "function":
        return ToolChoice("required", _named(choice.get("function"), "tool_choice.function")), None
    if kind == "allowed_tools":
        return _read_allowed(choice.get("allowed_tools"), "tool_choice.allowed_tools")
    raise InvalidRequest("tool_choice.type must be 'function' or 'allowed_tools'.", "tool_choice.type")


def _read_allowed(allowed: object, path: str) -> tuple[ToolChoice, list[str]]:
    if not isinstance(allowed, dict):
        raise InvalidRequest(f"{path} is required and must be an object.", path)
    mode, tools = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequest(f"{path}.mode must be 'auto' or 'required'.", f"{path}.mode")
    if not isinstance(tools, list) or not tools:
        raise InvalidRequest(f"{path}.tools must be an array of at least one tool.", f"{path}.tools")
    names = []
    for i, tool in enumerate(tools):
        where = f"{path}.tools[{i}]"
        if not isinstance(tool, dict) or tool.get("type", "function") != "function":
            raise InvalidRequest(f"{where} must be an object of type 'function'.", where)
        names.append(_named(tool.get("function"), f"{where}.function"))
    return ToolChoice(mode), names


def _read_function_call(call: object) -> ToolChoice:
    if call == "none":
        return ToolChoice("none")
    if call == "auto":
        return ToolChoice("auto")
    if not isinstance(call, dict):
        raise InvalidRequest("function_call must be 'none', 'auto' or an object with a name.", "function_call")
    return ToolChoice("required", _named(call, "function_call"))


def _named(function: object, path: str) -> str:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequest(f"{path}.name is required and must be a string.", f"{path}.name")
    return name


def _restrict(tools: tuple[Tool, ...], names: list[str]) -> tuple[Tool, ...]:
    offered = {tool.name for tool in tools}
    for i, name in enumerate(names):
        if name not in offered:
            path = f"tool_choice.allowed_tools.tools[{i}].function.name"
            raise InvalidRequest(f"{path}: no tool is named {name!r}.", path)
    return tuple(tool for tool in tools if tool.name in names)


def _check_choice(choice: ToolChoice, tools: tuple[Tool, ...], path: str) -> None:
    if choice.mode == "required" and not tools:
        raise InvalidRequest(f"{path} asks for a call, but there are no tools.", path)
    if choice.name is not None and all(tool.name != choice.name for tool in tools):
        where = f"{path}.function.name" if path == "tool_choice" else f"{path}.name"
        raise InvalidRequest(f"{where}: no tool is named {choice.name!r}.", where)
