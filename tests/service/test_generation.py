from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from lmserve.errors import InvalidRequest, ModelLoadFailed, ModelNotFound, NotReady, StepFailed, WorkerDied
from lmserve.outputs import FinishReason
from lmserve.service.answer import Answer, collect
from lmserve.service.chat_images import ChatImages
from lmserve.service.chat_template import Chat
from lmserve.service.deltas import Delta, TextDelta, Usage
from lmserve.service.generation import GenerationService
from lmserve.service.log_stream import LogEvent, LogStream
from lmserve.service.model_text import ModelText
from lmserve.service.protocols import ModelEntry
from lmserve.service.request import GenerationOptions, GenerationRequest
from lmserve.service.texts import Texts
from tests.api.stub_engine import NO_LIMITS, Script, Settings, StubEngine, StubEntry, StubModels, runner_info
from tests.service import tokenizers_for_tests as made

TEXT = ModelText(made.byte_level())
EOS = TEXT.eos_token_ids[0]


def says(text: str) -> Script:
    return lambda request, choice: [*TEXT.encode_rendered(text), EOS]


class Bench:
    """A service over a stub engine, with a listener on the log."""

    def __init__(self, script: Script, load_text: Callable[[ModelEntry], ModelText] = lambda entry: TEXT) -> None:
        self.engine = StubEngine(runner_info(vocab_size=300), script)
        self.entry = StubEntry(self.engine)
        self.log = LogStream()
        self.texts = Texts(load_text)
        self.service = GenerationService(
            StubModels(self.entry), self.texts, ChatImages(NO_LIMITS), self.log, Settings()
        )

    async def complete(self, *prompts: str | list[int], **options: Any) -> GenerationRequest:
        return await self.service.prepare_completion("r", None, prompts, GenerationOptions(**options))

    async def answer(self, request: GenerationRequest) -> Answer:
        return await collect(self.service.stream(request), request.num_choices)

    def run(self, scenario: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            try:
                await scenario(self)
            finally:
                self.texts.close()

        asyncio.run(main())


def test_a_completion() -> None:
    async def scenario(bench: Bench) -> None:
        bench.engine.num_cached_tokens = 1
        request = await bench.complete("he", max_tokens=50, seed=5)
        answer = await bench.answer(request)
        [choice] = answer.choices
        assert choice.text == "hello"
        assert choice.finished is not None
        assert choice.finished.reason is FinishReason.STOP
        prompt = TEXT.encode("he")
        assert answer.usage == Usage(len(prompt), len(TEXT.encode_rendered("hello")) + 1, 1)
        [sent] = bench.engine.requests
        assert (sent.prompt_token_ids, sent.eos_token_ids, sent.sampling.seed) == (prompt, [EOS], 5)

    Bench(says("hello")).run(scenario)


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt() -> None:
    def script(request: Any, choice: int) -> list[int]:
        return [*TEXT.encode_rendered(f"{TEXT.decode(request.prompt_token_ids)}{choice}"), EOS]

    async def scenario(bench: Bench) -> None:
        request = await bench.complete("a", TEXT.encode("b"), n=2)
        answer = await bench.answer(request)
        assert [choice.text for choice in answer.choices] == ["a0", "a1", "b0", "b1"]
        assert answer.usage.num_prompt_tokens == sum(len(prompt.token_ids) for prompt in request.prompts)
        assert len({sampling.seed for sampling in request.sampling}) == 2, "each prompt draws its own seed"
        assert len({sent.request_id for sent in bench.engine.requests}) == 2

    Bench(script).run(scenario)


def test_a_stop_string_cancels_its_choice_only() -> None:
    def script(request: Any, choice: int) -> list[int]:
        return [*TEXT.encode_rendered("a.b.c" if choice == 0 else "abcdef"), EOS]

    async def scenario(bench: Bench) -> None:
        request = await bench.complete("x", n=2, stop=(".",))
        answer = await bench.answer(request)
        assert [choice.text for choice in answer.choices] == ["a", "abcdef"]
        assert bench.engine.cancelled == [("r", 0)]
        assert bench.engine.closed == []

    Bench(script).run(scenario)


def test_the_last_stop_string_ends_the_request() -> None:
    async def scenario(bench: Bench) -> None:
        answer = await bench.answer(await bench.complete("x", stop=(".",)))
        assert answer.choices[0].text == "a"
        assert answer.usage.num_completion_tokens == 2
        assert bench.engine.closed == ["r"]

    Bench(says("a.bcdef")).run(scenario)


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_closing_the_stream_ends_the_work(num_prompts: int) -> None:
    async def scenario(bench: Bench) -> None:
        request = await bench.complete(*["x"] * num_prompts, max_tokens=400)
        async with aclosing(bench.service.stream(request)) as deltas:
            async for _ in deltas:
                break
        assert len(bench.engine.closed) == len(bench.engine.requests) == num_prompts

    Bench(says("x" * 400)).run(scenario)


def test_a_failed_step_and_a_dead_worker_are_exceptions() -> None:
    async def scenario(bench: Bench) -> None:
        request = await bench.complete("x")
        for error, kind in (("out of memory", StepFailed), (WorkerDied("gone"), WorkerDied)):
            bench.engine.error, bench.engine.error_after = error, 1
            with pytest.raises(kind, match=str(error)):
                await bench.answer(request)

    Bench(says("hello")).run(scenario)


def test_who_cannot_be_served() -> None:
    async def scenario(bench: Bench) -> None:
        with pytest.raises(ModelNotFound):
            await bench.service.prepare_completion("r", "nobody", ["x"], GenerationOptions())
        with pytest.raises(InvalidRequest, match="the limit is 1032"):
            await bench.complete(*["x"] * 2049)
        bench.entry.state = "loading"
        with pytest.raises(NotReady):
            await bench.complete("x")

    Bench(says("hello")).run(scenario)


def test_a_tokenizer_is_loaded_once_and_a_failure_is_not_remembered() -> None:
    calls: list[str] = []

    def load(entry: ModelEntry) -> ModelText:
        calls.append(entry.path)
        if len(calls) == 1:
            raise OSError("no such file")
        return TEXT

    async def scenario(bench: Bench) -> None:
        with pytest.raises(ModelLoadFailed, match="no such file"):
            await bench.texts.load([bench.entry])
        await asyncio.gather(bench.texts.load([bench.entry]), bench.complete("x"), bench.complete("y"))
        assert len(calls) == 2

    Bench(says(""), load).run(scenario)


def test_what_is_kept_for_a_model_goes_with_it() -> None:
    calls: list[str] = []

    def load(entry: ModelEntry) -> ModelText:
        calls.append(entry.path)
        return TEXT

    async def scenario(bench: Bench) -> None:
        await bench.complete("x")
        bench.texts.forget(bench.entry)
        bench.texts.forget(bench.entry)
        await bench.complete("x")
        assert len(calls) == 2

    Bench(says(""), load).run(scenario)


Consumer = Callable[[AsyncGenerator[Delta, None]], Coroutine[Any, Any, None]]


async def read_events(
    bench: Bench,
    request: GenerationRequest,
    consume: Callable[[AsyncGenerator[Delta, None]], Coroutine[Any, Any, None]],
) -> list[LogEvent]:
    with bench.log.subscribe(token_ids=True) as subscription:
        await consume(bench.service.stream(request))
        bench.log.close()
        return [event async for event in subscription]


async def to_the_end(deltas: AsyncGenerator[Delta, None]) -> None:
    async for _ in deltas:
        pass


async def one_delta(deltas: AsyncGenerator[Delta, None]) -> None:
    async with aclosing(deltas):
        assert isinstance(await anext(deltas), TextDelta)


def test_the_log_says_what_went_in_and_what_came_out() -> None:
    async def scenario(bench: Bench) -> None:
        chat = Chat(messages=[{"role": "user", "content": "hi"}])
        options = GenerationOptions(temperature=0.5, stop=("END",), repetition_penalty=1.5)
        request = await bench.service.prepare_chat("r", None, chat, options)
        went_in, came_out = await read_events(bench, request, to_the_end)
        for event in (went_in, came_out):
            assert (event["modelIdentifier"], event["modelPath"]) == ("org/stub", "/models/stub")
            assert event["request_id"] == "r"
            assert event["timestamp"] > 1_700_000_000_000
        assert went_in["type"] == "llm.prediction.input"
        assert went_in["input"] == "<s>user: hi</s><s>assistant: "
        assert went_in["tokenIds"] == request.prompts[0].token_ids
        parameters = went_in["parameters"]
        assert parameters["temperature"] == 0.5
        assert parameters["repeat_penalty"] == 1.5
        assert parameters["seed"] == request.sampling[0].seed
        assert parameters["stop"] == ("END",)
        assert came_out["type"] == "llm.prediction.output"
        assert came_out["output"] == "hello"
        stats = came_out["stats"]
        assert stats["stopReason"] == "eosFound"
        assert stats["promptTokensCount"] == len(request.prompts[0].token_ids)
        assert stats["predictedTokensCount"] == len(came_out["tokenIds"][0])
        assert stats["totalTokensCount"] == stats["promptTokensCount"] + stats["predictedTokensCount"]
        assert stats["timeToFirstTokenSec"] >= 0

    Bench(says("hello")).run(scenario)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "eosFound"),
        ({"stop": ("l",)}, "stopStringFound"),
        ({"max_tokens": 2}, "maxPredictedTokensReached"),
        ({"max_tokens": -1, "ignore_eos": True}, "contextLengthReached"),
    ],
)
def test_why_it_stopped(options: dict[str, Any], reason: str) -> None:
    async def scenario(bench: Bench) -> None:
        bench.engine.script = lambda request, choice: [*TEXT.encode_rendered("ab l"), *[EOS] * 1000]
        _, came_out = await read_events(bench, await bench.complete("x", **options), to_the_end)
        assert came_out["stats"]["stopReason"] == reason

    Bench(says("")).run(scenario)


def test_the_log_of_a_request_that_was_given_up_and_of_one_that_failed() -> None:
    async def fails(deltas: AsyncGenerator[Delta, None]) -> None:
        with pytest.raises(WorkerDied):
            await to_the_end(deltas)

    async def scenario(bench: Bench) -> None:
        _, came_out = await read_events(bench, await bench.complete("x"), one_delta)
        assert (came_out["stats"]["stopReason"], came_out["output"]) == ("userStopped", "h")
        bench.engine.error, bench.engine.error_after = WorkerDied("gone"), 2
        _, came_out = await read_events(bench, await bench.complete("x"), fails)
        assert (came_out["stats"]["stopReason"], came_out["output"]) == ("failed", "h ")

    Bench(says("h h h h")).run(scenario)
