from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from lmserve.errors import ContextLengthExceeded, InvalidRequest
from lmserve.service.chat_template import Prompt
from lmserve.service.model_text import ModelText, SamplingDefaults
from lmserve.service.request import GenerationOptions, GenerationRequest, ServedModel, make_request
from tests.api.stub_engine import Settings, StubEngine, StubEntry, runner_info
from tests.service import tokenizers_for_tests as made

TOKENIZER = made.byte_level()


def make(
    options: GenerationOptions,
    *,
    prompt: list[int] | None = None,
    server: Settings | None = None,
    model: SamplingDefaults | None = None,
    preset: Mapping[str, float] | None = None,
    default_max_tokens: int | None = None,
    **limits: Any,
) -> GenerationRequest:
    engine = StubEngine(runner_info(vocab_size=300, **limits), lambda request, choice: [])
    served = ServedModel(StubEntry(engine, sampling=preset or {}), engine, ModelText(TOKENIZER, defaults=model))
    return make_request(
        "r",
        served,
        [Prompt(None, [1, 2, 3] if prompt is None else prompt)],
        options,
        server or Settings(),
        prompt_param="prompt",
        default_max_tokens=default_max_tokens,
    )


def test_the_requests_word_then_the_servers_then_the_models_then_the_presets() -> None:
    model = SamplingDefaults(temperature=0.1, top_p=0.1, top_k=1)
    preset = {"temperature": 0.4, "top_p": 0.4, "top_k": 4.0, "min_p": 0.4}
    server = Settings(default_temperature=0.2, default_top_p=0.2)
    [sampling] = make(GenerationOptions(temperature=0.3), server=server, model=model, preset=preset).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.3, 0.2, 1, 0.4)
    assert sampling.typical_p == 1.0


def test_zero_is_a_word() -> None:
    [sampling] = make(GenerationOptions(temperature=0.0), server=Settings(default_temperature=1.0)).sampling
    assert sampling.temperature == 0


def test_minus_one_turns_top_k_off() -> None:
    [sampling] = make(GenerationOptions(top_k=-1), model=SamplingDefaults(top_k=50)).sampling
    assert sampling.top_k == 0


@pytest.mark.parametrize(
    ("asked", "default", "granted"), [(None, None, 61), (-1, 16, 61), (None, 16, 16), (None, 100, 61), (61, None, 61)]
)
def test_max_tokens(asked: int | None, default: int | None, granted: int) -> None:
    [sampling] = make(GenerationOptions(max_tokens=asked), default_max_tokens=default, max_model_len=64).sampling
    assert sampling.max_tokens == granted


@pytest.mark.parametrize(("max_model_len", "num_blocks"), [(64, 1000), (1000, 4)])
def test_the_context_is_the_models_or_the_caches(max_model_len: int, num_blocks: int) -> None:
    limits: dict[str, Any] = {"max_model_len": max_model_len, "num_blocks": num_blocks}
    with pytest.raises(ContextLengthExceeded) as caught:
        make(GenerationOptions(max_tokens=62), **limits)
    assert (caught.value.limit, caught.value.num_prompt_tokens, caught.value.max_tokens) == (64, 3, 62)
    assert caught.value.param == "prompt"
    with pytest.raises(ContextLengthExceeded):
        make(GenerationOptions(), prompt=[1] * 64, **limits)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (GenerationOptions(max_tokens=0), "max_tokens"),
        (GenerationOptions(max_tokens=-2), "max_tokens"),
        (GenerationOptions(max_tokens=-2, echo=True), "max_tokens"),
        (GenerationOptions(max_tokens=0, echo=True, min_tokens=1), "min_tokens"),
        (GenerationOptions(temperature=2.1), "temperature"),
        (GenerationOptions(logit_bias={300: 1.0}), "logit_bias"),
        (GenerationOptions(stop_token_ids=(-1,)), "stop_token_ids"),
        (GenerationOptions(stop=("x",) * 17), "stop"),
        (GenerationOptions(stop=("",)), "stop"),
        (GenerationOptions(max_tokens=4, min_tokens=5), "min_tokens"),
    ],
)
def test_out_of_range(options: GenerationOptions, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make(options)
    assert caught.value.param == param


def test_an_echo_alone_may_fill_the_context() -> None:
    [sampling] = make(GenerationOptions(max_tokens=0, echo=True), prompt=[1] * 64, max_model_len=64).sampling
    assert sampling.max_tokens == 0
    for asked, prompt in ((0, [1] * 65), (1, [1] * 64), (-1, [1] * 64)):
        with pytest.raises(ContextLengthExceeded):
            make(GenerationOptions(max_tokens=asked, echo=True), prompt=prompt, max_model_len=64)


@pytest.mark.parametrize(
    ("echo", "logprobs", "prompt_logprobs"), [(False, 3, None), (True, None, None), (True, 0, 0), (True, 3, 3)]
)
def test_an_echo_has_the_log_probabilities_too(echo: bool, logprobs: int | None, prompt_logprobs: int | None) -> None:
    request = make(GenerationOptions(echo=echo, logprobs=logprobs))
    assert (request.sampling[0].logprobs, request.sampling[0].prompt_logprobs) == (logprobs, prompt_logprobs)
    assert request.echo == echo


@pytest.mark.parametrize("prompt", [[], [300], [-1]])
def test_prompts_that_no_model_can_read(prompt: list[int]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make(GenerationOptions(), prompt=prompt)
    assert caught.value.param == "prompt"


def test_seeds() -> None:
    def seed(asked: int | None) -> int:
        [sampling] = make(GenerationOptions(seed=asked)).sampling
        return sampling.seed

    assert seed(7) == 7
    assert seed(-1) == -1
    assert seed(2**64 - 1) == -1, "unsigned ones are the same bits"
    assert seed(None) != seed(None)
