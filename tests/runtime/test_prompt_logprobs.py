"""The log-probabilities of prompts equal those of a stock forward, however the engine cut and mixed the work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from lmserve.engine.core import EngineCore
from lmserve.engine.messages import AddRequest
from lmserve.outputs import TokenLogprobs
from lmserve.sampling_params import SamplingParams
from tests.runtime.test_exactness import BLOCK_SIZE, make_engine, prompts
from tests.runtime.tiny_models import build_tiny

FEW = ["llama", "gemma2", "gpt2", "deepseek-v3"]
NUM_TOP = 5
ROUNDING = 1e-4

Prompt = tuple[int, ...]
Scored = list[list[TokenLogprobs]]


@cache
@torch.inference_mode()
def stock(family: str, prompt: Prompt) -> Tensor:
    """(tokens - 1, vocab) float32: what a plain script gets."""
    logits: Tensor = build_tiny(family)(input_ids=torch.tensor([prompt])).logits
    return logits[0, :-1].float().log_softmax(-1)


def score(engine: EngineCore, requests: Sequence[tuple[Prompt, SamplingParams]]) -> Scored:
    """Everything at once; the log-probabilities of each prompt."""
    scored: defaultdict[tuple[str, int], list[TokenLogprobs]] = defaultdict(list)
    for i, (prompt, sampling) in enumerate(requests):
        assert engine.add_request(AddRequest(str(i), list(prompt), sampling)) == []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            scored[output.request_id, output.choice] += output.prompt_logprobs
    engine.check_integrity()
    assert not any(entries for (_, choice), entries in scored.items() if choice > 0)
    return [scored[str(i), 0] for i in range(len(requests))]


def asking(*, max_tokens: int = 0, n: int = 1, num_top: int = NUM_TOP) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, n=n, temperature=0.0, ignore_eos=True, prompt_logprobs=num_top)


def assert_stock(family: str, prompt: Prompt, entries: list[TokenLogprobs], num_top: int = NUM_TOP) -> None:
    expected = stock(family, prompt)
    assert len(entries) == len(prompt) - 1
    for row, token_id, entry in zip(expected, prompt[1:], entries, strict=True):
        assert entry.logprob == pytest.approx(row[token_id].item(), abs=ROUNDING)
        assert len(entry.top) == num_top
        values = [value for _, value in entry.top]
        assert values == pytest.approx(row.topk(num_top).values.tolist(), abs=ROUNDING)
        assert values == pytest.approx([row[top_id].item() for top_id, _ in entry.top], abs=ROUNDING)


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("max_batched_tokens", [512, 11])
def test_whole_and_chunked_among_others(family: str, max_batched_tokens: int) -> None:
    engine = make_engine(family, max_batched_tokens=max_batched_tokens)
    scored = score(engine, [(prompt, asking(max_tokens=i % 3)) for i, prompt in enumerate(prompts())])
    for prompt, entries in zip(prompts(), scored, strict=True):
        assert_stock(family, prompt, entries)


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_as_many_of_the_likeliest_as_asked_for(num_top: int) -> None:
    prompt = prompts()[0]
    [entries] = score(make_engine("llama"), [(prompt, asking(num_top=num_top))])
    assert_stock("llama", prompt, entries, num_top)


def test_a_prefix_that_others_cached_is_scored_all_the_same() -> None:
    prompt = prompts()[0]
    engine = make_engine("llama")
    silent = SamplingParams(max_tokens=2)
    assert score(engine, [(prompt, silent)]) == [[]]
    [entries] = score(engine, [(prompt, asking())])
    assert_stock("llama", prompt, entries)
    assert engine.stats.num_cached_tokens == 0
    score(engine, [(prompt, silent)])
    assert engine.stats.num_cached_tokens == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_choices_share_it() -> None:
    prompt = prompts()[0]
    [entries] = score(make_engine("llama"), [(prompt, asking(n=3, max_tokens=4))])
    assert_stock("llama", prompt, entries)


def test_after_preemption() -> None:
    engine = make_engine("llama", num_blocks=26, max_batched_tokens=16)
    scored = score(engine, [(prompt, asking(max_tokens=12)) for prompt in prompts()])
    assert engine.stats.num_preemptions > 0
    for prompt, entries in zip(prompts(), scored, strict=True):
        assert_stock("llama", prompt, entries)


def test_those_beside_it_get_what_they_get_alone() -> None:
    """Its rows of logits stand behind theirs."""
    requests = [(prompt, SamplingParams(max_tokens=8, seed=i, logprobs=2)) for i, prompt in enumerate(prompts())]

    def generated(engine: EngineCore, number: int) -> tuple[list[int], list[TokenLogprobs]]:
        prompt, sampling = requests[number]
        assert engine.add_request(AddRequest(f"r{number}", list(prompt), sampling)) == []
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        while engine.has_work:
            for output in engine.step():
                if output.request_id == f"r{number}":
                    token_ids += output.token_ids
                    logprobs += output.logprobs
        return token_ids, logprobs

    for number in (1, 3, 5):
        alone = generated(make_engine("llama"), number)
        engine = make_engine("llama", max_batched_tokens=13)
        for i, prompt in enumerate(prompts()):
            engine.add_request(AddRequest(f"scored{i}", list(prompt), asking(max_tokens=3)))
        token_ids, logprobs = generated(engine, number)
        assert token_ids == alone[0]
        assert [p.logprob for p in logprobs] == pytest.approx([p.logprob for p in alone[1]], abs=ROUNDING)
