"""Does lmserve serve a model exactly: the engine's greedy tokens beside the model's own, made one by one, uncached?
Where a model's own cached generation differs from that for one of the prompts, ours is held to it instead.

Several prompts at once, read in chunks, with a cache so small that requests are preempted, and one that is cancelled.
A model that the server refuses at its load is not served wrongly either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.model_types.baseline import TIE, forward, gap, greedy
from benchmarks.model_types.folder import saved
from benchmarks.model_types.sizes import SPECIAL_TOKENS, VOCABULARY
from lmserve.config import ModelConfig
from lmserve.engine.core import EngineCore, limits_of
from lmserve.engine.messages import AddRequest, Cancel
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.build import build_runner
from lmserve.runtime.model_runner import PackedModelRunner
from lmserve.sampling_params import SamplingParams

LENGTHS = (23, 5, 31, 14, 1, 9)
NEW_TOKENS = 8
BLOCK_SIZE = 4
FEW_BLOCKS = 18
"""Enough for one of the requests, and not for all."""
BUDGET = 12
"""Tokens of a step: prompts are read in chunks."""
CANCELLED = 1
CONFIG = ModelConfig(
    model="",
    device="cpu",
    dtype="float32",
    attention_backend="cpu",  # no native program: it is compared with torch's own forward at every load
    kv_cache_memory=64 * 2**20,
    max_model_len=64,
    block_size=BLOCK_SIZE,
    max_num_seqs=len(LENGTHS),
    max_num_batched_tokens=BUDGET,
)


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a model in the server."""

    served: Literal["exact", "refused", "wrong", "fails"]
    lane: str = ""
    served_reason: str = ""
    """Why it is refused, or what is wrong; of an exact one, why it has no faster lane."""


def serve(model: PreTrainedModel) -> Served:
    """The model goes into a folder and the whole road of a load; it itself is what ours is compared with."""
    with saved(model) as folder:
        prompts = make_prompts()
        expected = [_continue(model, prompt) for prompt in prompts]
        try:
            runner = build_runner(replace(CONFIG, model=str(folder)))
        except ModelLoadFailed as error:
            return Served("refused", "", str(error).replace(str(folder), "its folder"))
        info = runner.info
        for num_blocks in (info.num_blocks, FEW_BLOCKS):
            runner.info = replace(info, num_blocks=num_blocks)
            try:
                got = run(runner, [_request(i, prompt) for i, prompt in enumerate(prompts)], CANCELLED)
            except Exception as error:
                return Served("fails", info.lane, f"{type(error).__name__}: {error}")
            for i, (tokens, right) in enumerate(zip(got, expected, strict=True)):
                problem = _compare(model, prompts[i], tokens, right, may_end_early=i == CANCELLED)
                if problem:
                    return Served("wrong", info.lane, f"prompt of {LENGTHS[i]}, {num_blocks} blocks: {problem}")
    return Served("exact", info.lane + (", whole prompts" if info.whole_prompts else ""), info.lane_reason)


def make_prompts() -> list[list[int]]:
    """Random tokens without a special meaning. Two of them begin alike."""
    draw = torch.Generator().manual_seed(3)
    prompts = [
        [int(token) for token in torch.randint(SPECIAL_TOKENS, VOCABULARY - 4, (n,), generator=draw)] for n in LENGTHS
    ]
    prompts[2][:17] = prompts[0][:17]
    return prompts


def _continue(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    ids = torch.tensor([list(prompt)])
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, forward(model, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return [int(token) for token in ids[0, len(prompt) :]]


def _generate(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    ids = torch.tensor([list(prompt)])
    generate: Any = model.generate
    made: Tensor = generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy(NEW_TOKENS))
    return [int(token) for token in made[0, len(prompt) :]]


def _request(number: int, prompt: list[int]) -> AddRequest:
    return AddRequest(str(number), prompt, SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True))


def run(runner: PackedModelRunner, requests: Sequence[AddRequest], cancelled: int | None = None) -> list[list[int]]:
    """The engine's tokens of each, all at once; one is cancelled half way. Their names are their places.

    Raises:
        RuntimeError: what the engine says of one that it refuses or that fails.
    """
    engine = EngineCore(runner, limits_of(runner.info))
    for request in requests:
        refused = engine.add_request(request)
        if refused:
            raise RuntimeError(refused[0].error)
    got: list[list[int]] = [[] for _ in requests]
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise RuntimeError(output.error)
            got[int(output.request_id)] += output.token_ids
        if cancelled is not None and len(got[cancelled]) == NEW_TOKENS // 2:
            engine.cancel(Cancel(str(cancelled)))
        engine.check_integrity()
    return got


def _compare(
    model: PreTrainedModel, prompt: Sequence[int], tokens: list[int], right: list[int], *, may_end_early: bool
) -> str:
    """What is wrong, if anything. Behind a tie of two logits all may differ."""
    for i, (token, expected) in enumerate(zip(tokens, right, strict=False)):
        if token == expected:
            continue
        row: Tensor = forward(model, torch.tensor([[*prompt, *right[:i]]]))[0, -1]
        if tokens == _generate(model, prompt)[: len(tokens)]:
            return ""
        below = gap(row, token)
        return "" if below < TIE else f"token {i + 1} is {below:.2g} spreads below the highest"
    if len(tokens) < len(right) and not may_end_early:
        return f"{len(tokens)} tokens instead of {len(right)}"
    return ""
