"""The log-probabilities of prompts through scheduler and engine: each once, in order, whatever happens on the way."""

from __future__ import annotations

import logging
from dataclasses import replace

import msgspec
import pytest

from lmserve.engine.core import STEP_FAILED, EngineCore
from lmserve.engine.messages import AddRequest
from lmserve.engine.scheduler import Scheduler
from lmserve.outputs import FinishReason, RequestOutput
from lmserve.runtime.interface import PromptImage, StepOutput
from lmserve.sampling_params import SamplingParams
from tests.engine.factories import (
    Results,
    expected_output,
    expected_prompt_logprobs,
    make_config,
    make_engine,
    run_to_end,
)
from tests.engine.fake_runner import EOS, VOCAB_SIZE, FakeRunner, Faults, make_info


def message(
    name: str = "a",
    num_tokens: int = 10,
    *,
    first_token: int = 0,
    max_tokens: int = 0,
    n: int = 1,
    prompt_logprobs: int | None = 0,
) -> AddRequest:
    prompt = [(first_token + i) % VOCAB_SIZE for i in range(num_tokens)]
    sampling = SamplingParams(max_tokens=max_tokens, n=n, prompt_logprobs=prompt_logprobs, ignore_eos=True)
    return AddRequest(name, prompt, sampling, [EOS])


def make_limited(runner: FakeRunner, max_num_prompt_logprobs: int) -> EngineCore:
    """An engine whose steps compute so few rows of logits for prompts."""
    engine = make_engine(runner)
    config = make_config(runner.info, max_num_prompt_logprobs=max_num_prompt_logprobs)
    engine.scheduler = Scheduler(config, engine.scheduler.kv)
    return engine


def assert_complete(results: Results, *messages: AddRequest) -> None:
    for sent in messages:
        for choice in range(sent.sampling.n):
            key = (sent.request_id, choice)
            assert results.prompt_logprobs[key] == expected_prompt_logprobs(sent, choice), key
            got = results.token_ids[key], results.ends[key].finish_reason
            assert got == expected_output(sent, choice, 64), key


def run(engine: EngineCore, *messages: AddRequest) -> Results:
    for sent in messages:
        assert engine.add_request(sent) == []
    results = run_to_end(engine)
    assert_complete(results, *messages)
    return results


def chunks(runner: FakeRunner) -> list[list[tuple[int, int, range]]]:
    """Start, length and positions with a prompt log-probability, of each chunk of each step."""
    return [[(c.start, c.num_tokens, c.prompt_logprobs) for c in step.chunks] for step in runner.steps]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 31, 32, 33, 64])
def test_every_token_but_the_first_is_reported(num_tokens: int) -> None:
    results = run(make_engine(FakeRunner(make_info())), message(num_tokens=num_tokens))
    assert len(results.prompt_logprobs[("a", 0)]) == num_tokens - 1


def test_who_did_not_ask_hears_nothing() -> None:
    runner = FakeRunner(make_info())
    results = run(make_engine(runner), message(prompt_logprobs=None, max_tokens=3))
    assert results.prompt_logprobs[("a", 0)] == []
    assert not any(positions for step in chunks(runner) for _, _, positions in step)


def test_chunks_report_as_they_are_computed() -> None:
    engine = make_engine(FakeRunner(make_info(max_num_batched_tokens=4)))
    engine.add_request(message(num_tokens=10, max_tokens=1))
    news = [[(len(o.prompt_logprobs), len(o.token_ids), o.finish_reason) for o in engine.step()] for _ in range(3)]
    assert news == [[(4, 0, None)], [(4, 0, None)], [(1, 1, FinishReason.LENGTH)]]


def test_without_output_the_last_of_them_come_with_the_end() -> None:
    engine = make_engine(FakeRunner(make_info()))
    engine.add_request(message(num_tokens=5, n=2))
    first, second = [*engine.step(), *engine.step()]
    assert (first.choice, first.finish_reason, len(first.prompt_logprobs)) == (0, FinishReason.LENGTH, 4)
    assert second == RequestOutput("a", 1, num_cached_tokens=4, finish_reason=FinishReason.LENGTH)


def test_no_output_is_wanted_of_a_prompt_that_is_cached() -> None:
    """Its last token is computed all the same: somebody has to."""
    engine = make_engine(FakeRunner(make_info()))
    for num_cached in (0, 16):
        results = run(engine, message(num_tokens=17, prompt_logprobs=None))
        assert results.ends[("a", 0)].num_cached_tokens == num_cached


def test_a_cached_prefix_is_computed_anew_and_shared_as_ever() -> None:
    engine = make_engine(FakeRunner(make_info()))
    for prompt_logprobs, num_cached in ((None, 0), (0, 0), (None, 20)):
        sent = message(num_tokens=21, max_tokens=2, prompt_logprobs=prompt_logprobs)
        results = run(engine, sent)
        assert results.ends[("a", 0)].num_cached_tokens == num_cached


def test_what_it_computed_is_found_by_others() -> None:
    engine = make_engine(FakeRunner(make_info()))
    run(engine, message("a", 21))
    assert run(engine, message("b", 21, prompt_logprobs=None)).ends[("b", 0)].num_cached_tokens == 20


def test_it_waits_for_nobodys_prefix() -> None:
    """It would have to compute it anyhow."""
    engine = make_engine(FakeRunner(make_info(max_num_batched_tokens=64)))
    run(engine, message("a", 20, prompt_logprobs=None), message("b", 20))
    assert engine.stats.num_steps == 1


def test_choice_0_reports_for_all_and_the_others_share_its_prompt() -> None:
    runner = FakeRunner(make_info())
    results = run(make_engine(runner), message(num_tokens=30, n=3, max_tokens=2))
    assert [results.ends[("a", choice)].num_cached_tokens for choice in range(3)] == [0, 28, 28]
    assert sum(len(positions) for step in chunks(runner) for _, _, positions in step) == 29


def test_the_budget_of_rows_cuts_chunks_and_lets_others_pass() -> None:
    runner = FakeRunner(make_info(max_num_batched_tokens=32))
    engine = make_limited(runner, 8)
    run(
        engine,
        message("a", 11),
        message("b", 6, first_token=20),
        message("c", 9, first_token=30, prompt_logprobs=None),
    )
    none = range(0)
    assert chunks(runner) == [
        [(0, 8, range(8)), (0, 9, none)],  # a takes all rows, b waits, c passes
        [(8, 3, range(8, 10)), (0, 6, range(5))],
    ]


def test_rows_run_out_in_the_middle_of_a_step() -> None:
    runner = FakeRunner(make_info())
    engine = make_limited(runner, 8)
    messages = [message(str(i), 7, first_token=10 * i, max_tokens=1) for i in range(3)]
    run(engine, *messages)
    assert [sum(len(positions) for _, _, positions in step) for step in chunks(runner)] == [8, 8, 2]


def test_rows_go_by_rank_and_one_that_runs_waits_for_some() -> None:
    runner = FakeRunner(make_info())
    engine = make_limited(runner, 4)
    engine.add_request(message("running", 10))
    results = Results()
    results.take(engine.step())
    urgent = AddRequest("urgent", [40, 41, 42, 43, 44], SamplingParams(max_tokens=0, prompt_logprobs=0), [EOS], -1)
    engine.add_request(urgent)
    while engine.has_work:
        results.take(engine.step())
    assert_complete(results, message("running", 10), urgent)
    assert [[len(positions) for _, _, positions in step] for step in chunks(runner)] == [[4], [4], [4], [1]]


def test_choices_of_one_that_lacks_rows_do_not_compute_its_prompt() -> None:
    runner = FakeRunner(make_info())
    engine = make_limited(runner, 16)
    run(engine, message("a", 20), message("b", 9, first_token=30, n=3))
    assert [[len(positions) for _, _, positions in step] for step in chunks(runner)] == [[16], [3, 8], [0, 0]]


def test_a_preempted_prompt_goes_on_where_it_was() -> None:
    """Cached blocks are used as far as is reported, and nothing is reported twice."""
    runner = FakeRunner(make_info(max_num_batched_tokens=10), {1: ("launch", MemoryError())})
    engine = make_engine(runner)
    first, second = message("first", 3, max_tokens=5), message("second", 17, first_token=20)
    results = Results()
    for sent in (first, second):
        engine.add_request(sent)
    results.take(engine.step())
    assert len(results.prompt_logprobs[("second", 0)]) == 7
    results.take(engine.step())
    assert engine.stats.num_preemptions == 1, "out of memory puts the second off"
    results.take(engine.step())
    [readmitted] = [c for c in runner.steps[-1].chunks if c.num_tokens > 1]
    assert (readmitted.start, readmitted.prompt_logprobs) == (4, range(7, 13))
    while engine.has_work:
        results.take(engine.step())
    assert_complete(results, first, second)


def test_once_all_is_reported_the_whole_prefix_may_come_from_the_cache() -> None:
    runner = FakeRunner(make_info(), {1: ("launch", MemoryError())})
    engine = make_engine(runner)
    messages = [message(name, 14, first_token=20 * i, max_tokens=6) for i, name in enumerate("ab")]
    run(engine, *messages)
    assert engine.stats.num_preemptions == 1
    assert chunks(runner)[2][1] == (12, 3, range(0)), "b again: 14 tokens of prompt and one of output"


@pytest.mark.parametrize("faults", [{0: ("collect", RuntimeError())}, {1: ("written", RuntimeError())}])
def test_a_failed_step_ends_it(faults: Faults, caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(FakeRunner(make_info(max_num_batched_tokens=8), faults))
    engine.add_request(message(num_tokens=20))
    with caplog.at_level(logging.CRITICAL):
        results = run_to_end(engine)
    assert results.ends[("a", 0)].error == STEP_FAILED
    assert len(results.prompt_logprobs[("a", 0)]) == 8 * next(iter(faults))


class ForgetfulRunner(FakeRunner):
    """Loses the log-probability of a prompt's token."""

    def collect(self) -> StepOutput:
        output = super().collect()
        return replace(output, prompt_logprobs=output.prompt_logprobs[:-1])


def test_a_missing_one_is_a_failed_step(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(ForgetfulRunner(make_info()))
    engine.add_request(message())
    [output] = engine.step()
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, STEP_FAILED)
    assert "scored 8 prompt tokens for 9" in caplog.text


def test_a_prompt_with_images_is_refused() -> None:
    """An image that is taken whole may be longer than the rows of logits that a step has room for."""
    engine = make_engine(FakeRunner(make_info(images="whole")))
    images = [PromptImage(1, 9, "a", "")]
    [output] = engine.add_request(msgspec.structs.replace(message("a", 12), images=images))
    assert output.finish_reason is FinishReason.ERROR
    assert output.error == "There are no log-probabilities of a prompt with images."
    assert not output.may_retry
    assert engine.add_request(msgspec.structs.replace(message("b", 12, prompt_logprobs=None), images=images)) == []
