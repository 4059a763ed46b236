from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.cli.running import lmserve
from tests.cli.scripted_server import Refusal, Script, instance, managed_model, scripted_server
from tests.cli.terminal_program import CTRL_C, at_terminal

PATH = "/v1/chat/completions"
BODY = {"stream": True, "stream_options": {"include_usage": True}}


def script(**changes: Any) -> Script:
    embedder = managed_model("x/embedder", kind="embedding", loaded_instances=[instance("embedder")])
    return Script(
        models=[managed_model("x/qwen", loaded_instances=[instance("qwen")]), managed_model("x/idle"), embedder],
        **changes,
    )


def piped(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lmserve", "chat", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_one_answer() -> None:
    state = script()
    with scripted_server(state) as url:
        done = lmserve(
            *(
                "chat",
                "--prompt",
                "Hi.",
                "--system",
                "Be brief.",
                "--temperature",
                "0",
                "--top-p",
                "0.9",
                "--top-k",
                "4",
            ),
            *("--min-p", "0.1", "--repeat-penalty", "1.1", "--max-tokens", "5", "--seed", "7", "--url", url + "/v1/"),
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello!\n", "")
    assert state.bodies(PATH) == [
        {
            **BODY,
            "model": "qwen",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}],
            "temperature": 0.0,
            "top_p": 0.9,
            "top_k": 4,
            "min_p": 0.1,
            "repeat_penalty": 1.1,
            "max_tokens": 5,
            "seed": 7,
        }
    ]


def test_standard_input_is_one_prompt() -> None:
    state = script(pieces=["Grü", "ße\n"])
    with scripted_server(state) as url:
        done = piped("two\nlines\n", "--url", url)
        empty = piped(" \n", "--url", url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Grüße\n", "")
    assert [body["messages"] for body in state.bodies(PATH)] == [[{"role": "user", "content": "two\nlines"}]]
    assert (empty.returncode, empty.stderr) == (1, "lmserve: there is no prompt: standard input is empty\n")


def test_one_answer_for_programs() -> None:
    with scripted_server(script(pieces=["a\x1b[2J", "\u2028b"])) as url:
        done = lmserve("chat", "--json", "-p", "Hi.", "--url", url)
        plain = lmserve("chat", "-p", "Hi.", "--url", url)
    assert json.loads(done.stdout) == {
        "model": "qwen",
        "content": "a\x1b[2J\u2028b",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13},
    }
    assert plain.stdout == "a\x1b[2J\u2028b\n"  # a program gets the text as it is


def test_what_a_person_should_know_of_an_answer() -> None:
    with scripted_server(script(finish_reason="length", ignored="user, metadata")) as url:
        done = lmserve("chat", "-p", "Hi.", "--stats", "--url", url)
    assert done.stdout == "Hello!\n"
    ignored, cut, figures = done.stderr.splitlines()
    assert ignored == "(The server does not heed: user, metadata)"
    assert cut == "(Cut off: max_tokens is reached, or the context is full.)"
    assert figures.startswith("(2 tokens, ")
    assert figures.endswith("s to the first, 11 in the prompt, length)")


def test_errors_before_and_within_an_answer() -> None:
    state = script(chat_refusals=[Refusal(400, "The context is full.")], pieces=["Hel", Refusal(0, "The worker died.")])
    with scripted_server(state) as url:
        before = lmserve("chat", "-p", "Hi.", "--url", url)
        within = lmserve("chat", "-p", "Hi.", "--url", url)
        state.pieces = ["Hel"]
        state.chat_breaks_off = True
        broken = lmserve("chat", "-p", "Hi.", "--url", url)
    assert (before.returncode, before.stdout, before.stderr) == (1, "", "lmserve: The context is full.\n")
    assert (within.returncode, within.stdout) == (1, "Hel\n")
    assert within.stderr == "lmserve: The worker died.\n"
    assert (broken.returncode, broken.stderr) == (1, f"lmserve: {url} ended its answer in the middle\n")


def test_ctrl_c_stops_the_one_answer() -> None:
    state = script(pieces=["Hel"], chat_ends=False)
    with scripted_server(state) as url, at_terminal("chat", "-p", "Hi.", "--url", url) as program:
        program.until("Hel")
        program.type(CTRL_C)
        assert program.end() == 130
        assert state.abandoned.wait(30)
    assert "Traceback" not in program.text


def test_a_model_does_not_drive_the_terminal() -> None:
    reading, writing = os.pipe()
    state = script(pieces=["a\x1b", "[2Jb\u202e\x07\r\x9b\tc\n👩\u200d🚀"])
    with scripted_server(state) as url:
        with at_terminal("chat", "-p", "Hi.", "--url", url) as program:
            assert program.end() == 0
        with at_terminal("chat", "-p", "Hi.", "--url", url, stdout=writing) as to_file:
            os.close(writing)
            assert to_file.end() == 0
    assert program.text == "a\\x1b[2Jb\\u202e\\x07\\x0d\\x9b\tc\n👩\u200d🚀\n"
    with os.fdopen(reading, newline="") as stdout:
        assert stdout.read() == "".join(str(piece) for piece in state.pieces) + "\n"


def test_which_model() -> None:
    state = script()
    state.models.append(managed_model("y/qwen-two", loaded_instances=[instance("qwen-two")]))
    with scripted_server(state) as url:
        exact = lmserve("chat", "qwen", "-p", "Hi.", "--url", url)
        part = lmserve("chat", "TWO", "-p", "Hi.", "--url", url)
        alias = lmserve("chat", "an-alias", "-p", "Hi.", "--url", url)
        several = lmserve("chat", "-p", "Hi.", "--url", url)
        state.models = [managed_model("x/idle")]
        none = lmserve("chat", "-p", "Hi.", "--url", url)
    assert exact.returncode == part.returncode == alias.returncode == 0
    assert [body["model"] for body in state.bodies(PATH)] == ["qwen", "qwen-two", "an-alias"]
    assert (several.returncode, several.stderr) == (1, "lmserve: several loaded models fit: qwen, qwen-two\n")
    assert none.stderr == "lmserve: no chat model is loaded; load one with: lmserve load MODEL\n"


def test_a_model_that_is_not_loaded_is_loaded_now() -> None:
    state = script()
    with scripted_server(state) as url:
        done = lmserve("chat", "idle", "-p", "Hi.", "--url", url)
    assert (done.returncode, done.stdout) == (0, "Hello!\n")
    assert "Model loaded in 9.1 s" in done.stderr
    assert state.bodies("/api/v1/models/load") == [{"model": "x/idle", "ttl": 3600.0, "stream": True}]
    assert [body["model"] for body in state.bodies(PATH)] == ["x/idle"]


def test_json_is_for_one_answer() -> None:
    with scripted_server(script()) as url, at_terminal("chat", "--json", "--url", url) as program:
        assert program.end() == 2
    assert "--json needs --prompt" in program.text


def test_no_standard_input_at_all() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m lmserve chat <&-"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (1, "lmserve: there is no prompt: standard input is empty\n")
