from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmserve.api.strict_json import check_json, is_nested_deeper
from lmserve.errors import InvalidRequest

JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\[]{}\n\u00fc,:'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='k"\\[{'), inner, max_size=3),
    max_leaves=12,
)


def depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(JSON_VALUES, st.booleans(), st.integers(min_value=1, max_value=6))
def test_it_measures_what_the_parser_would(value: Any, ascii_only: bool, limit: int) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert is_nested_deeper(body, limit) == (depth(value) > limit)
    check_json(body, 50)


@pytest.mark.parametrize("body", [b"[" * 10**6, b'{"a":' * 10**6, b"[" * 65 + b"]" * 65, b"[[]," * 100])
def test_too_deep(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="64 levels"):
        check_json(body, 64)


@pytest.mark.parametrize("body", [b"", b"[", b"]", b'"', b"{]", b"[}", b"[" * 64, b"]" * 10**6, b"\xff", b"\\", b"nan"])
def test_what_is_no_json_is_the_decoders_to_refuse(body: bytes) -> None:
    check_json(body, 64)


def test_a_key_that_stands_twice_further_in_has_no_path() -> None:
    with pytest.raises(InvalidRequest, match="'seed' stands twice") as caught:
        check_json(b'{"x": [{"seed": 1, "b": 2, "seed": 3}]}', 64)
    assert caught.value.param is None


def test_many_keys_take_one_pass() -> None:
    """Looked for one by one, these would take minutes."""
    keys = ",".join(f'"k{i}":0' for i in range(200_000))
    with pytest.raises(InvalidRequest, match="'k199999' stands twice"):
        check_json(f'{{{keys},"k199999":0}}'.encode(), 64)


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"a": 1, "a": 1}', "a"),
        (b'{"\\u0061": 1, "a": 2}', "a"),
    ],
)
def test_a_key_that_stands_twice(body: bytes, key: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{key}' stands twice") as caught:
        check_json(body, 64)
    assert caught.value.param == key
