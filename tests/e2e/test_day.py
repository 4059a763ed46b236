"""A day with the server: models come and go, as people and programs use them."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.cli.running import lmserve
from tests.e2e.serving import Server, start

PATIENCE = 60.0
SLACK_BYTES = 64 * 2**20
"""What an API process may hold more after a model has come and gone once more: its allocator's reserves."""


@pytest.fixture
def server(tmp_path: Path, tiny_folder: Path) -> Iterator[Server]:
    models = tmp_path / "models"
    for name in ("one", "two"):
        shutil.copytree(tiny_folder, models / "shelf" / name)
    arguments = ("--models-dir", str(models), "--alias", f"big={models / 'shelf' / 'two'}", "--threads", "1")
    limits = ("--max-model-len", "2000", "--keep-alive-seconds", "0.2", "--kv-cache-memory", "64MiB")
    cache = str(tmp_path / "cache")
    with start(tmp_path, *arguments, *limits, HF_HUB_CACHE=cache, LMSERVE_CACHE=cache) as running:
        yield running


def run(server: Server, *arguments: str) -> tuple[int, Any]:
    """An ``lmserve`` command against the server: its exit code, and what its JSON says (or its words, if it failed)."""
    done = lmserve(*arguments, "--url", server.url, "--json")
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout) if done.returncode == 0 else done.stderr


def loaded(server: Server) -> dict[str, dict[str, Any]]:
    """The instances that ``ps`` shows, by identifier."""
    code, instances = run(server, "ps")
    assert code == 0
    return {instance["id"]: instance for instance in instances}


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.05)


def ask(server: Server, model: str, max_tokens: int = 4, **fields: object) -> openai.types.Completion:
    body: dict[str, object] = {"ignore_eos": True, **fields}
    return server.client().completions.create(
        model=model, prompt="a", max_tokens=max_tokens, temperature=0, extra_body=body
    )


def stream(server: Server, model: str, max_tokens: int) -> openai.Stream[openai.types.Completion]:
    """A long answer that has begun."""
    chunks = server.client().completions.create(
        model=model, prompt="a", max_tokens=max_tokens, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(chunks))
    return chunks


def tree_bytes(server: Server) -> int:
    processes = [psutil.Process(server.process.pid), *server.workers()]
    return sum(process.memory_info().rss for process in processes)


@pytest.mark.slow
def test_a_day(server: Server) -> None:
    """Nothing is loaded in the morning; in the evening nothing is left."""
    text = morning(server)
    noon(server)
    afternoon(server)
    evening(server, text)


def morning(server: Server) -> str:
    """Two models are asked for, and come. Returns what they say."""
    assert server.workers() == []
    code, known = run(server, "ls")
    assert code == 0
    assert {"shelf/one", "shelf/two", "big"} <= {model["key"] for model in known}
    first = ask(server, "one")
    assert first.model == "shelf/one"
    assert ask(server, "shelf/two").choices[0].text == first.choices[0].text
    assert set(loaded(server)) == {"shelf/one", "shelf/two"}
    assert all(instance["just_in_time"] for instance in loaded(server).values())
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        server.client().embeddings.create(model="shelf/one", input="a")
    return first.choices[0].text


def noon(server: Server) -> None:
    """Nobody asks for a while: the memory is free again."""
    ask(server, "one", ttl=0.3)
    ask(server, "two", ttl=0.3)
    until(lambda: not server.workers())
    assert loaded(server) == {}
    before = tree_bytes(server)
    ask(server, "one", ttl=0.3)
    until(lambda: not server.workers())
    assert "are free again" in server.stderr.read_text()
    assert tree_bytes(server) < before + SLACK_BYTES


def afternoon(server: Server) -> None:
    """A person loads a model under a name of its own, and unloads it while it answers."""
    code, _ = run(server, "load", "big", "--identifier", "desk", "--context-length", "1500", "--yes")
    assert code == 0
    instance = loaded(server)["desk"]
    assert instance["config"]["context_length"] == 1500
    assert (instance["ttl_seconds"], instance["just_in_time"]) == (None, False)
    chunks = stream(server, "desk", 1400)
    code, answer = run(server, "unload", "desk")
    assert code == 0
    assert json.dumps(answer).count("freed_bytes") == 1
    with pytest.raises(openai.APIError, match="desk was unloaded"):
        for _ in chunks:
            pass
    chunks.close()
    assert server.workers() == []


def evening(server: Server, text: str) -> None:
    """A worker is killed and comes back; then the server is told to stop, and finishes what it has begun."""
    chunks = stream(server, "one", 1900)
    (worker,) = server.workers()
    worker.kill()
    with pytest.raises(openai.APIError, match="worker"):
        for _ in chunks:
            pass
    chunks.close()
    assert httpx.get(f"{server.url}/health").status_code == 503
    server.wait_ready()
    assert ask(server, "one").choices[0].text == text

    chunks = stream(server, "one", 1000)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    refused = httpx.post(f"{server.url}/v1/completions", json={"model": "two", "prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
    assert "retry-after" in refused.headers
    assert list(chunks)[-1].choices[0].finish_reason == "length"
    assert server.process.wait(30) == 0


def test_a_load_stalls_no_stream_and_says_how_far_it_is(server: Server) -> None:
    """While a second model loads, the first one's tokens go on, and the one who waits is told."""
    ask(server, "one")
    running = stream(server, "one", 1900)
    body = {"model": "two", "prompt": "a", "max_tokens": 2, "stream": True}
    comments, num_tokens = [], 0
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE) as answer:
        for line in answer.iter_lines():
            if line.startswith(":"):
                comments.append(line)
                next(iter(running), None)
                num_tokens += 1
            elif line.startswith("data: {"):
                break
    assert comments
    assert all("loading shelf/two" in comment for comment in comments), comments
    assert num_tokens > 1
    running.close()


def test_who_goes_away_ends_the_load_only_if_it_was_a_persons(server: Server) -> None:
    """A client's patience is not the next one's: what a request began is there for those who come after it."""
    for path, body in (
        ("/api/v1/models/load", {"model": "one"}),
        ("/v1/completions", {"model": "two", "prompt": "a"}),
    ):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}{path}", json=body, timeout=httpx.Timeout(5.0, read=0.5))
    until(lambda: "shelf/two" in loaded(server) and loaded(server)["shelf/two"]["state"] == "loaded")
    assert set(loaded(server)) == {"shelf/two"}


def test_a_signal_while_a_model_loads_is_told_to_who_waits(server: Server, tmp_path: Path) -> None:
    """And the second one ends at once, with no trace of a stack."""
    answers: list[httpx.Response] = []
    body = {"model": "one", "prompt": "a", "max_tokens": 2}
    asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{server.url}/v1/completions", json=body)))
    asking.start()
    until(server.workers)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    asking.join()
    (answer,) = answers
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert "Traceback" not in server.stderr.read_text()


def test_a_broken_model_is_a_clear_error_and_no_trouble_for_others(server: Server, tmp_path: Path) -> None:
    broken = tmp_path / "models" / "shelf" / "broken"
    shutil.copytree(tmp_path / "models" / "shelf" / "one", broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "config.json").write_text((broken / "config.json").read_text().replace("LlamaForCausalLM", "NoSuchLM"))
    (broken / "model.safetensors").write_bytes(weights[:-100])
    until(lambda: "shelf/broken" in {model["key"] for model in run(server, "ls")[1]})
    with pytest.raises(openai.InternalServerError) as failed:
        ask(server, "broken")
    assert failed.value.code == "model_load_failed"
    assert failed.value.response.headers["x-should-retry"] == "false"
    code, words = run(server, "load", "broken", "--yes")
    assert (code, words.count("\n")) == (1, 1)
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert ask(server, "one").usage is not None
