"""The public JSON-Schema-Test-Suite (draft 2020-12) against the promise: no invalid instance is an output.

scripts/setup.sh puts the suite beside the developer's packages; it comes with the sources of the `jsonschema` package.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

from lmserve.errors import InvalidRequest
from lmserve.grammar.schema import enforceable
from tests.grammar.byte_matcher import CannotCompile, accepts, compiled

SUITE = Path(sys.prefix) / "share" / "json-schema-test-suite" / "draft2020-12"
FORMAT_FILES = ("date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")
"""Of optional/format; `uri` is tried in test_promise.py."""

REFUSED_KEYWORDS = {
    *(
        "$dynamicAnchor",
        "$dynamicRef",
        "contains",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
    ),
    *("minContains", "not", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties", "uniqueItems"),
}
OTHER_CAUSES = (
    "must point into this schema",
    "is understood at the root only",
    "a value may be both of",
    "must be one of date,",
    "must be one of http",
    "must be a whole number, 0.5",
    "no output can hold",
    "value satisfies it",
    "are not disjoint",
)


def _groups() -> list[Any]:
    files = [*sorted(SUITE.glob("*.json")), *(SUITE / "optional" / "format" / f"{name}.json" for name in FORMAT_FILES)]
    return [
        pytest.param(group, id=f"{path.stem}-{group['description']}")
        for path in files
        for group in json.loads(path.read_text(encoding="utf-8"))
    ]


def _matcher(schema: object) -> LLMatcher | str:
    """The matcher, or the last word of what was refused."""
    try:
        return compiled(enforceable(schema, "schema"))
    except InvalidRequest as error:
        return str(error)
    except CannotCompile as error:
        return f"llguidance: {error}"


@pytest.mark.parametrize("group", _groups())
def test_no_invalid_instance_is_an_output(group: dict[str, Any]) -> None:
    matcher = _matcher(group["schema"])
    if isinstance(matcher, str):
        return  # counted below
    taken = [
        test["description"]
        for test in group["tests"]
        if not test["valid"] and accepts(matcher, json.dumps(test["data"], ensure_ascii=False))
    ]
    assert taken == []


def test_most_of_what_is_enforced_takes_valid_instances() -> None:
    """What is valid and no output: another order of properties, `1.0` for `1`, quoted or bracketed mail boxes."""
    seen: Counter[str] = Counter()
    for parameter in _groups():
        group = parameter.values[0]
        matcher = _matcher(group["schema"])
        if isinstance(matcher, str):
            continue
        seen["enforced"] += 1
        for test in group["tests"]:
            if test["valid"]:
                seen["valid"] += 1
                seen["taken"] += accepts(matcher, json.dumps(test["data"], ensure_ascii=False))
    assert seen["enforced"] >= 160
    assert seen["taken"] >= 0.9 * seen["valid"], seen


def test_what_is_refused_and_why() -> None:
    keywords: set[str] = set()
    others: Counter[str] = Counter()
    for parameter in _groups():
        reason = _matcher(parameter.values[0]["schema"])
        if not isinstance(reason, str):
            continue
        if found := re.search(r" cannot be enforced: '([\w$]+)' is not a keyword", reason):
            keywords.add(found[1])
        else:
            (cause,) = [cause for cause in OTHER_CAUSES if cause in reason] or [reason]
            others[cause] += 1
    assert keywords == REFUSED_KEYWORDS
    assert set(others) == set(OTHER_CAUSES)
    assert sum(others.values()) <= 80, others
