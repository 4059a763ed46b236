"""The fields of request bodies that are not honoured: which are refused, and when they are harmless.

Three ways for a field, and no fourth: it is a field of the endpoint's struct and honoured; it stands here and is
refused, unless its value asks for nothing; it is reported in the header ``x-lmserve-ignored``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that lmserve knows and does not offer."""

    why: str
    harmless: tuple[Any, ...] = ()
    """Values that ask for nothing. null always is one."""


_NO_TOOLS = "tool calls are not offered yet"
_NO_AUDIO = "audio is not offered"

_EVERYWHERE: Mapping[str, Refused] = {
    "draft_model": Refused("speculative decoding is not offered yet", ("",)),
    "ttl": Refused("idle unloading is not offered yet"),
    "keep_alive": Refused("idle unloading is not offered yet"),
}

CHAT_REFUSED: Mapping[str, Refused] = {
    **_EVERYWHERE,
    "tools": Refused(_NO_TOOLS, ([],)),
    "tool_choice": Refused(_NO_TOOLS, ("none", "auto")),
    "functions": Refused(_NO_TOOLS, ([],)),
    "function_call": Refused(_NO_TOOLS, ("none", "auto")),
    "parallel_tool_calls": Refused(_NO_TOOLS, (True, False)),
    "response_format": Refused("structured output is not offered yet", ({"type": "text"},)),
    "reasoning_effort": Refused("control of reasoning is not offered yet; see chat_template_kwargs"),
    "audio": Refused(_NO_AUDIO),
    "modalities": Refused(_NO_AUDIO, (["text"],)),
    "prediction": Refused("predicted outputs are not offered"),
    "web_search_options": Refused("web search is not offered"),
    "images": Refused("images are not offered yet", ([],)),
    "echo": Refused("echo is not offered", (False,)),
}

COMPLETION_REFUSED: Mapping[str, Refused] = {
    **_EVERYWHERE,
    "echo": Refused("echo is not offered yet", (False,)),
    "suffix": Refused("fill-in-the-middle is not offered yet", ("",)),
    "response_format": Refused("structured output is not offered yet", ({"type": "text"},)),
    "images": Refused("images are not offered yet", ([],)),
}
