"""The dialogue of ``lmserve chat``: lines, /commands, answers, and what Ctrl-C means where."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from lmserve.cli.client import ServerClient
from lmserve.cli.conversation import Answer, Conversation, encodable
from lmserve.cli.terminal import is_terminal, say, visible
from lmserve.errors import LMServeError

HELP = """\
/clear            forget what was said; the system prompt stays
/exit             leave (or Ctrl-D)
/help             this
/model [NAME]     which model answers, or another one from now on
/retry            ask the last question again
/save FILE        write the conversation: as JSON if the name ends with .json, else as text
/set [NAME VALUE] the settings (temperature, max_tokens, seed, stop, …), or another value; none takes it back
/stats            show the figures of each answer, or no longer
/system [TEXT]    the system prompt, or another one; "" for none
/undo             take the last question and its answer back

A line that ends with \\ goes on in the next one. \"\"\" begins a message of several lines, and ends it.
Ctrl-C stops an answer; what has come of it stays."""
_QUOTES = '"""'
_HOW_TO_LEAVE = "To leave: Ctrl-D, or /exit."


class ChatLoop:
    """Owns one dialogue at the terminal."""

    def __init__(self, client: ServerClient, conversation: Conversation, *, shows_stats: bool = False) -> None:
        self._client = client
        self._conversation = conversation
        self._shows_stats = shows_stats
        self._unanswered = ""
        """The last question, if nothing came of it."""
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: say(HELP),
            "/clear": self._clear,
            "/model": self._model,
            "/retry": self._retry,
            "/save": self._save,
            "/set": self._set,
            "/stats": self._stats,
            "/system": self._system,
            "/undo": self._undo,
        }

    def run(self) -> None:
        """Until the user leaves."""
        _edit_lines()
        say(f"Chatting with {self._conversation.model}. /help shows the commands, Ctrl-D leaves.")
        stays = True
        while stays:
            try:
                stays = self._turn()
            except KeyboardInterrupt:  # at the prompt, or once more after an answer was stopped
                say(f"\n{_HOW_TO_LEAVE}")

    def _turn(self) -> bool:
        """One message or command. False: the user leaves."""
        try:
            text, is_quoted = read_message()
        except EOFError:
            say()
            return False
        if is_quoted or not text.startswith("/"):
            if text.strip():
                self._ask(text)
        elif text.strip() in ("/exit", "/quit", "/bye"):
            return False
        else:
            self._obey(text)
        return True

    def _obey(self, text: str) -> None:
        name, _, rest = text.strip().partition(" ")
        if name in self._commands:
            self._commands[name](rest.strip())
        else:
            say(
                f"There is no command {name}; /help shows them. (A message that begins with / needs a space before it.)"
            )

    def _ask(self, question: str) -> bool:
        """A turn, if an answer or a part of it comes: whether one did. Errors are shown, and the dialogue goes on."""
        answer = Answer()
        self._unanswered = question
        stopped = False
        try:
            with closing(self._conversation.ask(self._client, question, answer)) as pieces:
                for piece in pieces:
                    print(visible(piece) if is_terminal(sys.stdout) else piece, end="", flush=True)
        except KeyboardInterrupt:
            stopped = True
        except LMServeError as error:
            if answer.text:
                print(flush=True)
            say(f"Error: {error}")
            say("Your message is not part of the conversation; /retry sends it again.")
            return False
        if stopped and not answer.text:
            say("\nStopped before anything came; /retry sends it again.")
            return False
        print(flush=True)
        self._conversation.turns.append((encodable(question), encodable(answer.text)))
        self._unanswered = ""
        if stopped:
            say("Stopped.")
        report(answer, stats=self._shows_stats)
        return True

    def _clear(self, _: str) -> None:
        self._conversation.turns.clear()
        self._unanswered = ""
        say("Everything is forgotten.")

    def _model(self, name: str) -> None:
        if name:
            self._conversation.model = name
        say(f"Model: {self._conversation.model}")

    def _retry(self, _: str) -> None:
        if not self._unanswered and not self._conversation.turns:
            say("There is no question yet.")
            return
        if self._unanswered:
            self._ask(self._unanswered)
            return
        turn = self._conversation.turns.pop()
        if not self._ask(turn[0]):
            self._conversation.turns.append(turn)

    def _save(self, name: str) -> None:
        if not name:
            say("/save needs the name of a file.")
            return
        path = Path(name).expanduser()
        messages = self._conversation.messages()
        if path.suffix == ".json":
            text = json.dumps(messages, ensure_ascii=False, indent=2)
        else:
            text = "\n\n".join(f"{message['role']}:\n{message['content']}" for message in messages)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            say(f"Cannot save: {error.strerror}: {path}")
        else:
            say(f"Saved {len(messages)} messages in {path}.")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name:
            try:
                self._conversation.set(name, value.strip())
            except ValueError as error:
                say(f"Cannot set it: {error}.")
                return
        settings = self._conversation.settings
        parts = (f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items())
        say("\n".join(parts) if settings else "No settings: everything is as the model has it.")

    def _stats(self, _: str) -> None:
        self._shows_stats = not self._shows_stats
        say("Figures after each answer." if self._shows_stats else "No figures.")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = "" if text == '""' else encodable(text)
        say(f"System prompt: {self._conversation.system}" if self._conversation.system else "No system prompt.")

    def _undo(self, _: str) -> None:
        if not self._conversation.turns:
            say("There is nothing to take back.")
            return
        question, _answer = self._conversation.turns.pop()
        self._unanswered = ""
        say(f"Taken back: {question.splitlines()[0] if question.splitlines() else ''}")


def report(answer: Answer, *, stats: bool) -> None:
    """What a person should know about a finished answer, on standard error."""
    if answer.ignored:
        say(f"(The server does not heed: {answer.ignored})")
    if answer.finish_reason == "length":
        say("(Cut off: max_tokens is reached, or the context is full.)")
    if stats:
        say(f"({answer.figures()})")


def read_message() -> tuple[str, bool]:
    """One message, of one line or several; whether it stood between quotes, and so is no command.

    Raises:
        EOFError: the user leaves.
    """
    line = _read_line("> ")
    if line.lstrip().startswith(_QUOTES):
        return _read_quoted(line.lstrip()[len(_QUOTES) :]), True
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(_read_line("... "))
    return "\n".join(lines), False


def _read_quoted(first: str) -> str:
    lines = [first]
    while not lines[-1].rstrip().endswith(_QUOTES):
        lines.append(_read_line("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
    return "\n".join(lines).strip("\n")


def _read_line(prompt: str) -> str:
    """readline shows the prompt on standard output; where that is a file, it is shown beside it."""
    if is_terminal(sys.stdout):
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def _edit_lines() -> None:
    """Arrow keys and this session's history at the prompt, where Python was built with them."""
    try:
        import readline  # noqa: F401, PLC0415  (importing it changes input(): for the dialogue only)
    except ImportError:
        say("This Python has no readline: lines cannot be edited with the arrow keys.")
