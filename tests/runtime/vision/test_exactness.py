"""Greedy answers to chats with pictures equal ``model.generate`` in float32, however the engine cut and mixed."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest

from lmserve.engine.messages import AddRequest
from lmserve.outputs import FinishReason
from lmserve.runtime.interface import StepInput
from tests.images.tiny_vlms import FAMILIES, assistant, pictures, user
from tests.runtime.vision.chats import ALL_SEE, BLOCK_SIZE, Case, greedy, run
from tests.runtime.vision.conftest import Families


@pytest.mark.parametrize("name", FAMILIES)
def test_alone(name: str, families: Families) -> None:
    family, cases = families(name)
    engine = family.engine()
    for case in cases.values():
        assert run(engine, [case]) == [case.answer]


@pytest.mark.parametrize("name", FAMILIES)
def test_together_whole_and_in_chunks(name: str, families: Families) -> None:
    """Chunks end inside pictures whose tokens see only what stands before, never in those that see each other."""
    family, cases = families(name)
    mixed = [*cases.values(), *cases.values()]
    for max_batched_tokens in (512, 13):
        engine = family.engine(max_batched_tokens=max_batched_tokens, prefix_caching=False)
        cuts = _watch_cuts(engine._runner, cases)
        assert run(engine, mixed) == [case.answer for case in mixed]
        if max_batched_tokens == 13:
            assert bool(cuts) == (engine._runner.info.images == "causal")


def _watch_cuts(runner: Any, cases: dict[str, Case]) -> list[int]:
    """Fills with the chunks' ends that lie inside a picture of the chat with three (the longest prompts of all)."""
    launch, cuts = runner.launch, list[int]()
    prompts = {tuple(case.token_ids): case.images for case in cases.values()}
    by_slot: dict[int, Any] = {}

    def watched(step: StepInput) -> None:
        for sequence in step.new_sequences:
            by_slot[sequence.slot] = prompts.get(sequence.token_ids[: sequence.num_prompt_tokens], [])
        for chunk in step.chunks:
            end = chunk.start + chunk.num_tokens
            cuts.extend(end for image in by_slot[chunk.slot] if image.start < end < image.end)
        launch(step)

    runner.launch = watched
    return cuts


@pytest.mark.parametrize("name", FAMILIES)
def test_the_next_turn_encodes_only_the_new_picture(name: str, families: Families) -> None:
    family, _ = families(name)
    some = pictures()
    first = [user(some["disc"].convert("RGB"), "one")]
    second = [*first, assistant("Yes."), user("two", some["red"].convert("RGB"))]
    cases = [family.case(first), family.case(second)]
    engine = family.engine()
    before = engine.stats
    assert run(engine, cases[:1]) == [cases[0].answer]
    assert engine.stats.num_encoded_images == before.num_encoded_images + 1
    runner: Any = engine._runner
    runner._images.encoder._encoded.clear()  # what is encoded already is not even asked for
    assert run(engine, cases[1:]) == [cases[1].answer]
    assert engine.stats.num_encoded_images == before.num_encoded_images + 2
    assert engine.stats.num_cached_tokens >= cases[0].images[0].end // 4 * 4


@pytest.mark.parametrize("name", ["qwen2.5-vl", "gemma3", "smolvlm"])
def test_the_same_tokens_with_another_picture_share_nothing_from_it_on(name: str, families: Families) -> None:
    family, _ = families(name)
    some = pictures()
    red = some["red"].convert("RGB")
    blue = red.point(lambda value: 255 - value)
    one, other = (family.case([user("Look: ", picture, " What is it?")]) for picture in (red, blue))
    assert one.token_ids == other.token_ids
    assert one.answer != other.answer
    engine = family.engine()
    for case in (one, other, one):
        assert run(engine, [case]) == [case.answer]
    assert engine.stats.num_encoded_images == 2


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("name", ["qwen3-vl", "gemma3"])
def test_two_requests_at_once_share_an_image(name: str, prefix_caching: bool, families: Families) -> None:
    """Encoded once, though one stands elsewhere in its prompt, or nothing is shared but the image."""
    family, cases = families(name)
    disc = pictures()["disc"].convert("RGB")
    elsewhere = family.case([user("Something else comes before it.", disc)])
    alone = family.case([user(disc, "one")])
    assert alone.images[0].content == elsewhere.images[0].content
    assert alone.images[0].start != elsewhere.images[0].start
    mixed = [alone, elsewhere, alone, cases["text"]]
    engine = family.engine(max_batched_tokens=24, prefix_caching=prefix_caching)
    before = engine.stats.num_encoded_images
    assert run(engine, mixed) == [case.answer for case in mixed]
    assert engine.stats.num_encoded_images == before + 1


@pytest.mark.parametrize("name", FAMILIES)
def test_computed_again_after_losing_their_blocks(name: str, families: Families) -> None:
    """What a preemption does: prompt and answer so far are computed anew, pictures too, and no cached block helps."""
    family, cases = families(name)
    mixed = list(cases.values())
    lengths = [len(case.token_ids) for case in mixed]
    engine = family.engine(kv_tokens=(max(lengths) + 20) // 4 * 4, prefix_caching=False)  # room for one at a time
    assert run(engine, mixed, pauses=True) == [case.answer for case in mixed]
    assert engine.stats.num_prompt_tokens > sum(lengths) + max(lengths)


@pytest.mark.parametrize("name", ["qwen2-vl", "gemma3", "mistral3"])
def test_after_preemption(name: str, families: Families) -> None:
    """Two start in a cache that has room for the prompts and not for the answers."""
    family, cases = families(name)
    mixed = [cases["one"], cases["one"], cases["text"]]
    blocks = [-(-(len(case.token_ids) + 1) // BLOCK_SIZE) for case in mixed]
    engine = family.engine(kv_tokens=(sum(blocks[:2]) + 2) * BLOCK_SIZE, max_batched_tokens=400, prefix_caching=False)
    assert run(engine, mixed) == [case.answer for case in mixed]
    assert engine.stats.num_preemptions > 0


@pytest.mark.parametrize("name", ["qwen3-vl", "gemma3"])
def test_an_image_that_cannot_be_read_costs_its_own_request_only(
    name: str, families: Families, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancelled request's files are removed before the worker hears of it: it may be reading them just then."""
    family, cases = families(name)
    others = [cases["text"], cases["three"], cases["turns"]]
    lost = replace(cases["one"], images=[replace(cases["one"].images[0], content="another", file="/removed")])
    engine = family.engine(max_batched_tokens=400)
    for i, case in enumerate([others[0], lost, *others[1:]]):
        engine.add_request(AddRequest(str(i), case.token_ids, greedy(), eos_token_ids=[2], images=case.images))
    found: defaultdict[str, list[int]] = defaultdict(list)
    ends = {}
    with caplog.at_level(logging.CRITICAL):
        while engine.has_work:
            for output in engine.step():
                found[output.request_id] += output.token_ids
                ends[output.request_id] = output.finish_reason
    assert {request for request, reason in ends.items() if reason is FinishReason.ERROR} == {"1"}
    assert [tuple(found[request]) for request in ("0", "2", "3")] == [case.answer for case in others]
    contents = {image.content for case in others for image in case.images}
    assert engine.stats.num_encoded_images == len(contents), "none twice, and those of the first attempt are counted"
    engine.check_integrity()


@pytest.mark.parametrize("name", ["qwen3-vl", "gemma3", "idefics3"])
def test_with_pauses_and_several_choices(name: str, families: Families) -> None:
    family, cases = families(name)
    engine = family.engine(max_batched_tokens=64)
    mixed = list(cases.values())
    assert run(engine, mixed, pauses=True, n=2) == [case.answer for case in mixed]


@pytest.mark.parametrize("backend", ["reference", "sdpa", "cpu"])
@pytest.mark.parametrize("name", ["qwen3-vl", "gemma3"])
def test_every_backend(name: str, backend: str, families: Families) -> None:
    family, cases = families(name)
    engine = family.engine(attention_backend=backend, max_batched_tokens=24)
    mixed = list(cases.values())
    assert run(engine, mixed) == [case.answer for case in mixed]


@pytest.mark.parametrize("name", FAMILIES)
def test_in_half_precision_images_are_still_seen_rightly(name: str, families: Families) -> None:
    family, cases = families(name)
    engine = family.engine(dtype="bfloat16")
    assert engine._runner.info.images == ("whole" if name in ALL_SEE else "causal")
    alone = [run(engine, [case])[0] for case in cases.values()]
    assert [len(answer) for answer in alone] == [len(case.answer) for case in cases.values()]
