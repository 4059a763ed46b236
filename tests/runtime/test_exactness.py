"""Greedy output equals ``model.generate`` in float32, for every family, however the engine cut and mixed the work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from lmserve.config import ModelConfig
from lmserve.engine.core import EngineCore
from lmserve.engine.messages import AddRequest, Pause, Resume
from lmserve.engine.scheduler import SchedulerConfig
from lmserve.runtime.attention import BACKENDS, backend_class
from lmserve.runtime.build import assemble_runner
from lmserve.runtime.kv_cache import block_bytes
from lmserve.runtime.packed_lane import PackedLane
from lmserve.sampling_params import SamplingParams
from tests.runtime.tiny_models import FAMILIES, VOCAB_SIZE, build_tiny

NUM_NEW = 12
MAX_LEN = 96
BLOCK_SIZE = 4
MAX_SEQS = 40
LENGTHS = (31, 5, 18, 1, 40, 9, 23, 12, 3)

Prompts = tuple[tuple[int, ...], ...]


def make_engine(family: str, *, num_blocks: int = 800, max_batched_tokens: int = 512, **overrides: Any) -> EngineCore:
    """The family's tiny model behind the real runner and engine."""
    memory = num_blocks * block_bytes(PackedLane(build_tiny(family)).probe(), BLOCK_SIZE, torch.float32)
    config = ModelConfig(
        model="tiny",
        kv_cache_memory=memory,
        max_model_len=MAX_LEN,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=max_batched_tokens,
        **overrides,
    )
    runner = assemble_runner(build_tiny(family), config, torch.float32)
    return EngineCore(
        runner,
        SchedulerConfig(
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=max_batched_tokens,
            max_model_len=MAX_LEN,
            prefix_caching=config.prefix_caching,
        ),
    )


@cache
def prompts() -> Prompts:
    generator = torch.Generator().manual_seed(7)
    return tuple(tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()) for n in LENGTHS)


@cache
def generated(family: str, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """What a plain script gets."""
    model = build_tiny(family)
    ids = torch.tensor([prompt])
    generate: Any = model.generate
    output = generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_NEW, eos_token_id=None
    )
    return tuple(output[0, len(prompt) :].tolist())


def run(
    engine: EngineCore, requests: Sequence[tuple[tuple[int, ...], SamplingParams]], *, pauses: bool = False
) -> list[tuple[int, ...]]:
    """Everything at once; the first choice's tokens of each request. ``pauses``: in each step another one is paused."""
    results: defaultdict[str, list[int]] = defaultdict(list)
    for i, (prompt, sampling) in enumerate(requests):
        assert engine.add_request(AddRequest(str(i), list(prompt), sampling)) == []
    num_steps = 0
    while engine.has_work:
        paused = str(num_steps % len(requests))
        if pauses:
            engine.pause(Pause(paused))
        for output in engine.step():
            assert output.error is None
            if output.choice == 0:
                results[output.request_id] += output.token_ids
        engine.resume(Resume(paused))
        num_steps += 1
    engine.check_integrity()
    return [tuple(results[str(i)]) for i in range(len(requests))]


def greedy(max_tokens: int = NUM_NEW) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_alone(family: str) -> None:
    engine = make_engine(family)
    for prompt in prompts()[:3]:
        assert run(engine, [(prompt, greedy())]) == [generated(family, prompt)]


@pytest.mark.parametrize("family", FAMILIES)
def test_among_others_whole_and_chunked(family: str) -> None:
    expected = [generated(family, prompt) for prompt in prompts()]
    for max_batched_tokens in (512, 11):
        engine = make_engine(family, max_batched_tokens=max_batched_tokens)
        assert run(engine, [(prompt, greedy()) for prompt in prompts()]) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_cached_prefix(family: str) -> None:
    long, *others = prompts()
    engine = make_engine(family)
    run(engine, [(long, greedy())])
    before = engine.stats.num_cached_tokens
    requests = [(long, greedy()), (others[0], greedy())]
    assert run(engine, requests) == [generated(family, prompt) for prompt, _ in requests]
    assert engine.stats.num_cached_tokens - before == (len(long) - 1) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("family", FAMILIES)
def test_after_preemption(family: str) -> None:
    engine = make_engine(family, num_blocks=26, max_batched_tokens=16)
    expected = [generated(family, prompt) for prompt in prompts()]
    assert run(engine, [(prompt, greedy()) for prompt in prompts()]) == expected
    assert engine.stats.num_preemptions > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_with_pauses(family: str) -> None:
    engine = make_engine(family, max_batched_tokens=64)
    expected = [generated(family, prompt) for prompt in prompts()]
    assert run(engine, [(prompt, greedy()) for prompt in prompts()], pauses=True) == expected
    assert engine.stats.num_preemptions == 0


@pytest.mark.parametrize("backend", [name for name in BACKENDS if backend_class(name, "cpu").runs_on_cpu])
def test_every_backend(backend: str) -> None:
    engine = make_engine("gemma2", attention_backend=backend, max_batched_tokens=16)
    assert run(engine, [(p, greedy()) for p in prompts()]) == [generated("gemma2", p) for p in prompts()]


def mixed_sampling(i: int) -> SamplingParams:
    """Thirty-two different requests: every parameter, in changing company."""
    return SamplingParams(
        max_tokens=8 + i % 5,
        seed=1000 + i,
        temperature=(0.0, 0.7, 1.0, 1.6)[i % 4],
        top_p=(1.0, 0.9, 0.5)[i % 3],
        top_k=(0, 5, 40)[i // 2 % 3],
        min_p=(0.0, 0.05)[i // 3 % 2],
        typical_p=(1.0, 0.8)[i // 5 % 2],
        repetition_penalty=(1.0, 1.3)[i // 4 % 2],
        presence_penalty=(0.0, 0.6)[i // 6 % 2],
        frequency_penalty=(0.0, -0.4, 0.9)[i // 7 % 3],
        logit_bias=((3 + i, 4.0), (70, -100.0)) if i % 3 == 1 else (),
        min_tokens=4 if i % 6 == 0 else 0,
        stop_token_ids=(40 + i,) if i % 5 == 0 else (),
        ignore_eos=i % 2 == 0,
        logprobs=i % 4 if i % 7 == 0 else None,
    )


@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_thirty_two_different_requests_get_what_each_gets_alone(family: str) -> None:
    requests = [(prompts()[i % len(prompts())][i // 9 :] or (5,), mixed_sampling(i)) for i in range(32)]
    together = run(make_engine(family, max_batched_tokens=64), requests)
    engine = make_engine(family, prefix_caching=False)
    alone = [run(engine, [request])[0] for request in requests]
    assert together == alone
    assert run(make_engine(family, max_batched_tokens=64), requests, pauses=True) == alone
    assert len(set(together)) > 25


def test_choices_share_the_prompt_and_differ() -> None:
    engine = make_engine("llama", prefix_caching=False)
    prompt = prompts()[0]
    engine.add_request(AddRequest("a", list(prompt), SamplingParams(max_tokens=NUM_NEW, seed=5, n=4, ignore_eos=True)))
    texts: defaultdict[int, list[int]] = defaultdict(list)
    while engine.has_work:
        for output in engine.step():
            texts[output.choice] += output.token_ids
    assert len({tuple(text) for text in texts.values()}) == 4
    shared = len(prompt) // BLOCK_SIZE * BLOCK_SIZE
    assert engine.stats.num_prompt_tokens <= len(prompt) + 3 * (len(prompt) - shared + BLOCK_SIZE)
