"""The dialogue as a person has it: at a pseudo-terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cli.scripted_server import Refusal, Script, instance, managed_model, scripted_server
from tests.cli.terminal_program import CTRL_C, CTRL_D, UP, TerminalProgram, at_terminal

PATH = "/v1/chat/completions"


@contextmanager
def dialogue(*arguments: str, **changes: Any) -> Iterator[tuple[TerminalProgram, Script]]:
    state = Script(models=[managed_model("x/qwen", loaded_instances=[instance("qwen")])], **changes)
    with scripted_server(state) as url, at_terminal("chat", *arguments, "--url", url) as program:
        program.until("Chatting with qwen. /help shows the commands, Ctrl-D leaves.")
        yield program, state
    assert "Traceback" not in program.text


def contents(state: Script) -> list[list[str]]:
    """Of each request, what its messages say."""
    return [[message["content"] for message in body["messages"]] for body in state.bodies(PATH)]


def test_the_history_goes_with_every_question() -> None:
    with dialogue("--system", "Be brief.") as (program, state):
        program.line("One?")
        program.until("Hello!\n")
        program.line("Two?")
        program.until("Hello!\n")
        program.until("> ")
        program.type(CTRL_D)
        assert program.end() == 0
    assert contents(state) == [["Be brief.", "One?"], ["Be brief.", "One?", "Hello!", "Two?"]]
    assert [message["role"] for message in state.bodies(PATH)[1]["messages"]] == [
        *("system", "user", "assistant", "user")
    ]


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    with dialogue(pieces=["Half an"], chat_ends=False) as (program, state):
        program.line("One?")
        program.until("Half an")
        program.type(CTRL_C)
        program.until("Stopped.")
        assert state.abandoned.wait(30), "the server must see it, to stop its work"
        state.pieces, state.chat_ends = ["Whole."], True
        program.line("Two?")
        program.until("Whole.\n")
        program.line("/exit")
        assert program.end() == 0
    assert contents(state) == [["One?"], ["One?", "Half an", "Two?"]]


def test_ctrl_c_before_anything_came() -> None:
    with dialogue(pieces=[], chat_ends=False) as (program, state):
        program.line("One?")
        assert state.chat_began.wait(60)
        program.type(CTRL_C)
        program.until("Stopped before anything came; /retry sends it again.")
        state.pieces, state.chat_ends = ["Now."], True
        program.line("/retry")
        program.until("Now.\n")
        program.line("/exit")
        assert program.end() == 0
    assert contents(state) == [["One?"], ["One?"]]


def test_ctrl_c_at_the_prompt_says_how_to_leave() -> None:
    with dialogue() as (program, state):
        program.until("> ")
        program.type("half a line")
        program.until("half a line")
        program.interrupt("To leave: Ctrl-D, or /exit.")
        program.line('"""')
        program.until("... ")
        program.interrupt("To leave: Ctrl-D, or /exit.")
        program.line("Whole.")
        program.until("Hello!\n")
        program.until("> ")
        program.type(CTRL_D)
        assert program.end() == 0
    assert contents(state) == [["Whole."]]


def test_an_error_takes_the_turn_back_and_the_chat_goes_on() -> None:
    with dialogue(chat_refusals=[Refusal(400, "The context\x1b is full.")]) as (program, state):
        program.line("One?")
        program.until("Error: The context\\x1b is full.")
        state.pieces = ["Hel", Refusal(0, "The worker died.")]
        program.line("Two?")
        program.until("Hel\nError: The worker died.")
        state.pieces = ["Fine."]
        program.line("Three?")
        program.until("Fine.\n")
        state.chat_refusals = [Refusal(503, "The queue is full.")]
        program.line("/retry")
        program.until("Error: The queue is full.")
        program.line("Four?")
        program.until("Fine.\n")
    assert contents(state) == [["One?"], ["Two?"], ["Three?"], ["Three?"], ["Three?", "Fine.", "Four?"]]


def test_the_server_goes_away() -> None:
    state = Script(models=[managed_model("x/qwen", loaded_instances=[instance("qwen")])])
    with scripted_server(state) as url:
        program_ends = at_terminal("chat", "--url", url)
        program = program_ends.__enter__()
        program.until("Ctrl-D leaves.")
        program.line("One?")
        program.until("Hello!\n")
        program.line("/stats")
    try:
        program.line("Two?")
        program.until("Error: ")
        program.line("/exit")
        assert program.end() == 0
    finally:
        program_ends.__exit__(None, None, None)
    assert "Traceback" not in program.text


def test_messages_of_several_lines() -> None:
    with dialogue() as (program, state):
        program.line("first\\")
        program.until("... ")
        program.type("second\r")
        program.until("Hello!\n")
        program.line('"""one')
        program.until("... ")
        program.type("\r")
        program.until("... ")
        program.type('  two"""\r')
        program.until("Hello!\n")
        program.line('"""all in one"""')
        program.until("Hello!\n")
        program.line('"""')
        program.until("... ")
        program.type("/help is text here\r")
        program.until("... ")
        program.type('"""\r')
        program.until("Hello!\n")
        program.line(" /etc/hosts is a file")
        program.until("Hello!\n")
    assert [said[-1] for said in contents(state)] == [
        *("first\nsecond", "one\n\n  two", "all in one", "/help is text here", " /etc/hosts is a file")
    ]


def test_lines_are_edited_and_remembered() -> None:
    with dialogue() as (program, state):
        program.line("abx\x7fc")
        program.until("Hello!\n")
        program.until("> ")
        program.type(f"{UP}\x01>>\r")
        program.until("Hello!\n")
    assert [said[-1] for said in contents(state)] == ["abc", ">>abc"]


def test_commands_about_the_history(tmp_path: Path) -> None:
    with dialogue() as (program, state):
        program.line("/retry")
        program.until("There is no question yet.")
        program.line("/undo")
        program.until("There is nothing to take back.")
        program.line("One?")
        program.until("Hello!\n")
        state.pieces = ["Again."]
        program.line("/retry")
        program.until("Again.\n")
        program.line("Two?")
        program.until("Again.\n")
        program.line("/undo")
        program.until("Taken back: Two?")
        for name in ("talk.json", "talk.txt", "talk.txt"):
            program.line(f"/save {tmp_path / name}")
        program.until("Cannot save: File exists")
        program.line("/save /nowhere/at/all")
        program.until("Cannot save: No such file or directory: /nowhere/at/all")
        program.line("/clear")
        program.line("Three?")
        program.until("Again.\n")
    assert contents(state) == [["One?"], ["One?"], ["One?", "Again.", "Two?"], ["Three?"]]
    assert json.loads((tmp_path / "talk.json").read_text()) == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Again."},
    ]
    assert (tmp_path / "talk.txt").read_text() == "user:\nOne?\n\nassistant:\nAgain.\n"


def test_commands_about_the_request() -> None:
    with dialogue("--temperature", "0.5") as (program, state):
        program.line("/set seed 7")
        program.until("temperature = 0.5\nseed = 7")
        program.line("/set stop END")
        program.line('/set logit_bias {"5": -100}')
        program.line("/set top_p NaN")  # no JSON: the server will refuse the text
        program.line("/set temperature")
        program.line("/set stream false")
        program.until("Cannot set it: stream is the chat's own.")
        program.line("/system Be brief.")
        program.until("System prompt: Be brief.")
        program.line("/model")
        program.until("Model: qwen")
        program.line("/model other")
        program.until("Model: other")
        program.line("One?")
        program.until("Hello!\n")
        program.line('/system ""')
        program.until("No system prompt.")
        for name in ("seed", "stop", "logit_bias", "top_p"):
            program.line(f"/set {name} null")
        program.until("No settings")
        program.line("Two?")
        program.until("Hello!\n")
    first, second = state.bodies(PATH)
    settings = {"seed": 7, "stop": "END", "logit_bias": {"5": -100}, "top_p": "NaN", "model": "other"}
    assert {name: first[name] for name in settings} == settings
    assert "temperature" not in first
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert second.keys() == {"model", "messages", "stream", "stream_options"}
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]


def test_help_figures_and_what_is_no_command() -> None:
    with dialogue() as (program, state):
        program.line("/help")
        for name in ("/clear", "/exit", "/model", "/retry", "/save", "/set", "/stats", "/system", "/undo", "Ctrl-C"):
            program.until(name)
        program.line("/hlep")
        program.until("There is no command /hlep")
        program.line("")
        program.line("/stats")
        program.until("Figures after each answer.")
        program.line("One?")
        program.until("(2 tokens, ")
        program.line("/stats")
        program.until("No figures.")
    assert contents(state) == [["One?"]]


def test_a_person_is_asked_which_model_and_it_is_loaded() -> None:
    state = Script(models=[managed_model("x/one"), managed_model("x/two")])
    with scripted_server(state) as url, at_terminal("chat", "--url", url) as program:
        program.until("Number (1-2): ")
        program.type("2\r")
        program.until("Model loaded in")
        program.until("Chatting with x/two.")
        program.line("/exit")
        assert program.end() == 0
    assert [body["model"] for body in state.bodies("/api/v1/models/load")] == ["x/two"]


def test_broken_bytes_at_the_prompt() -> None:
    with dialogue() as (program, state):
        program.until("> ")
        program.type_bytes(b"a\xffb\r")
        program.until("Hello!\n")
        program.line("/exit")
        assert program.end() == 0
    assert contents(state)[0][0].startswith("a")


def test_answers_go_to_a_file_and_the_dialogue_stays_at_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "answers.txt"
    state = Script(models=[managed_model("x/qwen", loaded_instances=[instance("qwen")])], pieces=["a\x1bb"])
    with (
        file.open("wb") as stdout,
        scripted_server(state) as url,
        at_terminal("chat", "--url", url, stdout=stdout.fileno()) as program,
    ):
        program.line("One?")
        program.line("/exit")
        assert program.end() == 0
    assert file.read_text() == "a\x1bb\n"
    assert "a\\x1bb" not in program.text
