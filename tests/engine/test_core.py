from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmserve.engine.core import STEP_FAILED, EngineCore
from lmserve.engine.messages import AddRequest, Cancel, Pause, Resume
from lmserve.outputs import FinishReason, RequestOutput
from lmserve.runtime.interface import FatalRunnerError, StepInput, StepOutput
from lmserve.sampling_params import SamplingParams
from tests.engine.factories import Results, expected_output, make_engine, run_to_end
from tests.engine.fake_runner import EOS, VOCAB_SIZE, FakeRunner, Faults, Moment, OutOfMemoryError, make_info

ROOT = Path(__file__).parents[2]
MOMENTS: tuple[Moment, ...] = ("launch", "written", "collect")


def message(
    name: str = "a", num_tokens: int = 10, *, first_token: int = 0, priority: int = 0, **sampling: Any
) -> AddRequest:
    prompt = [(first_token + i) % VOCAB_SIZE for i in range(num_tokens)]
    return AddRequest(name, prompt, SamplingParams(**{"max_tokens": 12, **sampling}), [EOS], priority)


def assert_complete(results: Results, *messages: AddRequest, limit: int = 64) -> None:
    """Every choice got exactly what it gets alone."""
    for sent in messages:
        for choice in range(sent.sampling.n):
            key = (sent.request_id, choice)
            got = results.token_ids[key], results.ends[key].finish_reason
            assert got == expected_output(sent, choice, limit), key


def assert_all_free(engine: EngineCore) -> None:
    engine.check_integrity()
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == 64
    assert not engine.has_work


def test_requests_get_what_they_get_alone() -> None:
    messages = [
        message("a", seed=1),
        message("b", 1, max_tokens=30, ignore_eos=True),
        message("c", 33, n=3, first_token=9),
        message("d", 40, max_tokens=0),
        message("e", 64 - 5, max_tokens=50),
        message("f", 5, min_tokens=10),
    ]
    engine = make_engine(FakeRunner(make_info()))
    for sent in messages:
        assert engine.add_request(sent) == []
    results = run_to_end(engine)
    assert_complete(results, *messages)
    assert len(results.token_ids[("e", 0)]) == 5
    assert_all_free(engine)


def test_seed_and_choice_make_a_difference() -> None:
    engine = make_engine(FakeRunner(make_info()))
    for seed in (1, 2):
        engine.add_request(message(str(seed), seed=seed, n=3, ignore_eos=True))
    results = run_to_end(engine)
    assert len({tuple(tokens) for tokens in results.token_ids.values()}) == 6


def test_choices_share_the_prompt() -> None:
    for prefix_caching in (True, False):
        engine = make_engine(FakeRunner(make_info()), prefix_caching=prefix_caching)
        engine.add_request(message(num_tokens=30, n=5, max_tokens=1))
        results = run_to_end(engine)
        assert engine.stats.num_prompt_tokens == 30 + 4 * 2
        assert engine.stats.num_cached_tokens == 4 * 28
        assert [results.ends[("a", choice)].num_cached_tokens for choice in range(5)] == [0, 28, 28, 28, 28]


def test_without_prefix_caching_requests_share_nothing() -> None:
    engine = make_engine(FakeRunner(make_info()), prefix_caching=False)
    for name in ("a", "b", "a"):
        engine.add_request(message(name, 30))
        if name == "b":
            run_to_end(engine)
    results = run_to_end(engine)
    assert results.ends[("a", 0)].num_cached_tokens == 0
    assert engine.stats.num_cached_tokens == 0


def test_stats_count() -> None:
    runner = FakeRunner(make_info())
    engine = make_engine(runner)
    engine.add_request(message("a", 20, max_tokens=4, ignore_eos=True))
    engine.add_request(message("b", 20, max_tokens=4, ignore_eos=True, first_token=9))
    engine.step()
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (2, 0, 54)
    assert (stats.num_steps, stats.num_prompt_tokens, stats.num_generated_tokens) == (1, 32, 1)
    engine.cancel(Cancel("b"))
    run_to_end(engine)
    engine.add_request(message("c", 20, max_tokens=2, ignore_eos=True))
    run_to_end(engine)
    stats = engine.stats
    assert (stats.num_finished, stats.num_cancelled, stats.num_preemptions) == (2, 1, 0)
    assert (stats.num_steps, stats.num_prompt_tokens, stats.num_generated_tokens) == (6, 32 + 4, 6)
    assert stats.num_cached_tokens == 16
    assert len(runner.steps) == 6


def test_logprobs_go_with_their_tokens() -> None:
    engine = make_engine(FakeRunner(make_info()))
    engine.add_request(message("with", logprobs=0))
    engine.add_request(message("without", first_token=5))
    num_with = 0
    while engine.has_work:
        for output in engine.step():
            if output.request_id == "with":
                assert [p.logprob for p in output.logprobs] == [-float(t) for t in output.token_ids]
                num_with += 1
            else:
                assert output.logprobs == ()
    assert num_with > 0


def test_cancelling_frees_at_once_wherever_the_request_is() -> None:
    engine = make_engine(FakeRunner(make_info()))
    engine.add_request(message("decoding", 4, ignore_eos=True))
    engine.step()
    engine.add_request(message("prefilling", 50, first_token=20))
    engine.step()
    engine.add_request(message("waiting", 8, first_token=40))
    for name in ("decoding", "prefilling", "waiting"):
        assert engine.cancel(Cancel(name)) == [RequestOutput(name, 0, finish_reason=FinishReason.ABORT)]
        assert engine.cancel(Cancel(name)) == []
    assert_all_free(engine)
    assert engine.step() == []


def test_one_choice_can_be_cancelled() -> None:
    engine = make_engine(FakeRunner(make_info()))
    sent = message(n=3)
    engine.add_request(sent)
    engine.step()
    [output] = engine.cancel(Cancel("a", 1))
    assert (output.choice, output.finish_reason) == (1, FinishReason.ABORT)
    assert engine.cancel(Cancel("a", 1)) == engine.cancel(Cancel("a", 7)) == engine.cancel(Cancel("x")) == []
    results = run_to_end(engine)
    assert sorted(results.ends) == [("a", 0), ("a", 2)]
    assert results.ends[("a", 2)].finish_reason is not FinishReason.ABORT


def test_a_name_can_be_used_again() -> None:
    engine = make_engine(FakeRunner(make_info()))
    for _ in range(2):
        assert engine.add_request(message()) == []
        assert_complete(run_to_end(engine), message())


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (message(), "running already"),
        (AddRequest("b", [], SamplingParams(max_tokens=1)), "empty"),
        (message("b", 64), "64 tokens"),
        (message("b", 65, max_tokens=0), "65 tokens"),
        (AddRequest("b", [1, VOCAB_SIZE], SamplingParams(max_tokens=1)), "vocabulary"),
        (AddRequest("b", [-1], SamplingParams(max_tokens=1)), "vocabulary"),
        (AddRequest("b", [2**40], SamplingParams(max_tokens=1)), "vocabulary"),
        (AddRequest("b", [1], SamplingParams(max_tokens=1, stop_token_ids=(99,))), "vocabulary"),
        (AddRequest("b", [1], SamplingParams(max_tokens=1, logit_bias=((99, 1.0),))), "vocabulary"),
    ],
)
def test_what_cannot_run_is_refused_and_nobody_else_suffers(sent: AddRequest, words: str) -> None:
    engine = make_engine(FakeRunner(make_info()))
    engine.add_request(message())
    engine.step()
    [output] = engine.add_request(sent)
    assert (output.request_id, output.finish_reason) == (sent.request_id, FinishReason.ERROR)
    assert not output.may_retry
    assert words in (output.error or "")
    while engine.has_work:
        engine.step()
    assert_all_free(engine)


def test_every_choice_of_a_refused_request_hears_of_it() -> None:
    engine = make_engine(FakeRunner(make_info()))
    outputs = engine.add_request(message("b", 64, n=3))
    assert [output.choice for output in outputs] == [0, 1, 2]


def test_what_just_fits_runs() -> None:
    info = make_info(num_blocks=5, block_size=4)
    engine = make_engine(FakeRunner(info))
    messages = [message("a", 20, max_tokens=0), message("b", 19, max_tokens=30), message("c", 3, max_tokens=17)]
    for sent in messages:
        assert engine.add_request(sent) == []
    assert_complete(run_to_end(engine), *messages, limit=20)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_failed_step_costs_its_requests_and_no_others(moment: Moment, caplog: pytest.LogCaptureFixture) -> None:
    runner = FakeRunner(make_info(), {1: (moment, RuntimeError("secret detail"))})
    engine = make_engine(runner)
    running, held_up, later = message("a"), message("b", 40, first_token=20), message("c", 40, first_token=30)
    engine.add_request(running)
    engine.step()
    engine.add_request(held_up)
    engine.add_request(later)
    with caplog.at_level(logging.CRITICAL):
        outputs = engine.step()
    assert {(o.request_id, o.finish_reason, o.error) for o in outputs} == {
        ("a", FinishReason.ERROR, STEP_FAILED),
        ("b", FinishReason.ERROR, STEP_FAILED),
    }
    assert "secret" not in STEP_FAILED
    engine.check_integrity()
    engine.add_request(replace_name(held_up, "again"))
    results = run_to_end(engine)
    assert_complete(results, later, replace_name(held_up, "again"))
    assert results.ends[("again", 0)].num_cached_tokens == 0, "what the failed step computed is not to be found"
    assert_all_free(engine)


def replace_name(sent: AddRequest, name: str) -> AddRequest:
    return AddRequest(name, sent.prompt_token_ids, sent.sampling, sent.eos_token_ids, sent.priority)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("error", [OutOfMemoryError(), MemoryError()])
def test_out_of_memory_puts_the_later_half_off(moment: Moment, error: Exception) -> None:
    engine = make_engine(FakeRunner(make_info(), {2: (moment, error)}))
    messages = [message(str(i), 6 + i, first_token=10 * i, max_tokens=20, ignore_eos=True) for i in range(4)]
    for sent in messages:
        engine.add_request(sent)
    first = Results()
    for num_news in (4, 4, 2, 4):
        outputs = engine.step()
        first.take(outputs)
        assert len(outputs) == num_news
    assert engine.stats.num_preemptions == 2
    rest = run_to_end(engine)
    for key, tokens in rest.token_ids.items():
        first.token_ids[key] += tokens
    first.ends.update(rest.ends)
    assert_complete(first, *messages)


def test_out_of_memory_twice_costs_those_that_were_tried_twice() -> None:
    engine = make_engine(FakeRunner(make_info(), {0: ("launch", MemoryError()), 1: ("collect", MemoryError())}))
    messages = [message(str(i), 4, first_token=10 * i) for i in range(3)]
    for sent in messages:
        engine.add_request(sent)
    outputs = engine.step()
    assert [(o.request_id, o.finish_reason) for o in outputs] == [(n, FinishReason.ERROR) for n in "01"]
    assert_complete(run_to_end(engine), messages[2])
    assert_all_free(engine)


def test_out_of_memory_for_one_alone_is_its_end() -> None:
    runner = FakeRunner(make_info(), {0: ("launch", MemoryError())})
    engine = make_engine(runner)
    engine.add_request(message())
    [output] = engine.step()
    assert output.finish_reason is FinishReason.ERROR
    assert runner.num_attempts == 1
    assert_all_free(engine)


@pytest.mark.parametrize(
    "faults",
    [
        {0: ("launch", FatalRunnerError("device"))},
        {0: ("collect", FatalRunnerError("device"))},
        {0: ("launch", MemoryError()), 1: ("launch", FatalRunnerError("device"))},
    ],
)
def test_a_device_that_cannot_be_trusted_ends_it(faults: Faults) -> None:
    engine = make_engine(FakeRunner(make_info(), faults))
    for name in ("a", "b"):
        engine.add_request(message(name, first_token=ord(name)))
    with pytest.raises(FatalRunnerError, match="device"):
        engine.step()


class ForgetfulRunner(FakeRunner):
    """Loses a sequence's token."""

    def collect(self) -> StepOutput:
        output = super().collect()
        return StepOutput(output.token_ids[:-1], output.logprobs[:-1])


def test_an_output_of_the_wrong_length_is_a_failed_step() -> None:
    engine = make_engine(ForgetfulRunner(make_info()))
    engine.add_request(message())
    [output] = engine.step()
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, STEP_FAILED)
    assert_all_free(engine)


def test_decoding_reads_adjacent_blocks_when_alone() -> None:
    """What a CPU backend reads without a copy."""
    runner = FakeRunner(make_info())
    engine = make_engine(runner)
    engine.add_request(message(num_tokens=10, max_tokens=40, ignore_eos=True))
    tables: list[list[int]] = []
    while engine.has_work:
        engine.step()
        tables.append(list(_only_table(runner.steps[-1])))
    assert max(map(len, tables)) == 13
    assert all(table == list(range(table[0], table[0] + len(table))) for table in tables)


def _only_table(step: StepInput) -> list[int]:
    [chunk] = step.chunks
    return chunk.block_table


def test_the_context_of_the_configuration_counts_too() -> None:
    runner = FakeRunner(replace(make_info(), max_model_len=64))
    engine = make_engine(runner)
    assert engine.add_request(message("a", 63)) == []
    assert len(engine.add_request(message("b", 64))) == 1


def test_the_engine_runs_without_torch() -> None:
    """Nor does a lazy import bring it in: a fresh process plays a whole request with a failed step in it."""
    program = """
import sys
from tests.engine import test_async_engine, test_core, test_properties, test_scheduler
from tests.engine.fake_runner import FakeRunner, OutOfMemoryError, make_info
engine = test_core.make_engine(FakeRunner(make_info(), {1: ("launch", OutOfMemoryError())}))
sent = test_core.message(n=3)
engine.add_request(sent)
test_core.assert_complete(test_core.run_to_end(engine), sent)
assert engine.stats.num_preemptions == 1
sys.exit(", ".join(name for name in ("torch", "transformers") if name in sys.modules) or None)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_a_paused_request_holds_nothing_and_goes_on_where_it_was() -> None:
    slow, other = message("slow", 20, n=2, ignore_eos=True), message("other", 9, first_token=30)
    engine, results = make_engine(FakeRunner(make_info())), Results()
    engine.add_request(slow)
    for _ in range(4):
        results.take(engine.step())
    engine.pause(Pause("slow"))
    engine.pause(Pause("slow"))
    engine.pause(Pause("nobody"))
    engine.check_integrity()
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.num_paused, stats.num_free_blocks) == (0, 0, 2, 64)
    assert stats.num_preemptions == 0
    assert not engine.has_work, "the loop must sleep"
    engine.add_request(other)
    assert_complete(run_to_end(engine), other)
    engine.resume(Resume("slow"))
    engine.resume(Resume("nobody"))
    for _ in range(20):
        results.take(engine.step())
    assert_complete(results, slow)
    assert_all_free(engine)


def test_a_paused_request_that_waits_is_passed_by() -> None:
    engine = make_engine(FakeRunner(make_info(max_num_seqs=1)))
    first, paused, last = (message(name, first_token=i) for i, name in enumerate("abc"))
    for sent in (first, paused, last):
        engine.add_request(sent)
    engine.pause(Pause("b"))
    results = run_to_end(engine)
    assert set(results.ends) == {("a", 0), ("c", 0)}
    engine.resume(Resume("b"))
    assert_complete(run_to_end(engine), paused)


def test_a_paused_request_can_be_cancelled() -> None:
    engine = make_engine(FakeRunner(make_info()))
    engine.add_request(message("a", n=2))
    engine.step()
    engine.pause(Pause("a"))
    (ended,) = engine.cancel(Cancel("a", 1))
    assert ended.finish_reason is FinishReason.ABORT
    assert engine.stats.num_paused == 1
    engine.cancel(Cancel("a"))
    assert engine.stats.num_paused == 0
    assert_all_free(engine)
