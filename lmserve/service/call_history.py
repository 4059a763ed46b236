"""Calls, their results and reasoning of earlier turns, in the shape that a chat template reads."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

from lmserve.service.messages import PartStyle
from lmserve.service.parsing.family import CallSyntax
from lmserve.service.template_abilities import REASONING_KEYS, TemplateAbilities
from lmserve.service.tool_words import join_contents, to_json, write_calls, write_result

_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")

Message = dict[str, Any]


def has_history(messages: Sequence[Message]) -> bool:
    """Whether there is anything for ``fit_history`` to do."""
    keys = {"tool_calls", *REASONING_KEYS}
    return any(
        message["role"] == "tool" or message["role"] == "assistant" and not keys.isdisjoint(message)
        for message in messages
    )


def fit_history(
    messages: Sequence[Message], abilities: TemplateAbilities, syntax: CallSyntax, style: PartStyle = "text"
) -> list[Message]:
    """Normalized messages as a template with these abilities shows them whole.

    Results stand in the order of their calls, for many templates do not write ids. Calls beyond what the template
    shows in one message follow in messages of their own, each with its result. What it does not know at all is
    written into contents: calls in ``syntax``, results as words of the user, one message for all of them.
    Arguments that are no JSON object, where the template wants one, are its value ``arguments``.
    """
    return _Fitter(abilities, syntax, style).fit(messages)


class _Fitter:
    """One chat on its way."""

    def __init__(self, abilities: TemplateAbilities, syntax: CallSyntax, style: PartStyle) -> None:
        self._abilities = abilities
        self._syntax = syntax
        self._empty: str | list[dict[str, str]] = [{"type": "text", "text": ""}] if style == "parts" else ""
        self._fitted: list[Message] = []
        self._ends_with_result = False
        """The last message is the user's, and holds results in our words."""
        self._used_ids: set[str] = set()

    def fit(self, messages: Sequence[Message]) -> list[Message]:
        calls = [call for message in messages for call in message.get("tool_calls", ())]
        self._used_ids = {call["id"] for call in calls if call.get("id")}
        i = 0
        while i < len(messages):
            message = messages[i]
            i += 1
            if message["role"] == "tool":
                self._add_result(message)
            elif message["role"] == "assistant":
                end = i
                while end < len(messages) and messages[end]["role"] == "tool" and message.get("tool_calls"):
                    end += 1
                self._add_turn(message, messages[i:end])
                i = end
            else:
                self._add(message)
        return self._fitted

    def _add(self, message: Message) -> None:
        if self._ends_with_result and message["role"] == "user":  # many templates demand that roles alternate
            content = join_contents(self._fitted.pop()["content"], message["content"], "\n\n")
            message = {**message, "content": content}
        self._fitted.append(message)
        self._ends_with_result = False

    def _add_turn(self, message: Message, results: Sequence[Message]) -> None:
        """What the assistant said, and the results of its calls."""
        message, calls = self._with_reasoning(message), self._named(message.get("tool_calls", []))
        message.pop("tool_calls", None)
        if not calls:
            return self._add(message)
        found, others = _match(calls, results)
        knows = self._abilities.call_arguments is not None
        one_each = self._abilities.max_calls == 1 if knows else not self._syntax.may_repeat
        groups = [[i] for i in range(len(calls))] if one_each else [list(range(len(calls)))]
        for group in groups:
            self._add(self._calling(message, [calls[i] for i in group]))
            for result in (result for i in group for result in found[i]):
                self._add_result(result)
            message = {"role": "assistant", "content": self._empty}
        for result in others:
            self._add_result(result)
        return None

    def _with_reasoning(self, message: Message) -> Message:
        """Reasoning under the template's key; nowhere if it has none."""
        thoughts = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
        fitted = {key: value for key, value in message.items() if key not in REASONING_KEYS}
        key, content = self._abilities.reasoning_key, message["content"]
        if not thoughts or key is None:
            return fitted
        if content and message.get("tool_calls") and self._abilities.reasoning_excludes_content:
            # Such a template takes content beside calls for reasoning anyway.
            if isinstance(content, list):
                content = "\n".join(part["text"] for part in content if part["type"] == "text")
            thoughts, fitted["content"] = "\n\n".join(filter(None, (thoughts, content))), self._empty
        return {**fitted, key: thoughts}

    def _named(self, calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Each with an id and a type."""
        named = []
        for call in calls:
            call_id = call.get("id") or self._new_id()
            named.append({**call, "id": call_id, "type": call.get("type") or "function"})
        return named

    def _new_id(self) -> str:
        """Not of another call. Nine letters and digits, which suits every template."""
        new = next(each for i in itertools.count() if (each := f"call{i:05}") not in self._used_ids)
        self._used_ids.add(new)
        return new

    def _calling(self, message: Message, calls: Sequence[dict[str, Any]]) -> Message:
        """The message, with its calls."""
        if self._abilities.call_arguments is None:
            texts = [(call["function"]["name"], _as_text(call["function"]["arguments"])) for call in calls]
            written = write_calls(texts, self._syntax)
            return {**message, "content": join_contents(message["content"], written, "\n")}
        fitted = []
        for call in calls:
            arguments = call["function"]["arguments"]
            if self._abilities.call_arguments == "string":
                arguments = _as_text(arguments)
            elif not isinstance(arguments, dict):
                arguments = {"arguments": arguments}
            function = {**call["function"], "arguments": arguments}
            fitted.append({**call, "id": self._id(call["id"]), "function": function})
        return {**message, "tool_calls": fitted}

    def _add_result(self, message: Message) -> None:
        if self._abilities.shows_results:
            if "tool_call_id" in message:
                message = {**message, "tool_call_id": self._id(message["tool_call_id"])}
            return self._add(message)
        content = write_result(message.get("name", ""), message["content"])
        if self._fitted and self._fitted[-1]["role"] == "user":
            last = self._fitted.pop()
            content = join_contents(last["content"], content, "\n")
        self._fitted.append({"role": "user", "content": content})
        self._ends_with_result = True
        return None

    def _id(self, call_id: str) -> str:
        """As the template wants it: the same for a call and its result."""
        if not self._abilities.wants_short_ids or _SHORT_ID.fullmatch(call_id):
            return call_id
        return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def _as_text(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else to_json(arguments)


def _match(calls: Sequence[dict[str, Any]], results: Sequence[Message]) -> tuple[list[list[Message]], list[Message]]:
    """The results of each call, which now say whose they are, and those of none.

    A result without an id, as ``function`` messages are, is that of the next call of its name; without a name, too, of
    the next call that has none yet.
    """
    found: list[list[Message]] = [[] for _ in calls]
    others = []
    for result in sorted(results, key=lambda each: "tool_call_id" not in each):  # the sure ones first
        if "tool_call_id" in result:
            fits = [i for i, call in enumerate(calls) if call["id"] == result["tool_call_id"]]
        else:
            fits = [
                i
                for i, call in enumerate(calls)
                if not found[i] and result.get("name") in (None, call["function"]["name"])
            ]
        if not fits:
            others.append(result)
            continue
        i = min(fits, key=lambda each: len(found[each]))
        name = result.get("name") or calls[i]["function"]["name"]
        found[i].append({**result, "tool_call_id": calls[i]["id"], "name": name})
    return found, others
