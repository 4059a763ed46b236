"""Grammars through the real engine, runner and sampler: the output is what they ask for."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jsonschema
import pytest
import torch

from lmserve.config import ModelConfig
from lmserve.engine.core import EngineCore
from lmserve.engine.messages import AddRequest, Pause, Resume, UseVocabulary
from lmserve.engine.scheduler import SchedulerConfig
from lmserve.grammar.build import ChoiceBody, JsonBody, body_text
from lmserve.grammar.tokenizer_text import TokenizerText
from lmserve.outputs import FinishReason
from lmserve.runtime.build import assemble_runner
from lmserve.runtime.kv_cache import block_bytes
from lmserve.runtime.packed_lane import PackedLane
from lmserve.sampling_params import SamplingParams
from tests.runtime.tiny_models import build_tiny
from tests.tiny_folder import byte_tokenizer

BLOCK_SIZE = 4
MAX_LEN = 400
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "grün", "blue"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 250}, "maxItems": 3},
        "name": {"type": "string", "maxLength": 6},
    },
    "required": ["colour", "sizes", "name"],
    "additionalProperties": False,
}
GRAMMAR = body_text(JsonBody(SCHEMA))


@cache
def tokenizer() -> Any:
    return byte_tokenizer()


def model() -> Any:
    return build_tiny("llama", vocab_size=len(tokenizer()))


def make_engine(*, num_blocks: int = 2000, max_batched_tokens: int = 512, **overrides: Any) -> EngineCore:
    memory = num_blocks * block_bytes(PackedLane(model()).probe(), BLOCK_SIZE, torch.float32)
    config = ModelConfig(
        model="tiny",
        kv_cache_memory=memory,
        max_model_len=MAX_LEN,
        block_size=BLOCK_SIZE,
        max_num_seqs=24,
        max_num_batched_tokens=max_batched_tokens,
        self_check=False,
        **overrides,
    )
    runner = assemble_runner(model(), config, torch.float32)
    engine = EngineCore(
        runner, SchedulerConfig(max_num_seqs=24, max_num_batched_tokens=max_batched_tokens, max_model_len=MAX_LEN)
    )
    return with_vocabulary(engine)


def with_vocabulary(engine: EngineCore) -> EngineCore:
    text = TokenizerText.of(tokenizer().backend_tokenizer.to_str(), [tokenizer().eos_token_id])
    engine.handle(UseVocabulary(text))
    return engine


def request(name: str, grammar: str, **sampling: Any) -> AddRequest:
    params = SamplingParams(**{"max_tokens": 300, "seed": sum(name.encode()), **sampling})
    prompt = tokenizer().encode(f"Say something, {name}: ")
    return AddRequest(name, prompt, params, [tokenizer().eos_token_id], grammar=grammar)


def run(engine: EngineCore, requests: Sequence[AddRequest], *, pauses: bool = False) -> dict[str, list[int]]:
    """All at once; the tokens of each choice, by request and choice."""
    results: defaultdict[str, list[int]] = defaultdict(list)
    for added in requests:
        assert engine.handle(added) == []
    num_steps = 0
    while engine.has_work:
        paused = requests[num_steps % len(requests)].request_id
        if pauses:
            engine.pause(Pause(paused))
        for output in engine.step():
            assert output.error is None, output.error
            results[f"{output.request_id}/{output.choice}"] += output.token_ids
        engine.resume(Resume(paused))
        num_steps += 1
    engine.check_integrity()
    return dict(results)


def text_of(token_ids: Sequence[int]) -> str:
    assert token_ids[-1] == tokenizer().eos_token_id, "cut off"
    return str(tokenizer().decode(list(token_ids[:-1])))


def is_valid(token_ids: Sequence[int]) -> bool:
    jsonschema.validate(json.loads(text_of(token_ids)), SCHEMA)
    return True


SAMPLINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_p": 0.5},
    {"min_p": 0.3, "typical_p": 0.9},
    {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": -1.0},
    {"logit_bias": ((3, 100.0), (40, 100.0))},
    {"logprobs": 3},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_any_sampling_gives_a_valid_text(sampling: dict[str, Any]) -> None:
    results = run(make_engine(), [request(f"{i}", GRAMMAR, **sampling) for i in range(4)])
    assert all(map(is_valid, results.values()))


def test_free_neighbours_get_what_they_get_alone() -> None:
    free = [request(f"free{i}", "", max_tokens=60, ignore_eos=True, temperature=i % 2) for i in range(8)]
    bound = [request(f"bound{i}", GRAMMAR, temperature=i % 2) for i in range(8)]
    alone = run(make_engine(), free)
    mixed = run(make_engine(), [each for pair in zip(free, bound, strict=True) for each in pair])
    assert {name: mixed[name] for name in alone} == alone
    assert all(is_valid(tokens) for name, tokens in mixed.items() if name.startswith("bound"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_chunks_preemptions_and_pauses_change_nothing(temperature: float) -> None:
    wanted = [request(f"r{i}", GRAMMAR, temperature=temperature) for i in range(12)]
    expected = run(make_engine(), wanted)
    assert all(map(is_valid, expected.values()))
    assert run(make_engine(max_batched_tokens=16), wanted) == expected
    tight = make_engine(num_blocks=160)
    assert run(tight, wanted) == expected
    assert tight.stats.num_preemptions > 0
    assert run(make_engine(), wanted, pauses=True) == expected


def test_choices_are_constrained_each_by_itself() -> None:
    results = run(make_engine(), [request("many", GRAMMAR, n=8)])
    assert all(map(is_valid, results.values()))
    assert len({tuple(tokens) for tokens in results.values()}) > 1
    for choice in range(8):
        assert f"many/{choice}" in results


def test_a_slot_forgets_its_last_owners_grammar() -> None:
    engine = make_engine()
    assert text_of(run(engine, [request("a", body_text(ChoiceBody(["yes"])))])["a/0"]) == "yes"
    free = request("b", "", temperature=0.0, max_tokens=20, ignore_eos=True)
    assert run(engine, [free]) == run(make_engine(), [free])


def test_a_grammar_that_cannot_be_compiled_costs_its_own_request() -> None:
    engine = make_engine()
    assert engine.handle(request("bad", "start: what")) == []
    assert engine.handle(request("good", GRAMMAR)) == []
    errors: dict[str, str | None] = {}
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids if output.request_id == "good" else ()
            if output.finish_reason is FinishReason.ERROR:
                errors[output.request_id] = output.error
    assert list(errors) == ["bad"]
    assert is_valid(tokens)


def test_where_llguidance_fails_no_text_looks_complete() -> None:
    """Its mask then has the end in it, and nothing else. (Such a schema is refused before it comes here.)"""
    broken = body_text(JsonBody({"$ref": "#"}))
    engine = make_engine()
    engine.handle(request("r", broken))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert not outputs[-1].may_retry


def test_a_text_that_is_cut_off_is_the_beginning_of_a_whole_one() -> None:
    wanted = request("r", GRAMMAR, temperature=0.0)
    whole = run(make_engine(), [wanted])["r/0"]
    cut = replace_sampling(wanted, max_tokens=7)
    assert run(make_engine(), [cut])["r/0"] == whole[:7]


def replace_sampling(added: AddRequest, **changes: Any) -> AddRequest:
    return AddRequest(
        added.request_id,
        added.prompt_token_ids,
        replace(added.sampling, **changes),
        added.eos_token_ids,
        grammar=added.grammar,
    )
