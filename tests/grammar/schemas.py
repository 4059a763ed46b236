"""Two hundred schemas as clients send them: twenty things, each in ten shapes that libraries and people give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
SHORT: Schema = {"type": "string", "minLength": 1, "maxLength": 24}
WORD: Schema = {"type": "string", "pattern": "^[a-z]{2,12}$"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 1000}
DATE: Schema = {"type": "string", "format": "date"}
TIME: Schema = {"type": "string", "format": "date-time"}
EMAIL: Schema = {"type": "string", "format": "email", "maxLength": 40}
UUID: Schema = {"type": "string", "format": "uuid"}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
PRICE: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 9999.99}
COUNTRY: Schema = {"type": "string", "pattern": "^[A-Z]{2}$"}
TAGS: Schema = {"type": "array", "items": WORD, "maxItems": 3}


def one_of(*values: object) -> Schema:
    return {"enum": list(values)}


def some(item: Schema, least: int = 0, most: int = 3) -> Schema:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def record(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


THINGS: dict[str, dict[str, Schema]] = {
    "person": {"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 130}, "email": EMAIL, "born": DATE},
    "address": {"street": SHORT, "postcode": {"type": "string", "pattern": r"^\d{5}(?:-\d{4})?$"}, "country": COUNTRY},
    "invoice": {
        "number": {"type": "string", "pattern": "^INV-[0-9]{4,6}$"},
        "due": DATE,
        "paid": FLAG,
        "lines": some(record(item=SHORT, quantity={"type": "integer", "minimum": 1, "maximum": 99}, price=PRICE), 1),
    },
    "weather": {
        "place": SHORT,
        "celsius": {"type": "number", "minimum": -90, "maximum": 60},
        "sky": one_of("☀️", "☁️", "🌧", "❄️"),
        "humidity": {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 5},
    },
    "speisekarte": {
        "gericht": SHORT,
        "preis": PRICE,
        "schärfe": one_of("mild", "würzig", "höllisch"),
        "größe": one_of(1, 2, 3),
    },
    "地址": {"城市": one_of("北京", "上海", "東京"), "人口": COUNT, "首都": FLAG},
    "event": {
        "title": SHORT,
        "starts": TIME,
        "at": {"type": "string", "format": "time"},
        "lasts": {"type": "string", "format": "duration", "maxLength": 12},
        "guests": some(EMAIL),
    },
    "host": {
        "name": {"type": "string", "format": "hostname", "maxLength": 30},
        "v4": {"type": "string", "format": "ipv4"},
        "v6": {"type": "string", "format": "ipv6"},
        "port": {"type": "integer", "exclusiveMinimum": 0, "maximum": 65535},
    },
    "page": {
        "url": {"type": "string", "format": "uri", "maxLength": 60},
        "status": one_of(200, 301, 404, 500),
        "language": {"type": "string", "pattern": "^(?:de|en|fr)(?:-[A-Z]{2})?$"},
        "tags": TAGS,
    },
    "sentiment": {"label": one_of("positive", "neutral", "negative"), "score": SHARE, "quotes": some(SHORT, 0, 2)},
    "answer": {"steps": some(record(explanation=SHORT, output=SHORT), 1), "final_answer": SHORT},
    "entities": {"found": some(record(text=SHORT, kind=one_of("PER", "ORG", "LOC", None), start=COUNT, end=COUNT))},
    "point": {
        "at": {
            "type": "array",
            "prefixItems": [
                {"type": "number", "minimum": -180, "maximum": 180},
                {"type": "number", "minimum": -90, "maximum": 90},
            ],
            "items": False,
            "minItems": 2,
        },
        "label": {"anyOf": [SHORT, {"type": "null"}]},
    },
    "order": {
        "id": UUID,
        "state": one_of("new", "paid", "sent"),
        "total": PRICE,
        "note": {"type": ["string", "null"], "maxLength": 20},
    },
    "query": {
        "table": WORD,
        "columns": some(WORD, 1, 4),
        "limit": COUNT,
        "where": {
            "anyOf": [
                record(
                    column=WORD,
                    op=one_of("=", "<", ">", "≠"),
                    value={"type": ["string", "number", "boolean"], "maxLength": 9, "maximum": 99},
                ),
                {"type": "null"},
            ]
        },
    },
    "colour": {
        "hex": {"type": "string", "pattern": "^#[0-9a-fA-F]{6}$"},
        "rgb": some({"type": "integer", "minimum": 0, "maximum": 255}, 3, 3),
    },
    "settings": {
        "dark mode": FLAG,
        "font-size": {"type": "number", "multipleOf": 0.5, "minimum": 6, "maximum": 72},
        'quote"s': one_of("«»", '""', "“”", "\\", "line\nbreak"),
        "$volume": SHARE,
    },
    "person with base": {
        "id": UUID,
        "who": {"allOf": [record(name=SHORT), {"properties": {"name": {"pattern": "^[A-ZÄÖÜ]"}}}]},
    },
    "version": {
        "semver": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$", "maxLength": 11},
        "build": {"const": {"os": "linux", "bits": [32, 64]}},
        "kind": {"const": "release"},
    },
    "survey": {
        "ratings": {
            "type": "object",
            "patternProperties": {"^q[0-9]$": {"type": "integer", "minimum": 1, "maximum": 5}},
            "additionalProperties": False,
        },
        "remarks": {"type": "object", "additionalProperties": SHORT, "maxProperties": 2},
    },
}


def plain(name: str, fields: dict[str, Schema]) -> Schema:
    """As people write it: open, and the first property required."""
    return {"type": "object", "properties": fields, "required": list(fields)[:1]}


def pydantic(name: str, fields: dict[str, Schema]) -> Schema:
    """Titles, defaults and a definition for each model; optional ones are anyOf with null."""
    inner = {
        "properties": {
            field: {"anyOf": [schema, {"type": "null"}], "default": None, "title": field.title()}
            if i % 2
            else {**schema, "title": field.title(), "description": f"The {field}."}
            for i, (field, schema) in enumerate(fields.items())
        },
        "required": list(fields)[::2],
        "title": name.title(),
        "type": "object",
    }
    return {
        "$defs": {name: inner},
        "properties": {
            "best": {"$ref": f"#/$defs/{quote(name)}"},
            "others": some({"$ref": f"#/$defs/{quote(name)}"}, 0, 1),
        },
        "required": ["best"],
        "title": "Result",
        "type": "object",
    }


def zod(name: str, fields: dict[str, Schema]) -> Schema:
    """Closed, under its dialect's name, and a definition by `definitions`."""
    closed = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    has_places = any("prefixItems" in field for field in fields.values())
    dialect = (
        "https://json-schema.org/draft/2020-12/schema" if has_places else "http://json-schema.org/draft-07/schema#"
    )
    return {
        "$schema": dialect,
        "$ref": "#/definitions/it",
        "definitions": {"it": closed},
    }


def strict(name: str, fields: dict[str, Schema]) -> Schema:
    """As OpenAI's strict mode wants it: all required, closed, with a reason first."""
    properties = {"reasoning": SHORT, **fields}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def listed(name: str, fields: dict[str, Schema]) -> Schema:
    """An array at the root."""
    return some(strict(name, fields), 1, 2)


def or_error(name: str, fields: dict[str, Schema]) -> Schema:
    """The thing or an error, at the root."""
    return {"anyOf": [strict(name, fields), record(error=SHORT, code=one_of(400, 404, 500))]}


def discriminated(name: str, fields: dict[str, Schema]) -> Schema:
    """A union of pydantic's, told apart by a const."""
    variants = {
        "Thing": {**record(**fields, which={"const": "thing", "type": "string"}), "title": "Thing"},
        "Nothing": {**record(which={"const": "nothing", "type": "string"}, why=SHORT), "title": "Nothing"},
    }
    mapping = {"thing": "#/$defs/Thing", "nothing": "#/$defs/Nothing"}
    union = {
        "oneOf": [{"$ref": "#/$defs/Thing"}, {"$ref": "#/$defs/Nothing"}],
        "discriminator": {"mapping": mapping, "propertyName": "which"},
    }
    return {"$defs": variants, "type": "object", "properties": {"result": union}, "required": ["result"]}


def tree(name: str, fields: dict[str, Schema]) -> Schema:
    """Recursion, through an anchor and through the root."""
    return {
        "type": "object",
        "properties": {
            "node": {"$anchor": "node", **record(**dict(list(fields.items())[:2]))},
            "children": some({"$ref": "#"}, 0, 2),
            "next": {"anyOf": [{"$ref": "#node"}, {"type": "null"}]},
        },
        "required": ["node"],
        "additionalProperties": False,
    }


def mapped(name: str, fields: dict[str, Schema]) -> Schema:
    """Things by free names, beside a fixed one."""
    return {
        "type": "object",
        "properties": {"version": {"const": 1}},
        "required": ["version"],
        "additionalProperties": {"$ref": "#/$defs/it"},
        "maxProperties": 3,
        "$defs": {"it": record(**fields)},
    }


def arguments(name: str, fields: dict[str, Schema]) -> Schema:
    """A tool's arguments, with an option and examples."""
    described = {
        field: {"description": f"The {field}", "examples": ["x"], **schema} for field, schema in fields.items()
    }
    options = {"type": "object", "properties": {"verbose": {"type": "boolean", "default": False}}, "x-order": 2}
    return {
        "type": "object",
        "properties": {**described, "options": options, "mode": {"type": "string", "enum": ["fast", "exact"]}},
        "required": [*fields, "mode"],
        "additionalProperties": False,
    }


SHAPES: tuple[Callable[[str, dict[str, Schema]], Schema], ...] = (
    *(plain, pydantic, zod, strict, listed),
    *(or_error, discriminated, tree, mapped, arguments),
)

SCHEMAS: dict[str, Schema] = {
    f"{name}-{shape.__name__}": shape(name, fields) for name, fields in THINGS.items() for shape in SHAPES
}
"""By a name that tests show."""
