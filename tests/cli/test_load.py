from __future__ import annotations

import json
import os

import pytest

from tests.cli.running import lmserve
from tests.cli.scripted_server import Refusal, Script, instance, managed_model, scripted_server
from tests.cli.terminal_program import CTRL_C, CTRL_D, at_terminal

PATH = "/api/v1/models/load"
SHORT = Refusal(400, "It takes 9 GiB, and 8 GiB are free.", "insufficient_memory")
LOADED = "Model loaded in 9.1 s (4.58 GiB).\nUse it as: model={}\n"


def script(**changes: object) -> Script:
    keys = ("acme/qwen-big", "acme/qwen-small", "other/bert", "qwen-plain")
    return Script(models=[managed_model(key) for key in keys], **changes)  # type: ignore[arg-type]


def test_a_load_without_a_terminal_is_a_line_for_each_stage() -> None:
    state = script(load_steps=[(0.1, "weights"), (0.2, "weights"), (0.9, "warming up")])
    with scripted_server(state) as url:
        done = lmserve(
            *("load", "BERT", "--identifier", "b", "--ttl", "60", "-c", "2048", "--parallel", "4", "--url", url)
        )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "Loading b: weights\nLoading b: warming up\n" + LOADED.format("b")
    expected = {"model": "other/bert", "identifier": "b", "ttl": 60.0, "context_length": 2048, "parallel": 4}
    assert state.bodies(PATH) == [{**expected, "stream": True}]


def test_a_load_for_programs() -> None:
    with scripted_server(script()) as url:
        done = lmserve("load", "other/bert", "--json", "--url", url)
    assert json.loads(done.stdout) == {
        "type": "llm",
        "instance_id": "other/bert",
        "load_time_seconds": 9.1,
        "status": "loaded",
        "memory_bytes": int(4.58 * 2**30),
    }


def test_a_load_at_a_terminal_is_a_bar() -> None:
    state = script(load_ends=False)
    with scripted_server(state) as url, at_terminal("load", "bert", "--url", url) as program:
        program.until("Loading other/bert")
        program.until("75%")
        program.until("warming up")
        assert "━" in program.text
        program.type(CTRL_C)
        program.until("Load cancelled.")
        assert program.end() == 130
        assert state.abandoned.wait(30), "the server must see that nobody waits"
    assert "Traceback" not in program.text


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["acme/qwen-big"], "acme/qwen-big"),
        (["qwen-plain"], "qwen-plain"),
        (["SMALL"], "acme/qwen-small"),
        (["qwen", "--yes"], "qwen-plain"),
        (["acme", "--yes"], "acme/qwen-big"),
        (["an-alias"], "an-alias"),
    ],
)
def test_a_part_of_a_name(arguments: list[str], key: str) -> None:
    state = script()
    with scripted_server(state) as url:
        done = lmserve("load", *arguments, "--url", url)
    assert done.returncode == 0
    assert [body["model"] for body in state.bodies(PATH)] == [key]


def test_a_name_that_fits_several() -> None:
    state = script()
    with scripted_server(state) as url:
        part = lmserve("load", "qwen", "--url", url)
        nothing = lmserve("load", "--url", url)
        only_yes = lmserve("load", "--yes", "--url", url)
    assert (part.returncode, part.stdout) == (1, "")
    assert part.stderr == ("lmserve: 'qwen' is a part of several names: acme/qwen-big, acme/qwen-small, qwen-plain\n")
    assert only_yes.stderr == "lmserve: --yes needs a MODEL\n"
    assert nothing.stderr.startswith("lmserve: no MODEL given: acme/qwen-big,")
    assert state.bodies(PATH) == []


def test_a_person_is_asked_which() -> None:
    state = script()
    with scripted_server(state) as url:
        with at_terminal("load", "qwen", "--url", url) as program:
            program.until("Which model?")
            program.until("  2. acme/qwen-small")
            program.until("Number (1-3): ")
            program.type("7\r")
            program.until("Number (1-3): ")
            program.type("2\r")
            program.until("Use it as: model=acme/qwen-small")
            assert program.end() == 0
        with at_terminal("load", "--url", url) as program:
            program.until("Number (1-4): ")
            program.type("other/bert\r")
            program.until("Use it as: model=other/bert")
        with at_terminal("load", "--url", url) as program:
            program.until("Number (1-4): ")
            program.type(CTRL_D)
            assert program.end() == 130
        with at_terminal("load", "--url", url) as interrupted:
            interrupted.until("Number (1-4): ")
            interrupted.interrupt("^C\n")
            assert interrupted.end() == 130
        assert "Traceback" not in program.text + interrupted.text
    assert [body["model"] for body in state.bodies(PATH)] == ["acme/qwen-small", "other/bert"]


def test_memory_that_is_short() -> None:
    state = script(load_refusals=[SHORT, SHORT])
    with scripted_server(state) as url:
        refused = lmserve("load", "bert", "--url", url)
        forced = lmserve("load", "bert", "--yes", "--url", url)
    assert (refused.returncode, refused.stderr) == (1, f"lmserve: {SHORT.message}\n")
    assert forced.returncode == 0
    assert [body.get("force", False) for body in state.bodies(PATH)] == [False, False, True]


def test_a_person_is_asked_whether_to_load_anyway() -> None:
    state = script(load_refusals=[SHORT, SHORT])
    with scripted_server(state) as url:
        with at_terminal("load", "bert", "--url", url) as program:
            program.until(SHORT.message)
            program.until("Load anyway? [y/N] ")
            program.type("\r")
            program.until("Load cancelled.")
            assert program.end() == 130
        with at_terminal("load", "bert", "--url", url) as program:
            program.until("Load anyway? [y/N] ")
            program.type("y\r")
            program.until("Use it as: model=other/bert")
            assert program.end() == 0
    assert [body.get("force", False) for body in state.bodies(PATH)] == [False, False, True]


def test_questions_leave_standard_output_alone() -> None:
    reading, writing = os.pipe()
    with (
        scripted_server(script(load_refusals=[SHORT])) as url,
        at_terminal("load", "--json", "--url", url, stdout=writing) as program,
    ):
        os.close(writing)
        program.until("Number (1-4): ")
        program.type("3\r")
        program.until("Load anyway? [y/N] ")
        program.type("yes\r")
        assert program.end() == 0
    with os.fdopen(reading) as stdout:
        assert json.load(stdout)["instance_id"] == "other/bert"


def test_other_refusals_and_broken_streams() -> None:
    with scripted_server(script(load_refusals=[Refusal(500, "The weights\nare broken.", "model_load_failed")])) as url:
        refused = lmserve("load", "bert", "--yes", "--url", url)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "lmserve: The weights are broken.\n"


def test_the_memory_that_it_would_take() -> None:
    state = script()
    with scripted_server(state) as url:
        fits = lmserve("load", "bert", "--estimate-only", "-c", "4096", "--url", url)
        state.fits = False
        too_large = lmserve("load", "bert", "--estimate-only", "--json", "--url", url)
    assert (fits.returncode, fits.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in fits.stdout.splitlines() if line]
    assert lines == [
        "other/bert: float32, context 4096, 8 in parallel",
        "MEMORY SIZE",
        "weights 4.00 GiB",
        "KV cache (65536 tokens) 1.00 GiB",
        "activations 512.0 MiB",
        "fixed 256.0 MiB",
        "total 5.75 GiB",
        "free (cpu) 8.00 GiB",
        "It would unload: old",
        "It takes 5.75 GiB, and 8 GiB are free.",
    ]
    assert too_large.returncode == 1
    assert json.loads(too_large.stdout)["fits"] is False
    assert state.bodies(PATH)[0] == {"model": "other/bert", "context_length": 4096, "estimate_only": True}


def test_unload_one_or_the_only_one() -> None:
    state = Script(models=[managed_model("x/one", loaded_instances=[instance("a"), instance("b")])])
    with scripted_server(state) as url:
        several = lmserve("unload", "--url", url)
        named = lmserve("unload", "b", "--url", url)
        only = lmserve("unload", "--json", "--url", url)
        none = lmserve("unload", "--url", url)
        unknown = lmserve("unload", "b", "--url", url)
    assert (several.returncode, several.stderr) == (1, "lmserve: several models are loaded: a, b\n")
    assert (named.returncode, named.stdout) == (0, "Unloaded b (1.00 GiB free again).\n")
    assert json.loads(only.stdout) == [{"instance_id": "a", "freed_bytes": 2**30}]
    assert (none.returncode, none.stdout) == (1, "")
    assert "No models are currently loaded" in none.stderr
    assert (unknown.returncode, unknown.stderr) == (1, "lmserve: No model is loaded as 'b'.\n")


def test_unload_all() -> None:
    state = Script(models=[managed_model("x/one", loaded_instances=[instance("a"), instance("b")])])
    with scripted_server(state) as url:
        both = lmserve("unload", "a", "--all", "--url", url)
        every = lmserve("unload", "--all", "--url", url)
        again = lmserve("unload", "--all", "--url", url)
    assert both.returncode == 2
    assert every.stdout.splitlines() == ["Unloaded a (1.00 GiB free again).", "Unloaded b (1.00 GiB free again)."]
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "No models are currently loaded.\n")


def test_a_person_is_asked_what_to_unload() -> None:
    state = Script(models=[managed_model("x/one", loaded_instances=[instance("a"), instance("b")])])
    with scripted_server(state) as url, at_terminal("unload", "--url", url) as program:
        program.until("Number (1-2): ")
        program.type("1\r")
        program.until("Unloaded a (1.00 GiB free again).")
        assert program.end() == 0


@pytest.mark.parametrize(
    "arguments", [["--ttl", "0"], ["-c", "0"], ["--parallel", "x"], ["one", "two"], ["--gpu", "max"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    done = lmserve("load", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lmserve: ")
    assert done.stderr.count("\n") == 1
