from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.contenders import Machine
from benchmarks.embeddings import (
    CLIENTS,
    NUM_SHORT,
    SIZES,
    Peer,
    Row,
    closed_loop,
    facts,
    latency,
    main,
    markdown,
    p95,
    parse_arguments,
    short_latencies,
)
from lmserve.cli.bench.process import StartFailed
from tests.api.running_server import RunningServer, running_server
from tests.api.stub_engine import Settings, StubEngine, runner_info
from tests.runtime.encoder.tiny_encoders import write_encoder

# The clients run against the real API over an engine that needs no model; the peer is the real one.

SIZE = 4


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    """Its model makes vectors of four numbers, which count on from the number of tokens."""
    with running_server(Settings(max_inputs=40)) as running:
        monkeypatch.setattr("benchmarks.embeddings.MODEL_ID", running.entry.model_id)
        running.entry.loaded_engine = StubEngine(runner_info(row_size=SIZE), lambda request, choice: [])
        yield running


def texts(count: int) -> list[str]:
    """Of 1, 2, 3, … words, so that their vectors differ."""
    return ["the " * (number % 50) + "the" for number in range(count)]


@pytest.mark.parametrize(("clients", "sizes"), [(1, [10] * 7), (3, [3, 3, 4] + [10] * 6), (100, [1] * 70)])
def test_each_client_sends_its_share_in_batches(server: RunningServer, clients: int, sizes: list[int]) -> None:
    sent = texts(70)
    seconds, vectors = asyncio.run(closed_loop(server.url, sent, clients, batch=10))
    assert seconds > 0
    assert sorted(len(request.inputs) for request in server.engine.encoded) == sorted(sizes)
    expected = [number % 50 + 1 + np.arange(SIZE) for number in range(70)]
    assert np.array_equal(vectors, expected), "all of them, in their order"


def test_a_refusal_ends_the_run_with_the_servers_words(server: RunningServer) -> None:
    with pytest.raises(StartFailed, match="max_inputs"):
        asyncio.run(closed_loop(server.url, texts(50), 1, batch=50))


def test_short_texts_are_sent_one_by_one(server: RunningServer) -> None:
    latencies = asyncio.run(short_latencies(server.url, beside=()))
    assert len(latencies) == NUM_SHORT == len(server.engine.encoded)
    assert {len(request.inputs) for request in server.engine.encoded} == {1}


def test_a_large_request_goes_first_and_is_waited_for(server: RunningServer) -> None:
    """However soon it is done: no latency is told that was not measured."""
    latencies = asyncio.run(short_latencies(server.url, beside=texts(40)))
    assert [len(request.inputs) for request in server.engine.encoded] == [40, *(1 for _ in latencies)]
    assert latency([]) == "the large one had ended before"
    assert latency([0.25, 0.125]) == "250 ms of 2"


def test_p95_is_the_nearest_rank() -> None:
    assert p95([0.5]) == 0.5
    assert p95([3.0, 1.0, 2.0]) == 3.0
    assert p95([float(value) for value in range(100, 0, -1)]) == 95.0
    assert p95([float(value) for value in range(1, 21)]) == 19.0


def test_the_table() -> None:
    lines = markdown([Row(4096, 8, 123.4, 61.7, 2.004)], [("model", "m"), ("texts", "short")]).splitlines()
    assert lines[:3] == ["- model: m", "- texts: short", ""]
    assert lines[3] == "| texts | clients | lmserve, texts/s | sentence-transformers, texts/s | ratio |"
    assert lines[5:] == ["| 4,096 | 8 | 123 | 62 | 2.00 |"]


def parse(folder: Path, *arguments: str) -> argparse.Namespace:
    return parse_arguments([str(folder), *arguments])


def test_arguments(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(tiny_folder)
    assert (options.texts, options.clients, options.rounds) == (SIZES, CLIENTS, 3)
    assert (options.dtype, options.threads, options.option) == ("float32", os.cpu_count(), [])
    options = parse(tiny_folder, "--quick", "--rounds", "5", "--option", "max-num-batched-tokens=64", "task=embed")
    assert (options.texts, options.rounds) == ((64,), 1)
    assert options.option == ["--max-num-batched-tokens=64", "--task=embed"]
    for wrong in (["--texts", "0"], ["--dtype", "int8"], ["--clients"]):
        with pytest.raises(SystemExit):
            parse(tiny_folder, *wrong)
        assert wrong[0] in capsys.readouterr().err


def test_facts_tell_the_texts_and_no_folder(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "model", "bert")
    described = dict(facts(parse(folder, "--texts", "10", "--option", "task=embed")))
    assert "tokens" in described["texts"]
    assert described["options"] == "--task=embed"
    assert not any(str(tmp_path) in value for value in described.values())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(str(write_encoder(tmp_path / "model", "bert")), "cpu", "float32", 1)


def test_the_peer_answers_again_and_again(machine: Machine) -> None:
    with Peer(machine) as peer:
        seconds, first = peer.encode(["a", "the cat"])
        _, second = peer.encode(["the cat"])
    assert seconds > 0
    assert first.shape == (2, 48)
    assert np.abs(first[1] - second[0]).max() < 1e-6
    assert np.abs(first[0] - second[0]).max() > 1e-3


def test_what_cannot_start_ends_the_run_with_its_words(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = Machine(str(tiny_folder / "nowhere"), "cpu", "float32", 1)
    with Peer(nowhere) as peer, pytest.raises(StartFailed, match="nowhere"):
        peer.encode(["a"])
    monkeypatch.setattr("benchmarks.embeddings.lmserve_command", lambda *_: ["/bin/sh", "-c", "echo broken; exit 3"])
    assert main([str(tiny_folder), "--quick"]) == 1
    assert "broken" in capsys.readouterr().err
