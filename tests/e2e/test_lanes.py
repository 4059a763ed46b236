"""Models whose prompts are read in turn, over HTTP: the same answers, and the lane is said."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.serving import Server, start
from tests.tiny_folder import write_tiny_folder

QUESTIONS = ["What is one and one?", "Name a colour, then a second one.", "x", "Say it again. " * 20]
LANES = {"lfm2": "state", "mamba": "state", "falcon": "serial"}


@pytest.fixture(scope="module", params=LANES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, family: str) -> Iterator[Server]:
    folder = write_tiny_folder(tmp_path_factory.mktemp("in-turn") / family, family)
    with start(tmp_path_factory.mktemp("server"), str(folder), "--max-model-len", "1000") as running:
        yield running


def ask(server: Server, question: str, *, stream: bool = False) -> str:
    arguments: Any = {"model": "any", "prompt": question, "max_tokens": 40, "temperature": 0, "seed": 1}
    with server.client() as client:
        if not stream:
            return str(client.completions.create(**arguments).choices[0].text)
        chunks = client.completions.create(**arguments, stream=True)
        return "".join(chunk.choices[0].text or "" for chunk in chunks if chunk.choices)


def test_the_lane_is_said(server: Server, family: str) -> None:
    listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [model["lane"] for model in listed if model["state"] == "loaded"] == [LANES[family]]
    managed = httpx.get(f"{server.url}/api/v1/models").json()["models"]
    [instance] = [instance for model in managed for instance in model["loaded_instances"]]
    assert (instance["lane"], instance["lane_reason"][:8]) == (LANES[family], "packed: ")


def test_many_at_once_get_what_each_gets_alone(server: Server) -> None:
    alone = [ask(server, question) for question in QUESTIONS]
    together = [""] * len(QUESTIONS)

    def run(i: int) -> None:
        together[i] = ask(server, QUESTIONS[i], stream=True)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(QUESTIONS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len(set(alone)) == len(alone)
