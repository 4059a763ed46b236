"""The keywords that are enforced, one method for each kind of value; every other key of a schema is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lmserve.errors import InvalidRequest
from lmserve.grammar.branches import Proofs
from lmserve.grammar.formats import FORMATS
from lmserve.grammar.patterns import Pattern, PatternError, before_a_last_newline, read_pattern
from lmserve.grammar.references import Pointer, References, Schema
from lmserve.grammar.values import MAX_NUMBER, check_number, check_text, check_value, inside, quoted

MAX_DEPTH = 32
"""Schemas within schemas."""
MAX_PROPERTIES = 1_000
"""Named properties and required names, in the whole schema."""
MAX_ENUM_VALUES = 10_000
"""Values of `enum`, in the whole schema."""
MAX_BRANCHES = 256
"""Members of one `anyOf`, `oneOf`, `allOf`, `prefixItems` or `patternProperties`."""
MAX_PATTERN_LENGTH = 1_024
"""Characters of one regular expression."""
MAX_COUNT = 100_000
"""For lower bounds on lengths and numbers of members; an upper bound above it is read as it."""
MAX_DIVISOR = 10_000
"""Of the least common multiple of all `multipleOf`: the grammar has a state for each remainder, and two may meet."""

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

_EXACT_FRACTIONS = {0.5: 5, 0.25: 25, 0.125: 125}
"""Parts whose multiples doubles hold exactly, and their digits."""

_LOWS, _HIGHS = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")

ANNOTATIONS = frozenset(
    {
        *("$comment", "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly"),
        *("contentMediaType", "contentEncoding", "contentSchema"),
    }
)
"""Keywords that say something about values and forbid none, by the specification; keys in `x-` are taken for such."""

_ORDER = (
    *("type", "properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
    *(
        "prefixItems",
        "items",
        "minItems",
        "maxItems",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
    ),
    *("multipleOf", "const", "enum", "$ref", "allOf", "anyOf", "oneOf"),
)
"""The order in which the grammar's engine gets keywords. It reads in turn, and what stands between two parts of one
condition (`properties` … `anyOf` … `additionalProperties`) makes it lose sight of the first."""


@dataclass(frozen=True)
class Place:
    """Where a schema stands: its JSON pointer, its path as the client reads it, and how many schemas are around it."""

    pointer: Pointer
    path: str
    depth: int

    def member(self, keyword: str, name: str) -> Place:
        """The schema by that name within the keyword's object."""
        return Place((*self.pointer, keyword, name), quoted(f"{self.path}.{keyword}", name), self.depth + 1)

    def item(self, keyword: str, index: int) -> Place:
        """The schema at that index of the keyword's array."""
        return Place((*self.pointer, keyword, str(index)), f"{self.path}.{keyword}[{index}]", self.depth + 1)

    def under(self, keyword: str) -> Place:
        """The schema that the keyword's value is."""
        return Place((*self.pointer, keyword), f"{self.path}.{keyword}", self.depth + 1)


class KeywordReader:
    """Reads the schemas of one request into what the grammar's engine gets, and keeps count of them.

    Every method raises InvalidRequest with the path of the keyword at fault.
    """

    def __init__(self, references: References, has_arrays_of_items: bool | None) -> None:
        self._references = references
        self._has_arrays_of_items = has_arrays_of_items
        self._num_properties = 0
        self._num_enum_values = 0
        self._common_multiple = 1
        self._choices: list[tuple[dict[str, Any], str, bool]] = []
        self._readers: dict[str, Callable[[Any, Place], Any]] = {
            **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), self._members),
            **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), self._list),
            **dict.fromkeys(("additionalProperties", "additionalItems"), self.read),
            **dict.fromkeys(("minItems", "minLength", "minProperties"), _least),
            **dict.fromkeys(("maxItems", "maxLength", "maxProperties"), _most),
            **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _bound),
            "items": self._items,
            "required": self._required,
            "enum": self._enum,
            "const": lambda value, place: check_value(value, place.path),
            "type": _type,
            "pattern": lambda value, place: _pattern(value, place.path).text,
            "format": _format,
            "multipleOf": self._divisor,
        }

    def read(self, schema: object, place: Place) -> Schema:
        """A schema and all that is within it."""
        if isinstance(schema, bool):
            self._references.add_place(place.pointer, schema)
            return schema
        if not isinstance(schema, dict):
            raise InvalidRequest(f"{place.path} must be a JSON Schema: an object, true or false.", place.path)
        if place.depth > MAX_DEPTH:
            raise InvalidRequest(f"{place.path} is nested deeper than {MAX_DEPTH} schemas, the limit.", place.path)
        cleaned: dict[str, Any] = {}
        self._references.add_place(place.pointer, cleaned)
        given: dict[str, Any] = {}
        for keyword, value in schema.items():
            if keyword in self._readers:
                given[keyword] = self._readers[keyword](value, place.under(keyword))
            else:
                self._without_reader(keyword, value, cleaned, place)
        self._fold_items(given, schema, place)
        self._fold_numbers(given)
        self._fold_formats(given)
        self._fold_properties(given, place)
        given.update(cleaned)  # the $ref
        cleaned.clear()
        cleaned.update((keyword, given[keyword]) for keyword in _ORDER if keyword in given)
        if "oneOf" in cleaned or "discriminator" in schema:
            self._choices.append((cleaned, place.path, "discriminator" in schema))
        return cleaned

    def _without_reader(self, keyword: str, value: object, cleaned: dict[str, Any], place: Place) -> None:
        path = quoted(place.path, keyword)
        if keyword == "$ref":
            cleaned["$ref"] = ""  # until all places are known
            self._references.add_reference(value, cleaned, path)
        elif keyword == "$anchor":
            self._references.add_anchor(value, place.pointer, path)
        elif keyword in ("$id", "id", "$schema"):
            if place.pointer or not isinstance(value, str):
                raise InvalidRequest(f"{path} is understood at the root only, as a string.", path)
        elif keyword == "uniqueItems" and value is False:
            pass  # forbids nothing
        elif keyword == "discriminator":
            if not isinstance(value, dict):
                raise InvalidRequest(f"{path} must be an object.", path)
        elif keyword not in ANNOTATIONS and (not keyword.startswith("x-") or keyword == "x-guidance"):
            raise InvalidRequest(f"{path} cannot be enforced: {keyword[:64]!r} is not a keyword known here.", path)

    def _members(self, value: object, place: Place) -> dict[str, Schema]:
        if not isinstance(value, dict):
            raise InvalidRequest(f"{place.path} must be an object of schemas.", place.path)
        keyword, around = place.pointer[-1], Place(place.pointer[:-1], place.path.rpartition(".")[0], place.depth - 1)
        if keyword == "properties":
            self._count_properties(len(value), place.path)
        if keyword == "patternProperties" and len(value) > MAX_BRANCHES:
            raise InvalidRequest(f"{place.path} has more than {MAX_BRANCHES} members, the limit.", place.path)
        members: dict[str, Schema] = {}
        for name, schema in value.items():
            member = around.member(keyword, name)
            if keyword == "properties":
                check_text(name, member.path)
            read = _name_pattern(name, member.path).text if keyword == "patternProperties" else name
            members[read] = self.read(schema, member)
        return members

    def _list(self, value: object, place: Place) -> list[Schema]:
        if not isinstance(value, list) or not value:
            raise InvalidRequest(f"{place.path} must be an array of schemas, at least one.", place.path)
        if len(value) > MAX_BRANCHES:
            raise InvalidRequest(f"{place.path} has more than {MAX_BRANCHES} members, the limit.", place.path)
        keyword, around = place.pointer[-1], Place(place.pointer[:-1], place.path.rpartition(".")[0], place.depth - 1)
        return [self.read(schema, around.item(keyword, i)) for i, schema in enumerate(value)]

    def _items(self, value: object, place: Place) -> Schema | list[Schema]:
        return self._list(value, place) if isinstance(value, list) else self.read(value, place)

    def _required(self, value: object, place: Place) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise InvalidRequest(f"{place.path} must be an array of strings.", place.path)
        if len(set(value)) != len(value):
            raise InvalidRequest(f"{place.path} names a property twice.", place.path)
        for i, name in enumerate(value):
            check_text(name, f"{place.path}[{i}]")
        self._count_properties(0, place.path, len(value))
        return value

    def _count_properties(self, named: int, path: str, required: int = 0) -> None:
        self._num_properties += named
        if max(self._num_properties, required) > MAX_PROPERTIES:
            raise InvalidRequest(f"{path}: the schema has more than {MAX_PROPERTIES:,} properties, the limit.", path)

    def _enum(self, value: object, place: Place) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise InvalidRequest(f"{place.path} must be an array of values, at least one.", place.path)
        self._num_enum_values += len(value)
        if self._num_enum_values > MAX_ENUM_VALUES:
            raise InvalidRequest(
                f"{place.path}: the schema has more than {MAX_ENUM_VALUES:,} enum values, the limit.", place.path
            )
        return [check_value(item, f"{place.path}[{i}]") for i, item in enumerate(value)]

    def _divisor(self, value: object, place: Place) -> int | float:
        number = check_number(value, place.path)
        if number <= 0:
            raise InvalidRequest(f"{place.path} must be above 0.", place.path)
        if isinstance(number, float) and number not in _EXACT_FRACTIONS:
            raise InvalidRequest(
                f"{place.path} must be a whole number, 0.5, 0.25 or 0.125: of others, validators round multiples.",
                place.path,
            )
        in_digits = number if isinstance(number, int) else _EXACT_FRACTIONS[number]
        self._common_multiple = math.lcm(self._common_multiple, in_digits)
        if self._common_multiple > MAX_DIVISOR:
            raise InvalidRequest(
                f"{place.path}: the schema's multipleOf have a common multiple above {MAX_DIVISOR:,}, the limit.",
                place.path,
            )
        return number

    def _fold_items(self, given: dict[str, Any], schema: dict[str, Any], place: Place) -> None:
        """An array of `items` becomes `prefixItems`. A schema has the one or the other: dialects differ in the rest."""
        path = place.path
        is_array = isinstance(schema.get("items"), list)
        if "additionalItems" in given and not is_array:
            at = f"{path}.additionalItems"
            raise InvalidRequest(f"{at} has no meaning without an array of items.", at)
        if is_array or "prefixItems" in given:
            if self._has_arrays_of_items not in (None, is_array) or (is_array and "prefixItems" in given):
                at = f"{path}.{'items' if is_array else 'prefixItems'}"
                raise InvalidRequest(f"{at}: a schema has prefixItems or arrays of items, by its dialect.", at)
            self._has_arrays_of_items = is_array
        if is_array:
            given["prefixItems"] = given.pop("items")
            if "additionalItems" in given:
                given["items"] = given.pop("additionalItems")

    @staticmethod
    def _fold_numbers(given: dict[str, Any]) -> None:
        """Bounds become inclusive ones that the engine reads exactly."""
        lows = [inside(given[name], is_least=True, is_exclusive=name != "minimum") for name in _LOWS if name in given]
        highs = [
            inside(given[name], is_least=False, is_exclusive=name != "maximum") for name in _HIGHS if name in given
        ]
        if lows:
            given["minimum"] = max(lows)
        if highs:
            given["maximum"] = min(highs)
        divisor = given.get("multipleOf")
        if divisor is not None and (given.get("type") != "integer" or isinstance(divisor, float)):
            # Beyond it a multiple is rounded to something that is none.
            exact = MAX_NUMBER // MAX_DIVISOR
            given["minimum"] = max(-exact, given.get("minimum", -exact))
            given["maximum"] = min(exact, given.get("maximum", exact))

    @staticmethod
    def _fold_formats(given: dict[str, Any]) -> None:
        if "format" not in given:
            return
        narrowing = FORMATS[given["format"]]
        if narrowing.pattern is not None:
            if "pattern" in given:
                given.setdefault("allOf", []).append({"pattern": given["pattern"]})
            given["pattern"] = narrowing.pattern
        if narrowing.max_length is not None:
            given["maxLength"] = min(narrowing.max_length, given.get("maxLength", narrowing.max_length))

    @staticmethod
    def _fold_properties(given: dict[str, Any], place: Place) -> None:
        """Names that the engine makes itself may come twice, and count once for whoever parses the object."""
        is_closed = given.get("additionalProperties") is False
        least, patterns = given.get("minProperties", 0), given.get("patternProperties", {})
        if least > len(given.get("required", ())) + 1 and (patterns or not is_closed):
            raise InvalidRequest(
                f"{place.path}.minProperties cannot be enforced where names are free: at most one more than required.",
                f"{place.path}.minProperties",
            )
        if not is_closed:
            for pattern in [name for name in patterns if read_pattern(name).dollars]:
                patterns.setdefault(before_a_last_newline(pattern), False)

    def tell_branches_apart(self) -> None:
        """Turns every `oneOf` into an `anyOf`, once references are resolved.

        Raises:
            InvalidRequest: two branches may have a value in common, so that `oneOf` would forbid it.
        """
        proofs = Proofs(self._references.targets)
        for cleaned, path, has_discriminator in self._choices:
            keyword = "oneOf" if "oneOf" in cleaned else "anyOf"
            branches = cleaned.get(keyword)
            if branches is None:
                raise InvalidRequest(f"{path}.discriminator has no meaning without oneOf.", f"{path}.discriminator")
            if (pair := _overlap(branches, proofs)) is not None:
                at = f"{path}.{'discriminator' if has_discriminator else keyword}"
                raise InvalidRequest(
                    f"{at} cannot be enforced: a value may be both of {keyword}[{pair[0]}] and [{pair[1]}]. Tell them "
                    "apart by type or by a required property with a const, or use anyOf.",
                    at,
                )
        for cleaned, _, _ in self._choices:
            if "oneOf" in cleaned:
                cleaned.setdefault("allOf", []).append({"anyOf": cleaned.pop("oneOf")})


def _overlap(branches: list[Schema], proofs: Proofs) -> tuple[int, int] | None:
    for i, first in enumerate(branches):
        for j in range(i):
            if not proofs.disjoint(branches[j], first):
                return j, i
    return None


def _bound(value: object, place: Place) -> int | float:
    number = check_number(value, place.path)
    if (place.pointer[-1], number) in (("exclusiveMinimum", MAX_NUMBER), ("exclusiveMaximum", -MAX_NUMBER)):
        raise InvalidRequest(f"{place.path} leaves only numbers beyond ±2^53, which are not exact.", place.path)
    return number


def _count(value: object, path: str) -> int:
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise InvalidRequest(f"{path} must be a whole number, 0 or more.", path)
    return number


def _least(value: object, place: Place) -> int:
    number = _count(value, place.path)
    if number > MAX_COUNT:
        raise InvalidRequest(f"{place.path} must be at most {MAX_COUNT:,}, the limit.", place.path)
    return number


def _most(value: object, place: Place) -> int:
    return min(_count(value, place.path), MAX_COUNT)


def _type(value: object, place: Place) -> str | list[str]:
    types: list[Any] = value if isinstance(value, list) else [value]
    if not types or any(not isinstance(name, str) or name not in TYPES for name in types):
        raise InvalidRequest(f"{place.path} must be one of {', '.join(TYPES)}, or an array of them.", place.path)
    if len(set(types)) != len(types):
        raise InvalidRequest(f"{place.path} names a type twice.", place.path)
    return value if isinstance(value, str) else types


def _format(value: object, place: Place) -> str:
    if not isinstance(value, str) or value not in FORMATS:
        raise InvalidRequest(f"{place.path} must be one of {', '.join(FORMATS)}.", place.path)
    return value


def _pattern(value: object, path: str) -> Pattern:
    if not isinstance(value, str):
        raise InvalidRequest(f"{path} must be a string.", path)
    if len(value) > MAX_PATTERN_LENGTH:
        raise InvalidRequest(f"{path} has {len(value):,} characters, the limit is {MAX_PATTERN_LENGTH:,}.", path)
    try:
        return read_pattern(value)
    except PatternError as error:
        raise InvalidRequest(f"{path} {error}.", path) from None


def _name_pattern(name: str, path: str) -> Pattern:
    """A pattern of names has to match neither more nor less than the client's: a name that it misses is free."""
    pattern = _pattern(name, path)
    if pattern.has_classes:
        raise InvalidRequest(f"{path}: spell \\d, \\w and \\s out, as [0-9] for example; readers differ.", path)
    return replace(pattern, text=name)
