"""Greedy output equals ``model.generate`` in the lanes that read prompts in turn, however the engine cut the work."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from lmserve.config import ModelConfig
from lmserve.engine.core import EngineCore
from lmserve.engine.messages import AddRequest, Cancel
from lmserve.engine.scheduler import SchedulerConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.build import assemble_runner
from lmserve.runtime.kv_cache import block_bytes
from lmserve.runtime.serial_lane import SerialLane
from lmserve.runtime.state_lane import StateLane
from tests.runtime.test_exactness import BLOCK_SIZE, MAX_LEN, NUM_NEW, greedy, mixed_sampling, prompts, run
from tests.runtime.test_prompt_logprobs import ROUNDING, asking, score
from tests.runtime.tiny_in_turn import ALL, SERIAL, STATE, WHOLE, WRONG, build_in_turn

MAX_SEQS = 12
HAVE_BLOCKS = [family for family in ALL if family not in ("mamba", "mamba2", "rwkv")]
"""That keep something of each token."""


@cache
def generated(family: str, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """What a plain script gets."""
    ids = torch.tensor([prompt])
    generate: Any = build_in_turn(family).generate
    arguments: dict[str, Any] = {"do_sample": False, "max_new_tokens": NUM_NEW, "eos_token_id": None}
    output = generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    return tuple(output[0, len(prompt) :].tolist())


@torch.inference_mode()
def bytes_of_a_block(family: str) -> int:
    model = build_in_turn(family)
    if family in SERIAL:
        return SerialLane(model).measure()[0] * BLOCK_SIZE
    return block_bytes(StateLane(model).probe(), BLOCK_SIZE, torch.float32)


def make_engine(family: str, *, num_blocks: int = 800, max_batched_tokens: int = 512, **overrides: Any) -> EngineCore:
    """The family's tiny model behind the real runner and engine."""
    config = ModelConfig(
        model="tiny",
        kv_cache_memory=num_blocks * bytes_of_a_block(family) or 2**20,
        max_model_len=MAX_LEN,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=max_batched_tokens,
        **overrides,
    )
    runner = assemble_runner(build_in_turn(family), config, torch.float32)
    limits = SchedulerConfig(
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=max_batched_tokens,
        max_model_len=MAX_LEN,
        prefix_caching=config.prefix_caching,
        whole_prompts=runner.info.whole_prompts,
    )
    return EngineCore(runner, limits)


@pytest.mark.parametrize("family", ALL)
def test_each_gets_the_lane_that_suits_it(family: str) -> None:
    said: list[str] = []
    config = ModelConfig(model="tiny", kv_cache_memory=2**20, max_model_len=MAX_LEN, max_num_seqs=4, block_size=4)
    info = assemble_runner(build_in_turn(family), config, torch.float32, lambda stage, _: said.append(stage)).info
    assert info.lane == ("serial" if family in SERIAL else "state")
    assert info.whole_prompts == (family in WHOLE)
    saves = info.num_saved_states or 0
    assert (saves > 0) == (family in STATE)
    assert any(sentence.startswith(f"{info.lane} lane: packed: ") for sentence in said), "it says why"


@pytest.mark.parametrize("family", WRONG)
def test_what_is_wrong_in_every_lane_is_refused_with_the_figures(family: str) -> None:
    config = ModelConfig(model="tiny", kv_cache_memory=2**20, max_model_len=MAX_LEN, max_num_seqs=4, block_size=4)
    figures = (
        r"cannot be served exactly: packed: it has .*; state: .*; serial: logits differ .* by 0\.\d+ of their spread"
    )
    with pytest.raises(ModelLoadFailed, match=figures):
        assemble_runner(build_in_turn(family), config, torch.float32)


@pytest.mark.parametrize("family", ALL)
def test_among_others_whole_and_chunked(family: str) -> None:
    expected = [generated(family, prompt) for prompt in prompts()]
    for max_batched_tokens in (512, 11):
        engine = make_engine(family, max_batched_tokens=max_batched_tokens)
        assert run(engine, [(prompt, greedy()) for prompt in prompts()]) == expected


@pytest.mark.parametrize("family", ["qwen3.5", "mamba", "bloom"])
@pytest.mark.parametrize("max_batched_tokens", [512, 11])
def test_prompts_are_scored_by_their_own_rows(family: str, max_batched_tokens: int) -> None:
    """These rows follow those that are sampled, of all sequences: in another order than they are computed in."""
    engine = make_engine(family, max_batched_tokens=max_batched_tokens)
    scored = score(engine, [(prompt, asking(max_tokens=i % 3)) for i, prompt in enumerate(prompts())])
    model: Any = build_in_turn(family)
    for prompt, entries in zip(prompts(), scored, strict=True):
        with torch.inference_mode():
            rows = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)
        expected = [float(row[token]) for row, token in zip(rows[:-1], prompt[1:], strict=True)]
        assert [entry.logprob for entry in entries] == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("family", STATE)
def test_with_a_saved_prefix(family: str) -> None:
    """The next turn goes on from the state behind the prompt, and from one within the answer."""
    long, other = prompts()[:2]
    engine = make_engine(family)
    [answer] = run(engine, [(long, greedy())])
    before = engine.stats.num_cached_tokens
    requests = [(long, greedy()), (other, greedy()), ((*long, 9, 8), greedy()), ((*long, *answer, 7), greedy())]
    assert run(engine, requests) == [generated(family, prompt) for prompt, _ in requests]
    of_prompt, of_answer = (len(long) - 1) // BLOCK_SIZE * BLOCK_SIZE, (len(long) + 11) // BLOCK_SIZE * BLOCK_SIZE
    assert engine.stats.num_cached_tokens - before == 2 * of_prompt + of_answer


@pytest.mark.parametrize("family", HAVE_BLOCKS)
def test_after_preemption(family: str) -> None:
    engine = make_engine(family, num_blocks=26, max_batched_tokens=16)
    expected = [generated(family, prompt) for prompt in prompts()]
    assert run(engine, [(prompt, greedy()) for prompt in prompts()]) == expected
    assert engine.stats.num_preemptions > 0


@pytest.mark.parametrize("family", ["lfm2", "mamba", "bloom"])
def test_with_pauses(family: str) -> None:
    engine = make_engine(family, max_batched_tokens=64)
    expected = [generated(family, prompt) for prompt in prompts()]
    assert run(engine, [(prompt, greedy()) for prompt in prompts()], pauses=True) == expected


@pytest.mark.parametrize("family", ["qwen3.5", "jamba", "falcon"])
def test_cancels_disturb_nobody(family: str) -> None:
    engine = make_engine(family, max_batched_tokens=16)
    for i, prompt in enumerate(prompts()):
        engine.add_request(AddRequest(str(i), list(prompt), greedy()))
    results: dict[str, list[int]] = {str(i): [] for i in range(len(prompts()))}
    num_steps = 0
    while engine.has_work:
        num_steps += 1
        if num_steps % 3 == 0:
            engine.cancel(Cancel(str(2 * (num_steps // 3) - 2)))
        for output in engine.step():
            results[output.request_id] += output.token_ids
        engine.check_integrity()
    for i, prompt in enumerate(prompts()):
        got = tuple(results[str(i)])
        assert got == generated(family, prompt)[: len(got)]
        assert i % 2 == 0 or len(got) == NUM_NEW


@pytest.mark.parametrize("family", ["granite-hybrid", "mamba", "gptj"])
def test_different_requests_get_what_each_gets_alone(family: str) -> None:
    requests = [(prompts()[i % len(prompts())][i // 9 :] or (5,), mixed_sampling(i)) for i in range(16)]
    together = run(make_engine(family, max_batched_tokens=64), requests)
    engine = make_engine(family, prefix_caching=False)
    assert together == [run(engine, [request])[0] for request in requests]


def test_choices_share_the_state_of_their_prompt() -> None:
    engine = make_engine("lfm2")
    prompt = prompts()[0]
    sampling = mixed_sampling(1)
    engine.add_request(AddRequest("a", list(prompt), greedy()))
    run(engine, [(prompt, sampling)])
    assert engine.stats.num_cached_tokens > 0
