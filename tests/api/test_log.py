from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.api.running_server import RunningServer, wait_until


@contextmanager
def listening(server: RunningServer, query: str = "") -> Iterator[Iterator[dict[str, Any]]]:
    """The log's events, from now on."""

    def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
        for line in lines:
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))

    with server.http as http, http.stream("GET", f"/log/stream{query}") as response:
        lines = response.iter_lines()
        assert next(lines) == ": listening"
        yield events(lines)


def test_what_goes_in_and_what_comes_out(server: RunningServer) -> None:
    with listening(server) as events:
        answer = server.chat(temperature=0.5).json()
        went_in, came_out = next(events), next(events)
    assert went_in["type"] == "llm.prediction.input"
    assert came_out["type"] == "llm.prediction.output"
    assert went_in["request_id"] == came_out["request_id"] == answer["id"]
    assert went_in["input"].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert went_in["parameters"]["temperature"] == 0.5
    assert came_out["output"] == "Hello there!"
    assert came_out["stats"]["stopReason"] == "eosFound"
    assert "tokenIds" not in went_in
    assert "tokenIds" not in came_out


def test_token_ids_on_demand_and_one_type_only(server: RunningServer) -> None:
    with listening(server, "?token_ids=1&types=llm.prediction.output") as events:
        server.chat()
        event = next(events)
    assert event["type"] == "llm.prediction.output"
    assert event["tokenIds"][0][-1] == 2


def test_requests_and_their_answers_are_told_of(server: RunningServer) -> None:
    with listening(server, "?types=server.log") as events:
        server.chat()
        told = next(events)
        server.post("/v1/chat/completions", {"model": "stub"})
        refused = next(events)
    assert (told["level"], refused["level"]) == ("info", "info")
    assert re.fullmatch(r"POST /v1/chat/completions 200 in \d+\.\d{3} s \(req_\w+\)", told["content"])
    assert refused["content"].startswith("POST /v1/chat/completions 400 in ")


def test_a_listener_that_left_is_forgotten(server: RunningServer) -> None:
    with listening(server):
        assert server.log.num_subscriptions == 1
    wait_until(lambda: server.log.num_subscriptions == 0)


@pytest.mark.parametrize(
    ("query", "param"), [("?types=llm", "types"), ("?token_ids=maybe", "token_ids"), ("?typo=1", "typo")]
)
def test_a_malformed_query(server: RunningServer, query: str, param: str) -> None:
    response = server.get(f"/log/stream{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
