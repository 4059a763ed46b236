"""The border between a prompt and an output of a form."""

from __future__ import annotations

from typing import Any

import pytest

from lmserve.service.chat_template import Chat, Prompt
from lmserve.service.healing import heal
from lmserve.service.model_text import ModelText
from lmserve.service.request import GenerationOptions
from lmserve.service.structure import OutputFormat
from tests.api.stub_engine import runner_info
from tests.service import tokenizers_for_tests as made
from tests.service.test_generation import EOS, TEXT, Bench

STARTER = made.smollm2()
FORM = OutputFormat("regex", "[a-z ]+", "guided_regex")


def encoded(text: str, model: ModelText = TEXT) -> Prompt:
    return Prompt(text, model.encode(text))


def test_the_last_token_is_taken_back() -> None:
    prompt = encoded("say hell")
    assert TEXT.table.piece(prompt.token_ids[-1]) == b"hell"
    assert heal(prompt, TEXT) == Prompt("say hell", prompt.token_ids[:-1], (), "hell")


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(None, TEXT.encode("say hell")),
        encoded("h"),
        encoded("say </s>"),
        Prompt("\u00e9", TEXT.encode("\u00e9")),
        Prompt("other", TEXT.encode("say hell")),
    ],
    ids=["token ids", "one token", "control token", "half a character", "not its text"],
)
def test_what_cannot_be_taken_back_stays(prompt: Prompt) -> None:
    assert heal(prompt, TEXT) == prompt


def test_tokens_that_do_not_concatenate_stay() -> None:
    model = ModelText(made.wordpiece())
    prompt = encoded("hello world", model)
    assert heal(prompt, model) == prompt


def script(request: Any, choice: int) -> list[int]:
    """Writes the healed text once more, in other tokens: one for each byte."""
    return [*(TEXT.encode_tokens(character)[0] for character in "hello w"), EOS]


@pytest.mark.parametrize("logprobs", [None, 0])
def test_the_answer_begins_behind_the_healed_text(logprobs: int | None) -> None:
    async def scenario(bench: Bench) -> None:
        request = await bench.complete("say hell", "ok hell", output=FORM, logprobs=logprobs, max_tokens=7)
        answer = await bench.answer(request)
        assert [choice.text for choice in answer.choices] == ["o w"] * 2
        for choice in answer.choices:
            positions = [(p.sampled.bytes, p.text_offset) for p in choice.logprobs]
            assert positions == ([] if logprobs is None else [(b"o", 0), (b" ", 1), (b"w", 2)])
        for sent in bench.engine.requests:
            assert TEXT.decode(sent.prompt_token_ids) in ("say ", "ok ")
            assert 'start: \\"hell\\"' in sent.grammar
            assert sent.sampling.max_tokens == 8, "one more, for the token that was taken back"

    Bench(script).run(scenario)


def test_a_token_that_crosses_the_border_has_its_log_probability_left_out() -> None:
    def crossing(request: Any, choice: int) -> list[int]:
        return [*TEXT.encode_tokens("hell"), *TEXT.encode_tokens(" w"), EOS]

    async def scenario(bench: Bench) -> None:
        answer = await bench.answer(await bench.complete("say he", output=FORM, logprobs=0))
        assert answer.choices[0].text == "ll w"
        assert [(p.sampled.bytes, p.text_offset) for p in answer.choices[0].logprobs] == [(b" w", 2)]

    Bench(crossing).run(scenario)


def test_nothing_is_healed_without_a_form_nor_in_an_echo() -> None:
    async def scenario(bench: Bench) -> None:
        for options in ({}, {"output": FORM, "echo": True}):
            await bench.answer(await bench.complete("say hell", **options))
        assert {tuple(sent.prompt_token_ids) for sent in bench.engine.requests} == {tuple(TEXT.encode("say hell"))}

    Bench(script).run(scenario)


def test_a_message_that_is_continued_is_healed_and_an_answer_is_not() -> None:
    async def scenario(bench: Bench) -> None:
        messages: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "hell"}]
        for chat in (Chat(messages=messages, continue_final_message=True), Chat(messages=messages[:1])):
            request = await bench.service.prepare_chat("r", None, chat, GenerationOptions(output=FORM))
            await bench.answer(request)
        continued, fresh = bench.engine.requests
        assert STARTER.decode(continued.prompt_token_ids).endswith("assistant\n")
        assert "hell" in continued.grammar
        assert "hell" not in fresh.grammar
        assert fresh.prompt_token_ids == continued.prompt_token_ids, "the template's own end stays"

    bench = Bench(lambda request, choice: STARTER.eos_token_ids, lambda entry: STARTER)
    bench.engine.info = runner_info(vocab_size=49152)
    bench.run(scenario)
