"""The programs at the terminal against a real server: what a person sees who downloads a model, loads it and talks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cli.running import lmserve
from tests.cli.terminal_program import CTRL_C, CTRL_D, at_terminal
from tests.e2e.conftest import STARTER
from tests.e2e.serving import Server, start
from tests.hub_stand_in import hub_stand_in


@contextlib.contextmanager
def log_in_a_pipe(server: Server, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``lmserve log stream --json``, listening."""
    command = [sys.executable, "-m", "lmserve", "log", "stream", "--url", server.url, "--json", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as listener:
        try:
            assert listener.stderr is not None
            assert "Streaming" in listener.stderr.readline()
            yield listener
        finally:
            listener.kill()


def test_a_chat_with_the_starter_model(starter_server: Server) -> None:
    """Streaming, history, and Ctrl-C, which ends the answer in the server too."""
    with at_terminal("chat", "--url", starter_server.url, "--temperature", "0") as program:
        program.until(f"Chatting with {STARTER}")
        program.line("What is the capital of France?")
        program.until("Paris")
        program.line("/set ignore_eos true")
        program.line("Tell me a story.")
        program.until("e")
        program.type(CTRL_C)
        program.until("Stopped.")
        program.line("/set ignore_eos")
        program.line("Say hi.")
        program.until("> ")
        program.type(CTRL_D)
        assert program.end() == 0
    assert "Traceback" not in program.text


def test_what_the_model_receives_is_seen_in_another_terminal(starter_server: Server) -> None:
    with at_terminal("log", "stream", "--stats", "--url", starter_server.url) as log:
        log.until("Streaming logs from")
        done = lmserve("chat", "--url", starter_server.url, "--prompt", "Say a\x1bb.", "--max-tokens", "3")
        assert done.returncode == 0, done.stderr
        log.until("type: llm.prediction.input")
        log.until("<|im_start|>user\nSay a")
        log.until("b.<|im_end|>")
        log.until("type: llm.prediction.output")
        log.until("stopReason: maxPredictedTokensReached")
        log.until("predictedTokensCount: 3")
        assert "a\x1bb." not in log.screen, "a text cannot drive the terminal"
        log.type(CTRL_C)
        assert log.end() == 130


def test_what_the_workers_say_is_seen_too(starter_server: Server) -> None:
    """And a listener in a pipe gets one JSON object a line."""
    with log_in_a_pipe(starter_server, "--source", "runtime") as listener:
        arguments = ("--identifier", "second", "--context-length", "64", "--parallel", "1", "--url", starter_server.url)
        with at_terminal("load", STARTER, *arguments) as load:
            load.until("Loading second")
            load.until("Model loaded in")
            assert load.end() == 0
        assert listener.stdout is not None
        events = [json.loads(listener.stdout.readline()) for _ in range(2)]
    assert {event["type"] for event in events} == {"runtime.log"}
    assert {event["modelIdentifier"] for event in events} == {"second"}
    assert {event["engineName"] for event in events} == {"lmserve"}
    assert psutil.pid_exists(events[-1]["pid"])
    done = lmserve("unload", "second", "--url", starter_server.url)
    assert (done.returncode, "free again" in done.stdout + done.stderr) == (0, True)


def test_how_full_and_busy_devices_are_is_seen_while_a_model_runs(tiny_server: Server) -> None:
    with log_in_a_pipe(tiny_server, "--source", "device") as listener:
        assert listener.stdout is not None
        answer = tiny_server.client().completions.create(
            model="tiny", prompt="a", max_tokens=1900, n=8, stream=True, extra_body={"ignore_eos": True}
        )
        seen: list[str] = []
        reading = threading.Thread(target=lambda: seen.append(listener.stdout.readline()))  # type: ignore[union-attr]
        reading.start()
        with answer:
            while reading.is_alive() and next(iter(answer), None) is not None:
                pass
        reading.join(60)
    event = json.loads(seen[0])
    assert (event["type"], event["device"]) == ("device.usage", "cpu")
    [model] = event["models"]
    assert model["modelIdentifier"] == "tiny"
    assert 10**7 < model["memoryBytes"] < event["memoryUsedBytes"] < event["memoryTotalBytes"]
    assert 0 < model["cpuPercent"] <= 100
    assert 0 < event["utilizationPercent"] <= 100
    [listed] = json.loads(lmserve("ps", "--json", "--url", tiny_server.url).stdout)
    assert listed["device"]["memory_total_bytes"] == event["memoryTotalBytes"]
    assert listed["device_memory_bytes"] == listed["memory_bytes"] > 10**7


@pytest.mark.slow
def test_a_model_is_downloaded_and_asked(tmp_path: Path, tiny_folder: Path) -> None:
    """From a stand-in of the hub into the cache, known at once, loaded by the first request."""
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "LMSERVE_CACHE": str(tmp_path)}
    with hub_stand_in() as hub:
        hub.add_folder("Some-Org/Tiny-Chat", tiny_folder)
        arguments = ("--models-dir", str(tmp_path), "--threads", "1", "--max-model-len", "500")
        with start(tmp_path, *arguments, HF_ENDPOINT=hub.url, **environment) as server:  # type: ignore[arg-type]
            with at_terminal("get", "Some-Org/Tiny-Chat", "--url", server.url) as program:
                program.until("Some-Org/Tiny-Chat is here")
                assert program.end() == 0
            answer = server.client().completions.create(model="tiny-chat", prompt="a", max_tokens=3)
            assert answer.model == "some-org/tiny-chat"
            again = lmserve("get", "Some-Org/Tiny-Chat", "--url", server.url)
            assert (again.returncode, "already here" in again.stderr) == (0, True)
            missing = lmserve("get", "Some-Org/Nothing", "--url", server.url)
            assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
            assert os.path.isdir(tmp_path / "hub")
