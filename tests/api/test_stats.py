"""/api/v0: LM Studio's REST API, which is OpenAI's with figures at the end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lmserve import __version__
from tests.api.running_server import RunningServer, goes_on

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("completions", {"prompt": "Once"}),
]


def check_figures(answer: dict[str, Any], stop_reason: str) -> None:
    stats = answer["stats"]
    assert set(stats) == {"tokens_per_second", "time_to_first_token", "generation_time", "stop_reason"}
    assert stats["stop_reason"] == stop_reason
    assert stats["time_to_first_token"] > 0
    assert stats["generation_time"] > 0
    assert stats["tokens_per_second"] > 0
    assert answer["model_info"] == {"arch": "Stub", "quant": "F32", "format": "safetensors", "context_length": 512}
    runtime = {"name": "lmserve", "version": __version__, "supported_formats": ["safetensors", "gguf"]}
    assert answer["runtime"] == runtime


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_an_answer_with_figures(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    plain, answer = server.post(f"/v1/{path}", body).json(), server.post(f"/api/v0/{path}", body).json()
    check_figures(answer, "eosFound")
    assert set(answer) - set(plain) == {"stats", "model_info", "runtime"}
    assert (answer["object"], answer["choices"]) == (plain["object"], plain["choices"])


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_other_reasons_to_stop(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    check_figures(server.post(f"/api/v0/{path}", {**body, "stop": "there"}).json(), "stopStringFound")
    server.engine.script = goes_on
    check_figures(server.post(f"/api/v0/{path}", {**body, "max_tokens": 3}).json(), "maxPredictedTokensReached")
    check_figures(server.post(f"/api/v0/{path}", {**body, "max_tokens": -1}).json(), "contextLengthReached")


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_stream_ends_with_figures(
    server: RunningServer, path: str, body: dict[str, Any], include_usage: bool
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": include_usage}}
    lines = server.post(f"/api/v0/{path}", {**body, **options}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    *others, last = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    check_figures(last, "eosFound")
    assert last["choices"] == []
    assert ("usage" in last) == include_usage
    assert not any("stats" in chunk for chunk in others)
