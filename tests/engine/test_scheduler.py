from __future__ import annotations

import pytest

from lmserve.engine.block_pool import IntegrityError
from lmserve.engine.kv_cache_manager import KVCacheManager
from lmserve.engine.request import Request, RequestStatus
from lmserve.engine.scheduler import Scheduler, SchedulerConfig, max_request_tokens
from lmserve.engine.step_draft import SchedulerOutput
from lmserve.outputs import FinishReason, RequestOutput
from lmserve.runtime.interface import StepOutput
from lmserve.sampling_params import SamplingParams
from tests.engine.factories import make_request
from tests.engine.fake_runner import EOS, make_info

TOKEN = 30


def make_scheduler(
    *, num_blocks: int = 64, max_num_seqs: int = 8, max_num_batched_tokens: int = 32, max_model_len: int = 64
) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len
    )
    return Scheduler(config, KVCacheManager(num_blocks, 4))


def make_requests(*num_tokens: int, same_prompt: bool = False, max_tokens: int = 20) -> list[Request]:
    return [
        make_request(
            n,
            name=str(i),
            arrival=i,
            first_token=0 if same_prompt else 7 * i + 1,
            sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        )
        for i, n in enumerate(num_tokens)
    ]


def add_all(scheduler: Scheduler, requests: list[Request]) -> None:
    for request in requests:
        scheduler.add(request)


def finish_step(scheduler: Scheduler, scheduled: SchedulerOutput, token_id: int = TOKEN) -> list[RequestOutput]:
    """As if the runner had drawn ``token_id`` for everybody."""
    count = sum(chunk.samples for chunk in scheduled.step.chunks)
    outputs = scheduler.update(scheduled, StepOutput([token_id] * count, [None] * count))
    scheduler.check_integrity()
    return outputs


def step(scheduler: Scheduler, token_id: int = TOKEN) -> dict[str, int]:
    """Tokens that each request got in one step, in the order of the chunks."""
    scheduled = scheduler.schedule()
    finish_step(scheduler, scheduled, token_id)
    chunks = scheduled.step.chunks
    return {r.request_id: c.num_tokens for r, c in zip(scheduled.requests, chunks, strict=True)}


def test_limit_is_the_context_or_the_whole_cache() -> None:
    assert max_request_tokens(make_info(num_blocks=4, block_size=4, max_model_len=64)) == 16
    assert max_request_tokens(make_info(num_blocks=40, block_size=4, max_model_len=64)) == 64


def test_decodes_come_first_then_chunks_in_order_under_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add_all(scheduler, make_requests(6, 7, 12))
    assert step(scheduler) == {"0": 6, "1": 4}
    assert step(scheduler) == {"0": 1, "1": 3, "2": 6}
    assert step(scheduler) == {"0": 1, "1": 1, "2": 6}
    assert step(scheduler) == {"0": 1, "1": 1, "2": 1}


def test_a_prompt_of_one_token_counts_as_a_decode() -> None:
    scheduler = make_scheduler()
    add_all(scheduler, make_requests(6, 1))
    assert list(step(scheduler).items()) == [("1", 1), ("0", 6)]


def test_only_the_chunk_that_catches_up_samples() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    [request] = requests = make_requests(10)
    add_all(scheduler, requests)
    seen = []
    for _ in range(4):
        scheduled = scheduler.schedule()
        [chunk] = scheduled.step.chunks
        seen.append((chunk.start, chunk.num_tokens, chunk.samples))
        finish_step(scheduler, scheduled)
    assert seen == [(0, 4, False), (4, 4, False), (8, 2, True), (10, 1, True)]
    assert request.output_token_ids == [TOKEN, TOKEN]


def test_a_new_sequence_is_told_once_with_all_that_the_runner_needs() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    [request] = make_requests(6)
    scheduler.add(request)
    scheduled = scheduler.schedule()
    [new] = scheduled.step.new_sequences
    assert new.slot == scheduled.step.chunks[0].slot
    assert new.token_ids == tuple(request.prompt_token_ids)
    assert (new.num_prompt_tokens, new.sampling, new.choice) == (6, request.sampling, 0)
    assert new.eos_token_ids == (EOS,)
    finish_step(scheduler, scheduled)
    assert scheduler.schedule().step.new_sequences == []


def test_waiting_requests_start_by_priority_then_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    order = [(1, 0), (0, 1), (0, 2), (-1, 3)]
    for priority, arrival in order:
        sampling = SamplingParams(max_tokens=1)
        name = f"{priority} {arrival}"
        scheduler.add(make_request(4, name=name, priority=priority, arrival=arrival, sampling=sampling))
    assert [list(step(scheduler))[0] for _ in order] == ["-1 3", "0 1", "0 2", "1 0"]


def test_no_more_sequences_than_slots() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    add_all(scheduler, make_requests(2, 2, 2, max_tokens=2))
    assert list(step(scheduler)) == ["0", "1"]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    assert list(step(scheduler)) == ["0", "1"]
    assert list(step(scheduler)) == ["2"]


def test_one_that_lacks_blocks_holds_up_those_behind_it_and_not_those_before() -> None:
    scheduler = make_scheduler(num_blocks=8)
    running, big, small = make_requests(20, 20, 4)
    scheduler.add(running)
    step(scheduler)
    add_all(scheduler, [big, small])
    assert step(scheduler) == {"0": 1}
    scheduler.add(make_request(4, name="urgent", arrival=9, priority=-1, first_token=30))
    assert step(scheduler) == {"0": 1, "urgent": 4}
    assert big.status is small.status is RequestStatus.WAITING
    scheduler.finish(running, FinishReason.ABORT)
    assert step(scheduler) == {"urgent": 1, "1": 20}


def test_admission_leaves_a_block_for_each_that_runs() -> None:
    """Else the newcomer would be preempted as soon as the others grow."""
    scheduler = make_scheduler(num_blocks=4)
    add_all(scheduler, make_requests(4, 4, 4))
    assert list(step(scheduler)) == ["0", "1"]
    assert scheduler.num_waiting == 1


def test_growth_preempts_the_last_in_rank() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=8)
    first, second = make_requests(8, 8)
    add_all(scheduler, [second])
    step(scheduler)
    scheduler.add(first)
    step(scheduler)
    while first.status is RequestStatus.RUNNING and second.status is RequestStatus.RUNNING:
        step(scheduler)
    assert (first.status, second.status) == (RequestStatus.RUNNING, RequestStatus.WAITING)
    assert scheduler.num_preemptions == 1
    assert second.slot is None
    assert second.block_table == []
    assert second.num_computed_tokens == 0
    assert len(second.output_token_ids) > 0


def test_one_may_have_to_preempt_itself() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=16)
    first, second = make_requests(9, 4)
    add_all(scheduler, [first, second])
    for _ in range(5):
        assert list(step(scheduler)) == ["0", "1"]
    assert step(scheduler) == {"0": 1}, "the first has room in its fourth block, the second needs a third"
    assert second.status is RequestStatus.WAITING
    assert scheduler.num_preemptions == 1


def step_until_the_next_preempts() -> tuple[Scheduler, list[Request]]:
    """Two requests of 13 tokens, 12 of them computed, in a pool of six blocks of four."""
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=16)
    requests = make_requests(8, 8)
    add_all(scheduler, requests)
    for _ in range(5):
        assert list(step(scheduler)) == ["0", "1"]
    assert scheduler.kv.num_free_blocks == 0
    return scheduler, requests


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    scheduler, _ = step_until_the_next_preempts()
    scheduler.add(make_request(1, name="urgent", arrival=9, priority=-1, first_token=40))
    assert step(scheduler) == {"0": 1}
    assert scheduler.num_preemptions == 1
    assert scheduler.kv.num_free_blocks == 2
    assert list(step(scheduler)) == ["0", "urgent"]


def test_after_a_preemption_what_is_not_cached_is_computed_again() -> None:
    scheduler, [first, second] = step_until_the_next_preempts()
    step(scheduler)
    scheduler.finish(first, FinishReason.ABORT)
    scheduled = scheduler.schedule()
    [new] = scheduled.step.new_sequences
    assert new.token_ids == (*second.prompt_token_ids, *[TOKEN] * 5)
    assert new.num_prompt_tokens == 8
    [chunk] = scheduled.step.chunks
    assert (chunk.start, chunk.num_tokens, chunk.samples) == (8, 5, True), "its last block was taken by the first"
    [output] = finish_step(scheduler, scheduled)
    assert output.num_cached_tokens == 0, "the prompt was not found when it first came"


def test_a_prefix_in_the_making_is_waited_for_and_then_shared() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    requests = make_requests(18, 18, 18, same_prompt=True)
    add_all(scheduler, requests)
    assert step(scheduler) == {"0": 8}
    assert step(scheduler) == {"0": 8}
    scheduler.add(make_request(4, name="other", arrival=9, first_token=33))
    assert step(scheduler) == {"0": 2, "1": 2, "2": 2, "other": 2}
    assert requests[1].block_table[:4] == requests[2].block_table[:4] == requests[0].block_table[:4]
    assert scheduler.num_cached_tokens == 32


def test_others_pass_one_that_waits_for_a_prefix() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=30)
    add_all(scheduler, make_requests(18, 18, same_prompt=True))
    scheduler.add(make_request(4, name="other", arrival=9, first_token=33))
    assert step(scheduler) == {"0": 18, "other": 4}
    assert step(scheduler) == {"0": 1, "other": 1, "1": 2}


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_who_waits_for_a_prefix_computes_it_if_its_leader_ends(reason: FinishReason) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    leader, follower = requests = make_requests(18, 18, same_prompt=True)
    add_all(scheduler, requests)
    step(scheduler)
    scheduler.finish(leader, reason)
    assert step(scheduler) == {"1": 8}
    assert follower.num_cached_tokens == 8


def test_what_a_failed_step_computed_is_not_shared() -> None:
    scheduler = make_scheduler()
    leader, follower = requests = make_requests(18, 18, same_prompt=True)
    add_all(scheduler, requests)
    scheduler.schedule()
    scheduler.finish(leader, FinishReason.ERROR)
    assert step(scheduler) == {"1": 18}
    assert follower.num_cached_tokens == 0


def finished(sampling: SamplingParams, *token_ids: int, num_prompt_tokens: int = 4) -> tuple[list[int], str]:
    """What a request has got, and why it ended, if the runner draws these tokens."""
    scheduler = make_scheduler(max_model_len=16)
    request = make_request(num_prompt_tokens, sampling=sampling)
    scheduler.add(request)
    for token_id in token_ids:
        [output] = finish_step(scheduler, scheduler.schedule(), token_id)
        if output.finish_reason is not None:
            assert (scheduler.num_running, scheduler.kv.num_free_blocks) == (0, 64)
            return request.output_token_ids, output.finish_reason.value
    return request.output_token_ids, "unfinished"


def test_stop_checks() -> None:
    assert finished(SamplingParams(max_tokens=5), 1, EOS, 2) == ([1, EOS], "stop")
    assert finished(SamplingParams(max_tokens=5, ignore_eos=True), 1, EOS, 2) == ([1, EOS, 2], "unfinished")
    assert finished(SamplingParams(max_tokens=5, stop_token_ids=(2,)), 1, 2, 3) == ([1, 2], "stop")
    assert finished(SamplingParams(max_tokens=2), 1, 2, 3) == ([1, 2], "length")
    assert finished(SamplingParams(max_tokens=2), 1, EOS) == ([1, EOS], "stop"), "it said all it wanted to say"
    assert finished(SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=(3,)), EOS, 3, 3) == ([EOS, 3, 3], "stop")
    assert finished(SamplingParams(max_tokens=9), 1, 2, 3, num_prompt_tokens=14) == ([1, 2], "length"), (
        "the context ends"
    )


def test_a_token_that_could_not_be_drawn_is_an_error() -> None:
    scheduler = make_scheduler()
    add_all(scheduler, make_requests(4))
    [output] = finish_step(scheduler, scheduler.schedule(), -1)
    assert output.finish_reason is FinishReason.ERROR
    assert not output.may_retry, "it would be the same again"
    assert output.error
    assert output.token_ids == ()


def test_no_tokens_wanted_ends_with_the_prompt() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    scheduler.add(make_request(9, sampling=SamplingParams(max_tokens=0)))
    assert finish_step(scheduler, scheduler.schedule()) == []
    scheduled = scheduler.schedule()
    assert not any(chunk.samples for chunk in scheduled.step.chunks)
    assert finish_step(scheduler, scheduled) == [RequestOutput("r", 0, finish_reason=FinishReason.LENGTH)]
    assert scheduler.num_running == 0


def test_halving_keeps_the_first_in_rank_and_tells_them_anew() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=22)
    requests = make_requests(4, 4, 4, 10, 4)
    add_all(scheduler, requests)
    step(scheduler)
    scheduled = scheduler.schedule()
    assert [r.request_id for r in scheduled.requests] == ["0", "1", "2", "3", "4"]
    fewer = scheduler.halve(scheduled)
    assert [r.request_id for r in fewer.requests] == ["0", "1", "2"]
    assert fewer.step.chunks == scheduled.step.chunks[:3]
    assert [new.token_ids for new in fewer.step.new_sequences] == [(*r.prompt_token_ids, TOKEN) for r in requests[:3]]
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 2)
    assert len(finish_step(scheduler, fewer)) == 3


def test_integrity_check_sees_a_lost_slot() -> None:
    scheduler = make_scheduler()
    [request] = requests = make_requests(4)
    add_all(scheduler, requests)
    scheduler.schedule()
    scheduler.check_integrity()
    request.slot = None
    with pytest.raises(IntegrityError, match="slots"):
        scheduler.check_integrity()
