"""Whether two schemas have no value in common: `oneOf` is enforced where that can be proved, as `anyOf`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lmserve.grammar.references import Schema

_MAX_STEPS = 12
"""Of `$ref`, `allOf` and properties that a proof may follow; it ends recursion, too."""
_MAX_COMPARISONS = 100_000
"""In one schema, whose branches may have branches of their own; after it nothing more is proved."""
_Literal = tuple[str, object]


class Proofs:
    """Tells schemas apart by types, by `const` and `enum`, and by a property that one requires and both describe."""

    def __init__(self, targets: Mapping[str, Schema]) -> None:
        self._targets = targets
        self._num_comparisons = 0

    def disjoint(self, first: Schema, second: Schema, steps: int = _MAX_STEPS) -> bool:
        """True only if no value satisfies both."""
        if first is False or second is False:
            return True
        self._num_comparisons += 1
        is_given_up = steps <= 0 or self._num_comparisons > _MAX_COMPARISONS
        if isinstance(first, bool) or isinstance(second, bool) or is_given_up:
            return False
        for one, other in ((first, second), (second, first)):
            for keyword in ("anyOf", "oneOf"):
                if keyword in one and all(self.disjoint(branch, other, steps - 1) for branch in one[keyword]):
                    return True
        firsts, seconds = list(self._together(first, steps)), list(self._together(second, steps))
        return any(self._apart(one, other, steps) for one in firsts for other in seconds) or self._branches_apart(
            firsts, seconds, first, second, steps
        )

    def _branches_apart(
        self,
        firsts: list[dict[str, Any]],
        seconds: list[dict[str, Any]],
        first: dict[str, Any],
        second: dict[str, Any],
        steps: int,
    ) -> bool:
        """The choices that stand behind a `$ref` or within an `allOf`."""
        for parts, whole, other in ((firsts, first, second), (seconds, second, first)):
            for part in parts:
                choices = [part[keyword] for keyword in ("anyOf", "oneOf") if keyword in part and part is not whole]
                if any(all(self.disjoint(branch, other, steps - 1) for branch in choice) for choice in choices):
                    return True
        return False

    def _together(self, schema: Schema, steps: int) -> Iterator[dict[str, Any]]:
        """The schema and every schema that holds whenever it does."""
        if isinstance(schema, bool) or steps <= 0:
            return
        yield schema
        if "$ref" in schema:
            yield from self._together(self._targets[schema["$ref"]], steps - 1)
        for branch in schema.get("allOf", ()):
            yield from self._together(branch, steps - 1)

    def _apart(self, first: dict[str, Any], second: dict[str, Any], steps: int) -> bool:
        shared = _types(first) & _types(second)
        if not shared:
            return True
        one, other = _literals(first), _literals(second)
        if one is not None and other is not None and not one & other:
            return True
        if shared != {"object"}:
            return False
        required = {*first.get("required", ()), *second.get("required", ())}
        return any(self.disjoint(_property(first, name), _property(second, name), steps - 1) for name in required)


def _types(schema: dict[str, Any]) -> set[str]:
    for keyword, values in (("const", [schema.get("const")]), ("enum", schema.get("enum"))):
        if keyword in schema:
            return {_type(value) for value in values or []}
    listed = schema.get("type", ["null", "boolean", "number", "string", "array", "object"])
    return {"number" if name == "integer" else name for name in ([listed] if isinstance(listed, str) else listed)}


def _type(value: object) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def _literals(schema: dict[str, Any]) -> set[_Literal] | None:
    """The values allowed, where they are listed and all of them scalars."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is None or any(isinstance(value, list | dict) for value in values):
        return None
    return {(_type(value), value) for value in values}


def _property(schema: dict[str, Any], name: str) -> Schema:
    if name in schema.get("properties", {}):
        member: Schema = schema["properties"][name]
        return member
    if "patternProperties" in schema:
        return True
    rest: Schema = schema.get("additionalProperties", True)
    return rest
