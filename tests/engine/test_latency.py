"""How long prompts and decodes wait for each other: in steps, and in seconds of a clock that the steps move on."""

from __future__ import annotations

import statistics
from functools import cache
from itertools import accumulate

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.scheduling import (
    BUDGET,
    DEAR_CHUNKS,
    FAST_PROMPTS,
    LOADS,
    SLOW_PROMPTS,
    Client,
    Costs,
    Simulation,
    one_of_each,
    streams,
)
from lmserve.cli.bench.results import percentile
from lmserve.engine.core import EngineCore
from lmserve.engine.kv_cache_manager import KVCacheManager
from lmserve.engine.messages import AddRequest
from lmserve.engine.request import Request, RequestStatus
from lmserve.engine.scheduler import MAX_HOLD_UPS, Scheduler, SchedulerConfig
from lmserve.outputs import FinishReason
from lmserve.runtime.interface import PromptImage, StepOutput
from lmserve.sampling_params import SamplingParams
from tests.engine.factories import make_config, make_request
from tests.engine.fake_runner import EOS, FakeRunner, make_info
from tests.engine.test_scheduler import step

SHARE = BUDGET // 4
LONGEST_SHORT = BUDGET - SHARE
COSTS = pytest.mark.parametrize("costs", [SLOW_PROMPTS, FAST_PROMPTS], ids=lambda costs: costs.name)


def make_scheduler(*, max_num_seqs: int = 32, num_blocks: int = 2_000, whole_images: bool = False) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=BUDGET, max_model_len=8_192, whole_images=whole_images
    )
    return Scheduler(config, KVCacheManager(num_blocks, 16))


def prompt(num_tokens: int, name: str, arrival: int, *, priority: int = 0, max_tokens: int = 1) -> Request:
    """A request whose blocks are nobody else's."""
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    request = make_request(num_tokens, name=name, arrival=arrival, priority=priority, sampling=sampling)
    request.cache_root = name.encode()
    return request


def being_read(scheduler: Scheduler, num_steps: int = 1, num_tokens: int = 6_000) -> Request:
    long = prompt(num_tokens, "long", 0)
    scheduler.add(long)
    for _ in range(num_steps):
        step(scheduler)
    return long


@pytest.mark.parametrize("num_tokens", [1, 16, LONGEST_SHORT])
@pytest.mark.parametrize("num_steps", range(13))
def test_a_short_prompt_beside_a_long_one_is_read_within_two_steps(num_steps: int, num_tokens: int) -> None:
    scheduler = make_scheduler()
    being_read(scheduler, num_steps)
    short = prompt(num_tokens, "short", 1)
    scheduler.add(short)
    step(scheduler)
    if short.status is not RequestStatus.FINISHED:
        step(scheduler)
    assert short.status is RequestStatus.FINISHED


def test_behind_two_long_ones_it_is_no_different() -> None:
    scheduler = make_scheduler()
    being_read(scheduler)
    scheduler.add(prompt(6_000, "long too", 1))
    scheduler.add(prompt(100, "short", 2))
    assert step(scheduler) == {"long": 412, "short": 100}


def test_a_long_prompt_takes_what_others_leave_and_no_less_than_its_share() -> None:
    scheduler = make_scheduler()
    being_read(scheduler)
    for i in range(3):
        scheduler.add(prompt(300, str(i), i + 1))
    assert step(scheduler) == {"long": SHARE, "0": 300, "1": 84}
    assert step(scheduler) == {"long": SHARE, "1": 216, "2": 168}
    assert step(scheduler) == {"long": 380, "2": 132}


def test_who_came_before_a_long_prompt_is_not_held_up_by_its_share() -> None:
    scheduler = make_scheduler()
    for request in (prompt(300, "a", 0), prompt(300, "b", 1), prompt(6_000, "long", 2), prompt(100, "c", 3)):
        scheduler.add(request)
    assert step(scheduler) == {"a": 300, "b": 212}
    assert step(scheduler) == {"b": 88, "long": 324, "c": 100}


def test_at_its_end_a_long_prompt_is_a_short_one_and_the_oldest() -> None:
    scheduler = make_scheduler()
    being_read(scheduler, num_tokens=BUDGET + LONGEST_SHORT)
    scheduler.add(prompt(200, "short", 1))
    assert step(scheduler) == {"long": LONGEST_SHORT, "short": SHARE}


def test_a_long_prompt_is_short_if_most_of_it_is_cached() -> None:
    scheduler = make_scheduler()
    first = being_read(scheduler, num_steps=12)
    assert first.status is RequestStatus.FINISHED
    scheduler.add(prompt(6_000, "another", 1))
    again = prompt(6_000, "again", 2)
    again.cache_root = first.cache_root
    scheduler.add(again)
    assert step(scheduler) == {"another": 496, "again": 16}


def test_priority_goes_before_length() -> None:
    scheduler = make_scheduler()
    being_read(scheduler)
    scheduler.add(prompt(100, "short", 1))
    scheduler.add(prompt(600, "urgent", 2, priority=-1))
    assert step(scheduler) == {"urgent": BUDGET}
    assert step(scheduler) == {"urgent": 88, "long": 324, "short": 100}


def test_a_long_prompt_whose_turn_has_come_does_not_lose_its_slot_to_short_ones() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running = prompt(16, "running", 0, max_tokens=5)
    scheduler.add(running)
    step(scheduler)
    for request in (prompt(6_000, "long", 1), prompt(16, "short", 2)):
        scheduler.add(request)
    step(scheduler)
    scheduler.finish(running, FinishReason.ABORT)
    assert step(scheduler) == {"long": BUDGET}


def test_a_long_prompt_whose_turn_has_come_and_that_lacks_blocks_holds_up_the_short_ones() -> None:
    scheduler = make_scheduler(num_blocks=400)
    being_read(scheduler, num_steps=11)
    for request in (prompt(6_000, "long too", 1), prompt(16, "short", 2), prompt(16, "short too", 3)):
        scheduler.add(request)
    assert step(scheduler) == {"long": 368}, "it has become a short one"
    assert step(scheduler) == {"long too": 480, "short": 16, "short too": 16}


def test_an_image_that_is_longer_than_the_share_is_read_whole() -> None:
    scheduler = make_scheduler(whole_images=True)
    long = prompt(2_000, "long", 0)
    long.images = (PromptImage(0, 300, "a", ""), PromptImage(300, 700, "b", ""))
    scheduler.add(long)
    scheduler.add(prompt(100, "short", 1))
    assert step(scheduler) == {"long": 300, "short": 100}
    scheduler.add(prompt(100, "short too", 2))
    assert step(scheduler) == {"long": 412, "short too": 100}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, LONGEST_SHORT)), min_size=1, max_size=60))
@example([(0, 1), (0, 384), (0, 384)])
def test_nobody_starves(arrivals: list[tuple[int, int]]) -> None:
    """A short prompt waits for the short ones before it alone, and the long one has its share of each step."""
    scheduler = make_scheduler(max_num_seqs=128)
    long = being_read(scheduler)
    shorts = [prompt(num_tokens, str(i), i + 1) for i, (_, num_tokens) in enumerate(arrivals)]
    sent = list(accumulate(wait for wait, _ in arrivals))
    finished: dict[Request, int] = {}
    for now in range(400):
        for request, at in zip(shorts, sent, strict=True):
            if at == now:
                scheduler.add(request)
        left = long.num_tokens - long.num_computed_tokens
        if scheduler.num_running + scheduler.num_waiting:
            served = step(scheduler)
            num_decodes = sum(
                num_tokens == 1 for num_tokens in served.values()
            )  # the last token of a prompt is like one
            assert long in finished or served["long"] >= min((BUDGET - num_decodes) // 4, left)
            assert sum(served.values()) == BUDGET or scheduler.num_running + scheduler.num_waiting == 0
        finished |= {r: now + 1 for r in (long, *shorts) if r not in finished and r.status is RequestStatus.FINISHED}
    assert len(finished) == len(shorts) + 1
    for i, request in enumerate(shorts):
        older = [r.num_prompt_tokens for r, at in zip(shorts[:i], sent, strict=False) if finished[r] > sent[i]]
        num_before = sum(older) + LONGEST_SHORT  # the end of the long one is short, and older, too
        assert finished[request] - sent[i] <= -(-(num_before + request.num_prompt_tokens) // LONGEST_SHORT) + 1


def beside_a_stream(num_blocks: int = 2_000) -> tuple[Scheduler, Request]:
    """A scheduler in which one decodes, and that knows how few tokens a short mixed step has."""
    config = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=BUDGET, max_model_len=8_192, mixed_step_factor=1.4)
    scheduler = Scheduler(config, KVCacheManager(num_blocks, 16))
    for num_rows, num_prompt_tokens in [(1, 0)] * 4 + [(1, 64)]:
        scheduler.pace.costs.observe(num_rows, num_prompt_tokens, 0.010 + 0.000_1 * num_prompt_tokens)
    stream = prompt(16, "stream", 0, max_tokens=5_000)
    scheduler.add(stream)
    step(scheduler)
    return scheduler, stream


def test_a_prompt_that_is_soon_read_holds_a_stream_up_but_not_for_ever() -> None:
    scheduler, stream = beside_a_stream()
    for name in ("a", "b"):
        scheduler.add(prompt(900, name, 1))
        assert [step(scheduler), step(scheduler)] == [{"stream": 1, name: 511}, {"stream": 1, name: 389}]
    assert stream.num_hold_ups == MAX_HOLD_UPS
    scheduler.add(prompt(900, "c", 2))
    assert step(scheduler) == {"stream": 1, "c": 32}, "it has been held up often enough"


def test_who_came_later_has_not_been_held_up_yet_but_one_who_has_is_enough() -> None:
    scheduler, stream = beside_a_stream()
    scheduler.add(prompt(16, "later", 1, max_tokens=5_000))
    assert step(scheduler) == {"stream": 1, "later": 16}
    assert stream.num_hold_ups == 0, "a short step was enough"
    stream.num_hold_ups = MAX_HOLD_UPS
    scheduler.add(prompt(500, "short", 2))
    assert step(scheduler) == {"stream": 1, "later": 1, "short": 32}
    scheduler.finish(stream, FinishReason.ABORT)
    assert step(scheduler) == {"later": 1, "short": 468}


def test_a_prompt_that_cannot_start_holds_nobody_up() -> None:
    scheduler, stream = beside_a_stream(num_blocks=50)
    scheduler.add(prompt(900, "too large for now", 1))
    assert [step(scheduler) for _ in range(6)] == [{"stream": 1}] * 6
    assert stream.num_hold_ups == 0


def test_a_long_prompt_holds_nobody_up_not_even_by_its_end() -> None:
    scheduler, stream = beside_a_stream()
    long = prompt(2 * BUDGET + 1, "long", 1)
    scheduler.add(long)
    while long.status is not RequestStatus.FINISHED:
        assert step(scheduler)["long"] <= 32
    assert stream.num_hold_ups == 0


def test_of_a_prompt_only_what_is_not_cached_counts() -> None:
    scheduler, stream = beside_a_stream()
    first = prompt(3 * BUDGET, "first", 1)
    scheduler.add(first)
    while first.status is not RequestStatus.FINISHED:
        step(scheduler)
    again = prompt(3 * BUDGET + 300, "again", 2)
    again.cache_root = first.cache_root
    scheduler.add(again)
    assert step(scheduler)["again"] == 300
    assert stream.num_hold_ups == 1


@cache
def simulate(name: str, costs: Costs, *, before: bool = False) -> Simulation:
    return Simulation(costs, LOADS[name], before=before).run(60)


MIXED = "8 chats, long documents, short questions"


@COSTS
def test_inter_token_latency_is_even_while_prompts_are_read(costs: Costs) -> None:
    run = simulate(MIXED, costs)
    gaps = [gap for one in run.of("stream") for gap in one.gaps]
    assert percentile(gaps, 0.95) <= 1.5 * statistics.median(gaps)
    assert percentile(gaps, 0.99) <= 1.5 * statistics.median(gaps)
    assert len(run.of("long")) > 1


@COSTS
def test_a_short_question_beside_chats_and_a_long_document_waits_less_than_two_full_steps(costs: Costs) -> None:
    two_steps = 2 * (costs.step + BUDGET * costs.prompt_token)
    for start in (2.0, 2.1, 2.2, 2.3):
        clients = [*streams(8, 128, 3_000), Client("long", 6_000, 64, 1.0), Client("short", 128, 8, start, 100.0)]
        [short] = Simulation(costs, clients).run(8).of("short")
        assert short.first_token_seconds <= two_steps
    waits = [one.first_token_seconds for one in simulate(MIXED, costs).of("short")]
    assert percentile(waits, 0.9) <= two_steps, "also where several come at a time"


@pytest.mark.parametrize("costs", [SLOW_PROMPTS, FAST_PROMPTS, DEAR_CHUNKS], ids=lambda costs: costs.name)
def test_a_long_document_is_read_in_due_time(costs: Costs) -> None:
    """The most of the machine is the chats'."""
    alone = 6_000 * costs.prompt_token
    assert max(one.first_token_seconds for one in simulate(MIXED, costs).of("long")) < 6 * alone


@COSTS
@pytest.mark.parametrize("name", ["32 x (128 -> 128)", "32 x (128 -> 128), each at its own time", "4 x (1024 -> 16)"])
def test_evenness_costs_little_throughput(name: str, costs: Costs) -> None:
    before, now = simulate(name, costs, before=True), simulate(name, costs)
    assert now.tokens_per_second >= 0.94 * before.tokens_per_second


def test_alone_a_prompt_has_the_whole_budget() -> None:
    runs = [Simulation(SLOW_PROMPTS, one_of_each(start=99), before=before).run(60) for before in (True, False)]
    assert runs[0].steps == runs[1].steps


def test_the_engine_measures_its_steps() -> None:
    """But not those that do more than decode and read."""
    times = iter([0.0, 0.5, 1.0, 1.25, 2.0, 2.25, 3.0, 3.25, 4.0, 4.25, 9.0, 99.0])
    runner = FakeRunner(make_info())
    engine = EngineCore(runner, make_config(runner.info), clock=lambda: next(times))
    engine.add_request(AddRequest("a", [1, 2, 3], SamplingParams(max_tokens=6, ignore_eos=True), [EOS]))
    for _ in range(5):
        engine.step()
    costs = engine.scheduler.pace.costs
    assert (costs.num_decode_steps, costs.decode_seconds(1)) == (4, 0.25)
    assert costs.prompt_token_seconds == pytest.approx(0.5 / 3)
    engine.add_request(AddRequest("b", [4, 5, 6], SamplingParams(max_tokens=1, prompt_logprobs=0), [EOS]))
    engine.step()
    assert costs.prompt_token_seconds == pytest.approx(0.5 / 3)


def test_what_a_prompt_token_takes_is_learnt_apart_from_its_context() -> None:
    """A token behind 1,000 others takes twice as long here, and the scheduler is told so."""
    config = SchedulerConfig(
        max_num_seqs=2, max_num_batched_tokens=512, max_model_len=8192, mixed_step_factor=2.0, context_cost=0.001
    )
    scheduler = Scheduler(config, KVCacheManager(600, 16))
    sampling = SamplingParams(max_tokens=2000, ignore_eos=True)
    scheduler.add(make_request(1, name="decodes", sampling=sampling))
    lengths = []
    for i in range(300):
        if i == 10:
            scheduler.add(make_request(6000, name="reads", arrival=1, sampling=sampling))
        scheduled = scheduler.schedule()
        chunks = [chunk for chunk in scheduled.step.chunks if not chunk.is_decode]
        work = sum(chunk.num_tokens * (1 + 0.001 * (chunk.start + chunk.num_tokens / 2)) for chunk in chunks)
        seconds = 0.020 + 0.000_2 * work
        scheduler.pace.observe(scheduled.step, seconds)
        num_samples = sum(chunk.samples for chunk in scheduled.step.chunks)
        scheduler.update(scheduled, StepOutput([30] * num_samples, [None] * num_samples))
        if chunks:
            lengths.append(seconds)
    assert len(lengths) > 50
    assert max(lengths[5:]) <= 1.05 * 2 * 0.020, "however long the context is"
    assert statistics.median(lengths) >= 0.75 * 2 * 0.020
