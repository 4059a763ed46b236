"""What the engine knows of images: whose blocks may be shared, and where a step may end. No tensor is needed for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lmserve.engine.core import EngineCore
from lmserve.engine.kv_cache_manager import KVCacheManager
from lmserve.engine.messages import HEADER, AddRequest, decode_to_worker, encode
from lmserve.engine.request import Request
from lmserve.engine.scheduler import Scheduler, SchedulerConfig
from lmserve.outputs import FinishReason
from lmserve.runtime.interface import PromptImage, StepInput, StepOutput
from lmserve.sampling_params import SamplingParams
from tests.engine.factories import make_config, make_request
from tests.engine.fake_runner import FakeRunner, make_info


def image(start: int, end: int, content: str = "a") -> PromptImage:
    return PromptImage(start, end, content, f"/features/{content}")


def with_images(num_tokens: int, *images: PromptImage, name: str = "r", arrival: int = 0) -> Request:
    request = make_request(num_tokens, name=name, arrival=arrival)
    request.images = images
    return request


def hashes(num_tokens: int, *images: PromptImage) -> list[bytes]:
    """Of the request's full blocks of four tokens."""
    request = with_images(num_tokens, *images)
    KVCacheManager(16, 4).hash_full_blocks(request)
    return request.block_hashes


def test_blocks_are_shared_up_to_the_first_other_image() -> None:
    plain, one, other = hashes(24), hashes(24, image(6, 14)), hashes(24, image(6, 14, "b"))
    assert one == hashes(24, image(6, 14)), "the same image"
    assert one[0] == other[0] == plain[0], "what stands before"
    for i in range(1, 6):
        assert len({plain[i], one[i], other[i]}) == 3, "the image, and all that comes after it"


def test_an_image_counts_in_each_block_that_it_touches_and_in_no_other() -> None:
    first = hashes(16, image(3, 4))
    assert first[0] != hashes(16)[0]
    last = hashes(16, image(12, 13))
    assert last[:3] == hashes(16)[:3]
    assert last[3] != hashes(16)[3]
    two = hashes(16, image(0, 4), image(4, 8, "b"))
    assert two[0] == hashes(16, image(0, 4))[0]
    assert two[1] != hashes(16, image(0, 4), image(4, 8, "c"))[1]
    assert hashes(16, image(0, 4, "b"), image(4, 8)) != two


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 3, 3),  # before it
        (0, 4, 4),  # up to it
        (0, 5, 4),  # left out
        (0, 9, 4),
        (0, 10, 10),  # all of it
        (0, 11, 10),  # the next, which begins where it ends, is left out
        (0, 15, 15),
        (4, 5, 10),  # nothing before it: taken whole
        (6, 7, 10),  # its beginning was found in the cache
        (10, 11, 15),
        (15, 17, 17),
    ],
)
def test_where_a_chunk_ends_that_takes_images_whole(start: int, end: int, expected: int) -> None:
    assert with_images(20, image(4, 10), image(10, 15, "b")).end_of_whole_images(start, end) == expected


def chunks(*, whole: bool, budget: int = 8) -> list[tuple[int, int]]:
    """Start and tokens of each prompt chunk of a request with an image in [6, 18), among 24 tokens."""
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=budget, max_model_len=64, whole_images=whole),
        KVCacheManager(32, 4),
    )
    request = with_images(24, image(6, 18))
    scheduler.add(request)
    found = []
    while request.num_computed_tokens < 24:
        scheduled = scheduler.schedule()
        [chunk] = scheduled.step.chunks
        found.append((chunk.start, chunk.num_tokens))
        count = sum(chunk.samples for chunk in scheduled.step.chunks)
        scheduler.update(scheduled, StepOutput([30] * count, [None] * count))
        scheduler.check_integrity()
    return found


def test_steps_end_inside_images_only_where_they_may() -> None:
    assert chunks(whole=False) == [(0, 8), (8, 8), (16, 8)]
    assert chunks(whole=True) == [(0, 6), (6, 12), (18, 6)]
    assert chunks(whole=True, budget=64) == [(0, 24)]


def test_an_image_beyond_the_budget_leaves_nothing_for_others() -> None:
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=8, max_model_len=64, whole_images=True),
        KVCacheManager(32, 4),
    )
    scheduler.add(with_images(20, image(0, 16), name="a", arrival=0))
    scheduler.add(make_request(4, name="b", arrival=1, first_token=30))
    assert [(c.start, c.num_tokens) for c in scheduler.schedule().step.chunks] == [(0, 16)]


def test_images_travel_to_the_worker() -> None:
    message = AddRequest("a", [1, 2, 3], SamplingParams(max_tokens=1), [2], images=[image(0, 2), image(2, 3, "b")])
    assert decode_to_worker(encode(message)[HEADER.size :]) == message


class Seeing(FakeRunner):
    """Says that it has encoded an image for each sequence that comes with some."""

    def launch(self, step: StepInput) -> None:
        self.num_images = sum(len(sequence.images) for sequence in step.new_sequences)
        super().launch(step)

    def collect(self) -> StepOutput:
        return replace(super().collect(), num_encoded_images=self.num_images)


def test_images_reach_the_runner_and_are_counted() -> None:
    runner = Seeing(make_info(block_size=4))
    runner.info = replace(runner.info, images="causal")
    engine = EngineCore(runner, make_config(runner.info))
    images = [image(1, 3), image(4, 6, "b")]
    assert engine.add_request(AddRequest("a", list(range(8)), SamplingParams(max_tokens=2), images=images)) == []
    while engine.has_work:
        engine.step()
    assert engine.stats.num_encoded_images == 2


def test_a_model_that_reads_none_is_not_given_any() -> None:
    """The API process has refused them: this is the last line."""
    runner = FakeRunner(make_info(block_size=4))
    engine = EngineCore(runner, make_config(runner.info))
    [output] = engine.add_request(AddRequest("a", [1, 2, 3], SamplingParams(max_tokens=2), images=[image(0, 1)]))
    assert output.finish_reason is FinishReason.ERROR
    assert output.error == "The model reads no images."
    assert not engine.has_work
