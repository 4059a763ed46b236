"""Outputs taken apart on their way to the deltas, with all that hangs on it: usage, stop strings, logprobs, log."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken

from lmserve.errors import InvalidRequest
from lmserve.outputs import FinishReason
from lmserve.service.chat_template import Chat
from lmserve.service.deltas import CallDelta, Delta, Finished, ReasoningDelta, StopReason, TextDelta, Usage
from lmserve.service.model_text import ModelText
from lmserve.service.request import GenerationOptions, GenerationRequest
from lmserve.service.structure import OutputFormat
from lmserve.service.tools import Tool, Toolbox, ToolChoice
from tests.service import tokenizers_for_tests as made
from tests.service.test_generation import Bench, read_events, to_the_end

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}</s>"
    "{% endfor %}<s>assistant: {% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
WEATHER = Tool("weather", "", {"type": "object", "properties": {"city": {"type": "string"}}})
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def model() -> ModelText:
    tokenizer = made.byte_level(TEMPLATE)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>"), AddedToken("<tool_call>", special=True)])
    return ModelText(tokenizer)


MODEL = model()
EOS = MODEL.eos_token_ids[0]


def bench(text: str) -> Bench:
    return Bench(lambda request, choice: [*MODEL.encode_tokens(text), EOS], lambda entry: MODEL)


def toolbox(mode: Any = "auto", *tools: Tool) -> Toolbox:
    return Toolbox(tools or (WEATHER,), ToolChoice(mode))


async def prepare(b: Bench, box: Toolbox | None = None, chat: Any = None, **options: Any) -> GenerationRequest:
    asked = Chat(messages=[{"role": "user", "content": "Hi"}], toolbox=box, **(chat or {}))
    return await b.service.prepare_chat("r", None, asked, GenerationOptions(**options))


async def deltas(b: Bench, *arguments: Any, **options: Any) -> list[Delta]:
    return [delta async for delta in b.service.stream(await prepare(b, *arguments, **options))]


def text_of(found: list[Delta], kind: type[TextDelta] | type[ReasoningDelta] = TextDelta) -> str:
    return "".join(delta.text for delta in found if isinstance(delta, kind))


def test_reasoning_calls_and_content_come_apart() -> None:
    async def scenario(b: Bench) -> None:
        found = await deltas(b, toolbox())
        assert text_of(found, ReasoningDelta) == "hm, Rome?"
        assert text_of(found) == "Let me see."
        calls = [delta for delta in found if isinstance(delta, CallDelta)]
        first, *rest = calls
        assert (first.index, first.name, first.arguments) == (0, "weather", "")
        assert first.id is not None
        assert first.id.startswith("call_")
        assert all((delta.index, delta.id, delta.name) == (0, None, None) for delta in rest)
        assert len(rest) > 1, "as they come"
        assert "".join(delta.arguments for delta in rest) == '{"city": "Rome"}'
        end, usage = found[-2:]
        assert end == Finished(0, FinishReason.STOP, StopReason.TOOL_CALLS, calls_tools=True)
        assert end.finish_reason == "tool_calls"
        assert isinstance(usage, Usage)
        assert usage.num_reasoning_tokens == len(MODEL.encode_tokens("<think>hm, Rome?</think>"))

    bench(f"<think>hm, Rome?</think>\n\nLet me see.\n{CALL}").run(scenario)


def test_the_whole_answer_is_the_deltas_folded() -> None:
    async def scenario(b: Bench) -> None:
        answer = await b.answer(await prepare(b, toolbox()))
        [choice] = answer.choices
        assert (choice.reasoning, choice.text) == ("hm", "")
        assert [(call.name, call.arguments) for call in choice.calls] == [("weather", '{"city": "Rome"}')] * 2
        assert len({call.id for call in choice.calls}) == 2

    bench(f"<think>hm</think>{CALL}\n{CALL}").run(scenario)


def test_without_tools_a_call_is_content_but_for_control_tokens() -> None:
    async def scenario(b: Bench) -> None:
        found = await deltas(b)
        assert text_of(found, ReasoningDelta) == "hm"
        assert text_of(found) == CALL.removeprefix("<tool_call>\n"), "nor are there the blanks behind reasoning"
        assert isinstance(found[-2], Finished)
        assert found[-2].finish_reason == "stop"

    bench(f"<think>hm</think>{CALL}").run(scenario)


def test_a_completion_is_never_taken_apart() -> None:
    async def scenario(b: Bench) -> None:
        answer = await b.answer(await b.complete("x"))
        assert answer.choices[0].text == "<think>hm</think>yes"
        assert answer.usage.num_reasoning_tokens == 0

    bench("<think>hm</think>yes").run(scenario)


def test_a_call_that_is_cut_off_says_length() -> None:
    async def scenario(b: Bench) -> None:
        found = await deltas(b, toolbox(), max_tokens=len(MODEL.encode_tokens(CALL)) - 20)
        end = found[-2]
        assert isinstance(end, Finished)
        assert end.calls_tools
        assert end.finish_reason == "length"
        assert any(isinstance(delta, CallDelta) for delta in found)

    bench(CALL).run(scenario)


def test_stop_strings_are_looked_for_in_content_only() -> None:
    async def scenario(b: Bench) -> None:
        found = await deltas(b, toolbox(), stop=("Rome", "STOP"))
        assert text_of(found, ReasoningDelta) == "Rome STOP"
        assert [delta.arguments for delta in found if isinstance(delta, CallDelta)][1:] != []
        assert text_of(found) == "\nafter "
        assert isinstance(found[-2], Finished)
        assert found[-2].stop_reason is StopReason.STOP_STRING_FOUND

    bench(f"<think>Rome STOP</think>{CALL}\nafter STOP never").run(scenario)


def test_half_a_stop_string_before_a_call_is_content() -> None:
    async def scenario(b: Bench) -> None:
        found = await deltas(b, toolbox(), stop=("seeing",))
        kinds = [type(delta) for delta in found]
        assert text_of(found) == "I see"
        assert kinds.index(CallDelta) > max(i for i, kind in enumerate(kinds) if kind is TextDelta)

    bench(f"I see{CALL}").run(scenario)


def test_log_probabilities_are_of_the_content() -> None:
    async def scenario(b: Bench) -> None:
        found = await deltas(b, toolbox(), logprobs=0)
        positions = [p for delta in found if isinstance(delta, TextDelta) for p in delta.logprobs]
        assert b"".join(p.sampled.bytes for p in positions) == b"hello"
        assert [p.text_offset for p in positions] == sorted(p.text_offset for p in positions)

    bench(f"<think>hm</think>hello{CALL}").run(scenario)


def test_the_log_has_the_output_as_the_model_wrote_it() -> None:
    async def scenario(b: Bench) -> None:
        _, output = await read_events(b, await prepare(b, toolbox()), to_the_end)
        assert output["output"] == f"<think>hm</think>yes{CALL}"
        stats = output["stats"]
        assert isinstance(stats, dict)
        assert stats["stopReason"] == "toolCalls"

    bench(f"<think>hm</think>yes{CALL}").run(scenario)


@pytest.mark.parametrize("mode", ["required", "auto"])
def test_a_grammar_goes_with_the_request_and_the_vocabulary_once_before_it(mode: str) -> None:
    async def scenario(b: Bench) -> None:
        output = None if mode == "required" else OutputFormat("json", {"type": "integer"}, "response_format")
        for _ in range(2):
            await deltas(b, toolbox(mode), output=output)
        assert b.engine.vocabulary is not None
        assert b.engine.vocabulary.eos_token_ids == [EOS]
        first, second = b.engine.requests
        assert first.grammar == second.grammar
        token_id = MODEL.control_ids["<tool_call>"]
        assert f"<[{token_id}]>" in first.grammar
        assert ("body1" in first.grammar) == (mode == "auto")

    bench(CALL).run(scenario)


def test_free_requests_have_no_grammar() -> None:
    async def scenario(b: Bench) -> None:
        await deltas(b, toolbox())
        assert b.engine.requests[0].grammar == ""
        assert b.engine.vocabulary is None

    bench("Hi").run(scenario)


def test_thinking_that_the_prompt_has_closed_is_not_waited_for() -> None:
    async def scenario(b: Bench) -> None:
        output = OutputFormat("json", {"type": "integer"}, "response_format")
        await deltas(b, None, {"template_kwargs": {"enable_thinking": False}}, output=output)
        await deltas(b, None, {"reasoning_effort": "none"}, output=output)
        await deltas(b, output=output)
        closed, by_effort, free = (sent.grammar for sent in b.engine.requests)
        assert closed == by_effort
        assert "thought" not in closed
        assert "thought" in free

    bench("5").run(scenario)


@pytest.mark.parametrize(("name", "value"), [("min_tokens", 3), ("ignore_eos", True)])
def test_what_has_no_meaning_beside_a_format_is_refused(name: str, value: Any) -> None:
    async def scenario(b: Bench) -> None:
        output = OutputFormat("choice", ["a"], "guided_choice")
        with pytest.raises(InvalidRequest) as caught:
            await prepare(b, output=output, **{name: value})
        assert caught.value.param == name
        assert b.engine.requests == []

    bench("a").run(scenario)


def test_a_completion_may_have_a_format() -> None:
    async def scenario(b: Bench) -> None:
        request = await b.complete("x", output=OutputFormat("regex", "[a-z]+", "guided_regex"))
        await b.answer(request)
        assert "[a-z]+" in b.engine.requests[0].grammar
        with pytest.raises(InvalidRequest, match="guided_regex cannot be enforced"):
            await b.complete("x", output=OutputFormat("regex", "[a-z", "guided_regex"))

    bench("abc").run(scenario)


def test_fields_without_effect_are_told() -> None:
    async def scenario(b: Bench) -> None:
        request = await prepare(b, None, {"reasoning_effort": "low"})
        assert request.ignored == ()

    async def plain(b: Bench) -> None:
        request = await prepare(b, None, {"reasoning_effort": "low"})
        assert request.ignored == ("reasoning_effort",)

    bench("x").run(scenario)
    text = ModelText(made.byte_level())
    Bench(lambda request, choice: [text.eos_token_ids[0]], lambda entry: text).run(plain)
