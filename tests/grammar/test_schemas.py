"""The two hundred schemas, as they pass the gate and as their grammars' outputs pass two validators."""

from __future__ import annotations

import random

import pytest

from lmserve.grammar.schema import enforceable
from tests.grammar.byte_matcher import compiled, random_output
from tests.grammar.schemas import SCHEMAS
from tests.grammar.test_promise import violations


def test_there_are_two_hundred() -> None:
    assert len(SCHEMAS) == 200


@pytest.mark.parametrize("name", SCHEMAS)
def test_outputs_are_valid(name: str) -> None:
    matcher = compiled(enforceable(SCHEMAS[name], "schema"))
    rng = random.Random(name)
    outputs = [random_output(matcher, rng, max_bytes=1500) for _ in range(3)]
    for output in outputs:
        if output is not None:
            assert violations(SCHEMAS[name], output) == [], output
    assert any(output is not None for output in outputs)
