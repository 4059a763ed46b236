"""How a grammar goes through the engine: as text, to the runner, with the sequence."""

from __future__ import annotations

from lmserve.engine.core import EngineCore
from lmserve.engine.messages import HEADER, AddRequest, UseVocabulary, decode_to_worker, encode
from lmserve.grammar.tokenizer_text import TokenizerText
from lmserve.sampling_params import SamplingParams
from tests.engine.factories import make_config
from tests.engine.fake_runner import FakeRunner, make_info

TEXT = TokenizerText("{}", 3, [2])


def add(name: str, grammar: str, n: int = 1) -> AddRequest:
    return AddRequest(name, [5, 6, 7], SamplingParams(max_tokens=4, n=n), [1], grammar=grammar)


def test_messages_carry_it() -> None:
    for message in (add("r", "start: x"), UseVocabulary(TEXT)):
        assert decode_to_worker(encode(message)[HEADER.size :]) == message


def test_every_choice_has_it_and_each_time_it_takes_a_slot() -> None:
    info = make_info(num_blocks=8)
    runner = FakeRunner(info)
    engine = EngineCore(runner, make_config(info))
    engine.handle(UseVocabulary(TEXT))
    for message in (add("r", "start: x", n=3), add("free", "")):
        assert engine.handle(message) == []
    assert runner.prepared_grammars == {"start: x"}, "compiled while the request waits"
    while engine.has_work:
        engine.step()
    told = [new for step in runner.steps for new in step.new_sequences]
    assert len(told) > 4 or engine.stats.num_preemptions == 0
    assert sorted({(new.choice, new.grammar) for new in told}) == [
        (0, ""),
        (0, "start: x"),
        (1, "start: x"),
        (2, "start: x"),
    ]
