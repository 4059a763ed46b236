from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmserve.config import Config, ModelConfig, format_bytes, keys, parse_bytes
from lmserve.errors import InvalidRequest
from lmserve.sampling_params import SamplingParams

GOOD: list[tuple[str, object, object]] = [
    ("port", "8080", 8080),
    ("port", 0, 0),
    ("drain_seconds", 5, 5.0),
    ("drain_seconds", "2.5", 2.5),
    ("kv_cache_memory", "512MiB", 512 * 2**20),
    ("kv_cache_memory", "1.5 gib", 3 * 2**29),
    ("kv_cache_memory", "2GB", 2_000_000_000),
    ("kv_cache_memory", 4096, 4096),
    ("self_check", "No", False),
    ("self_check", True, True),
    ("device", "cpu", "cpu"),
    ("default_temperature", "0", 0.0),
    ("default_top_k", "40", 40),
    ("model", "a", ("a",)),
    ("model", ["a", "b"], ("a", "b")),
]
BAD: list[tuple[str, object]] = [
    ("port", "x"),
    ("port", 65536),
    ("port", -1),
    ("port", 80.5),
    ("port", True),
    ("port", []),
    ("drain_seconds", "nan"),
    ("drain_seconds", float("inf")),
    ("kv_cache_memory", "4 potatoes"),
    ("kv_cache_memory", "-1MiB"),
    ("self_check", "maybe"),
    ("self_check", 1),
    ("device", "tpu"),
    ("default_top_p", 0),
    ("default_temperature", "2.1"),
    ("model", [1]),
    ("model", ""),
    ("host", 1),
]


@pytest.mark.parametrize(("name", "value", "parsed"), GOOD)
def test_values_are_read_as_written_anywhere(name: str, value: object, parsed: object) -> None:
    result = keys()[name].parse(value)
    assert result == parsed
    assert type(result) is type(parsed)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_values_out_of_their_limits_are_refused(name: str, value: object) -> None:
    with pytest.raises((ValueError, OverflowError)):
        keys()[name].parse(value)


def test_limits_in_words() -> None:
    assert keys()["port"].limits == "a whole number in [0, 65535]"
    assert keys()["default_top_p"].limits == "a number in (0, 1]"
    assert keys()["device"].limits == "one of auto, cuda, mps, cpu"
    assert keys()["max_waiting"].limits == "a whole number, at least 1"
    assert keys()["kv_cache_memory"].limits == "a number of bytes, at least 0"


@given(st.integers(0, 2**60))
def test_bytes_are_written_as_they_are_read(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == count


def test_there_are_few_keys_and_each_is_explained() -> None:
    assert len(keys()) <= 61
    for key in keys().values():
        assert key.help
        assert key.default is not None or key.example is not None
        assert key.choices == () or key.default in key.choices
        assert key.default is None or key.parse(key.default) == key.default


def test_every_field_of_the_model_is_a_key_or_comes_from_the_model_key() -> None:
    made = {field.name for field in dataclasses.fields(ModelConfig)} - keys().keys()
    assert made == {"model_id"}
    assert {field.name for field in dataclasses.fields(Config)} - keys().keys() == {"models", "aliases", "setup"}


def test_model_options_are_plain_values() -> None:
    options = ModelConfig(model="a", kv_cache_memory=5).to_options()
    assert json.loads(json.dumps(options)) == options
    assert ModelConfig(**options) == ModelConfig(model="a", kv_cache_memory=5)  # type: ignore[arg-type]  # mixed values


def test_secrets_are_not_shown() -> None:
    assert "hunter2" not in repr(Config(api_key=("hunter2",)))


@pytest.mark.parametrize("name", [name for name in keys() if name.startswith("default_")])
def test_sampling_defaults_have_the_limits_of_requests(name: str) -> None:
    """Any value the server takes as a default is one that a request may have."""
    key = keys()[name]
    parameter = {"default_repeat_penalty": "repetition_penalty"}.get(name, name.removeprefix("default_"))
    step = 1 if key.kind is int else 1e-6
    assert key.low is not None
    assert key.high is not None
    for value in (key.low - step, key.low, key.low + step, key.high, key.high + step):
        assert _accepted(lambda value=value: key.parse(value)) == _accepted(
            lambda value=value: SamplingParams(max_tokens=1, **{parameter: value})
        )


def _accepted(make: Any) -> bool:
    try:
        make()
    except (ValueError, InvalidRequest):
        return False
    return True
