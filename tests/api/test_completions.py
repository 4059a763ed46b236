from __future__ import annotations

from typing import Any

import pytest
from openai.types import Completion

from tests.api.running_server import RunningServer, goes_on, says
from tests.service import tokenizers_for_tests as made


def test_an_answer(server: RunningServer) -> None:
    answer = server.client.completions.create(model="stub", prompt="Once", max_tokens=50)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model, answer.system_fingerprint) == ("text_completion", "org/stub", "fp_stub")
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("Hello there!", "stop", None)
    [sent] = server.engine.requests
    assert sent.prompt_token_ids == made.smollm2().encode("Once"), "no template"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 1


def test_the_answer_has_openais_shape_and_nothing_of_ours(server: RunningServer) -> None:
    body = server.complete(logprobs=2).json()
    known = Completion.model_validate(body, strict=True)
    assert body == known.model_dump(exclude_unset=True)
    assert not known.model_extra


def test_sixteen_tokens_unless_told(server: RunningServer) -> None:
    server.engine.script = goes_on
    answer = server.complete().json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("Once", ["Once"]),
        (["Once", "Twice"], ["Once", "Twice"]),
        ([6, 7], [[6, 7]]),
        ([[6, 7], [8]], [[6, 7], [8]]),
    ],
)
def test_prompts_of_every_kind(server: RunningServer, prompt: Any, sent: list[Any]) -> None:
    answer = server.client.completions.create(model="stub", prompt=prompt, n=2, max_tokens=3)
    assert [choice.index for choice in answer.choices] == list(range(2 * len(sent)))
    encoded = [made.smollm2().encode(item) if isinstance(item, str) else item for item in sent]
    assert [request.prompt_token_ids for request in server.engine.requests] == encoded


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ("", "prompt"),
        ([""], "prompt"),
        ([[]], "prompt"),
        (["x", 3], "prompt[1]"),
        ([10**9], "prompt"),
        ([-1], "prompt"),
        (3, "prompt"),
        (None, "prompt"),
        ([[1, "a"]], "prompt[0][1]"),
        ([True], "prompt[0]"),
    ],
)
def test_prompts_that_are_none(server: RunningServer, prompt: Any, param: str) -> None:
    response = server.complete(prompt=prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_stream(server: RunningServer) -> None:
    server.engine.script = says("one two", "three")
    texts = {0: "", 1: "", 2: "", 3: ""}
    reasons = {}
    last = None
    stream = server.client.completions.create(
        model="stub", prompt=["a", "b"], n=2, stream=True, stream_options={"include_usage": True}
    )
    for last in stream:
        for choice in last.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {0: "one two", 1: "three", 2: "one two", 3: "three"}
    assert reasons == dict.fromkeys(range(4), "stop")
    assert last is not None
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == 2


def test_a_stream_ends_with_the_mark(server: RunningServer) -> None:
    assert server.complete(stream=True).text.endswith("\n\ndata: [DONE]\n\n")


def test_logprobs(server: RunningServer) -> None:
    server.engine.script = says("a\U0001f600")
    logprobs = server.complete(logprobs=1).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][0] == "a"
    assert all(token.startswith("bytes:\\x") for token in logprobs["tokens"][1:])
    assert logprobs["text_offset"] == [0, *[1] * (len(logprobs["tokens"]) - 1)]
    assert logprobs["token_logprobs"] == [-0.5] * len(logprobs["tokens"])
    assert logprobs["top_logprobs"][0] == {"a": -0.5}


def test_logprobs_zero_is_the_sampled_token_alone(server: RunningServer) -> None:
    logprobs = server.complete(logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][0] == "Hello"
    assert logprobs["top_logprobs"][0] == {"Hello": -0.5}


def test_best_of(server: RunningServer) -> None:
    assert server.complete(best_of=2, n=2).status_code == 200
    refused = server.complete(best_of=2)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "best_of")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Once upon a", made.smollm2().encode("Once upon a")])
def test_an_echo(server: RunningServer, prompt: Any, stream: bool) -> None:
    if stream:
        chunks = server.client.completions.create(model="stub", prompt=prompt, echo=True, stream=True, n=2)
        texts = ["", ""]
        for chunk in chunks:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        answer = server.client.completions.create(model="stub", prompt=prompt, echo=True, n=2)
        texts = [choice.text for choice in answer.choices]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)
    assert texts == ["Once upon aHello there!"] * 2


def test_an_echo_alone_scores_the_prompt(server: RunningServer) -> None:
    """What an evaluation harness asks for."""
    body = {"prompt": ["Once upon a", "time"], "echo": True, "max_tokens": 0, "logprobs": 2, "n": 2}
    answer = server.complete(**body).json()
    assert answer["usage"]["completion_tokens"] == 0
    assert [choice["text"] for choice in answer["choices"]] == ["Once upon a"] * 2 + ["time"] * 2
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    first, second, *_ = [choice["logprobs"] for choice in answer["choices"]]
    assert first == second
    assert first["tokens"] == ["Once", " upon", " a"]
    assert first["token_logprobs"] == [None, -1.0, -2.0]
    assert first["text_offset"] == [0, 4, 9]
    assert first["top_logprobs"][0] is None
    assert first["top_logprobs"][1][" upon"] == -1.0
    assert len(first["top_logprobs"][1]) == 2


def test_an_echo_and_its_continuation_have_one_list_of_logprobs(server: RunningServer) -> None:
    """The token that ended it included: a harness counts an entry for each generated token."""
    logprobs = server.complete(prompt="Once upon a", echo=True, logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["Once", " upon", " a", "Hello", " there", "!", "<|im_end|>"]
    assert logprobs["text_offset"] == [0, 4, 9, 11, 16, 22, 23]
    assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -0.5, -0.5, -0.5, -0.5]
    assert all(len(lists) == 7 for lists in logprobs.values())


def test_no_tokens_without_an_echo(server: RunningServer) -> None:
    for echo in (None, False):
        error = server.complete(max_tokens=0, echo=echo).json()["error"]
        assert error["param"] == "max_tokens"
        assert "at least 1" in error["message"]


def test_an_echo_counts_against_the_context(server: RunningServer) -> None:
    assert server.complete(prompt=[5] * 512, echo=True, max_tokens=0).status_code == 200
    error = server.complete(prompt=[5] * 513, echo=True, max_tokens=0).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "513 in the prompt" in error["message"]
