"""``lmserve chat``: talk with a model in the terminal, or ask it one thing."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated, Any

import typer

from lmserve.api.schema.manage import LoadRequest, ManagedModel
from lmserve.cli.chat_loop import ChatLoop, report
from lmserve.cli.client import ServerClient, connect
from lmserve.cli.conversation import Answer, Conversation, encodable
from lmserve.cli.load import NoChoice, load_model, pick_model
from lmserve.cli.options import ApiKey, Url, complete_model
from lmserve.cli.tables import print_json
from lmserve.cli.terminal import can_ask, choose, is_terminal, visible
from lmserve.errors import LMServeError

EPILOG = """Examples:

\b
  lmserve chat
  lmserve chat qwen --system "Answer in one sentence." --temperature 0
  lmserve chat --prompt "Why is the sky blue?" --stats
  git diff | lmserve chat --system "Write a commit message for this."

In a chat: /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves."""
TTL_SECONDS = 3600.0
"""Idle time of a model that was loaded for a chat: nobody thinks of unloading it."""


class NothingToAsk(LMServeError):
    """Neither a prompt nor anybody who could type one."""


def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Its name or a part of it; the loaded one, if it is the only one.",
            autocompletion=complete_model,
            show_default=False,
        ),
    ] = "",
    system: Annotated[str, typer.Option(metavar="TEXT", help="The system prompt.", show_default=False)] = "",
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Ask this, print the answer and end.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="0 is greedy [default: the model's, as for all of these].")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Keep the likeliest tokens up to this share.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(metavar="NUMBER", help="Keep so many of the likeliest tokens.")] = None,
    min_p: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Keep tokens so likely, relative to the likeliest.")
    ] = None,
    repeat_penalty: Annotated[float | None, typer.Option(metavar="NUMBER", help="Above 1: less repetition.")] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="NUMBER", help="Of an answer, at most.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="NUMBER", help="The same seed gives the same answer.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="The figures of each answer, on standard error.")] = False,
    url: Url = "",
    api_key: ApiKey = "",
    as_json: Annotated[bool, typer.Option("--json", help="Of one answer: one JSON document.")] = False,
) -> None:
    """Chat with a model. What is not typed at a terminal is one question, and gets one answer."""
    given = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repeat_penalty": repeat_penalty,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    is_dialogue = prompt is None and is_terminal(sys.stdin)
    if is_dialogue and as_json:
        raise typer.BadParameter("--json needs --prompt, or a prompt on standard input")
    with connect(url, api_key) as client:
        question = "" if is_dialogue else _question(prompt)
        conversation = Conversation(find_chat_model(client, model), encodable(system), settings)
        if is_dialogue:
            ChatLoop(client, conversation, shows_stats=stats).run()
        else:
            _answer_once(client, conversation, question, stats=stats, as_json=as_json)


def _question(prompt: str | None) -> str:
    typed = sys.stdin.read().removesuffix("\n") if prompt is None and sys.stdin is not None else ""
    question = typed if prompt is None else prompt
    if not question.strip():
        raise NothingToAsk("there is no prompt: standard input is empty" if prompt is None else "the prompt is empty")
    return question


def find_chat_model(client: ServerClient, text: str) -> str:
    """The identifier of the model that is meant, loaded now if it was not.

    Raises:
        NoChoice: it is not clear which, and there is nobody to ask.
        KeyboardInterrupt: the user stopped the load.
    """
    models = [model for model in client.models() if model.type == "llm"]
    loaded = [instance.id for model in models for instance in model.loaded_instances if instance.state == "loaded"]
    fitting = [name for name in loaded if text.lower() in name.lower()]
    if text in loaded:
        return text
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        if can_ask():
            return choose("Which model?", fitting)
        raise NoChoice(f"several loaded models fit: {', '.join(fitting)}")
    if not text and not can_ask():
        raise NoChoice("no chat model is loaded; load one with: lmserve load MODEL")
    return _load(client, models, text)


def _load(client: ServerClient, models: list[ManagedModel], text: str) -> str:
    key = pick_model(models, text, first=False)
    if key not in [model.key for model in models]:
        return key  # an alias, maybe: the server will say
    answer = load_model(client, LoadRequest(model=key, ttl=TTL_SECONDS))
    if answer is None:
        raise KeyboardInterrupt
    return answer.instance_id


def _answer_once(
    client: ServerClient, conversation: Conversation, question: str, *, stats: bool, as_json: bool
) -> None:
    answer = Answer()
    for_person = is_terminal(sys.stdout)
    try:
        with closing(conversation.ask(client, question, answer)) as pieces:
            for piece in pieces:
                if not as_json:
                    print(visible(piece) if for_person else piece, end="", flush=True)
    finally:
        if answer.text and not (as_json or answer.text.endswith("\n")):
            print(flush=True)
    if as_json:
        print_json(
            {
                "model": conversation.model,
                "content": encodable(answer.text),
                "finish_reason": answer.finish_reason,
                "usage": answer.usage,
            }
        )
    report(answer, stats=stats)
