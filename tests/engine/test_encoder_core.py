from __future__ import annotations

import pytest

from lmserve.engine.block_pool import IntegrityError
from lmserve.engine.encoder_core import EncoderCore
from lmserve.engine.messages import Cancel, Encode, Pause
from lmserve.outputs import EncoderOutput
from lmserve.runtime.interface import EncoderInput, FatalRunnerError
from tests.engine.fake_encoder import ROW_SIZE, VOCAB_SIZE, FakeEncoder, row

ROW_BYTES = 4 * ROW_SIZE


def message(name: str, *lengths: int) -> Encode:
    return Encode(name, [EncoderInput([1 + i] * length) for i, length in enumerate(lengths)])


def rows_of(outputs: list[EncoderOutput]) -> dict[str, dict[int, bytes]]:
    """By request and input."""
    found: dict[str, dict[int, bytes]] = {}
    for output in outputs:
        assert len(output.rows) == ROW_BYTES * len(output.indices)
        for place, index in enumerate(output.indices):
            rows = found.setdefault(output.request_id, {})
            assert index not in rows, "once only"
            rows[index] = output.rows[place * ROW_BYTES : (place + 1) * ROW_BYTES]
    return found


def finish(core: EncoderCore) -> list[EncoderOutput]:
    outputs = []
    while core.has_work:
        outputs += core.step()
    core.check_integrity()
    return outputs


def test_every_input_gets_its_row() -> None:
    core = EncoderCore(FakeEncoder())
    sent = [message("a", 3, 30, 12, 1), message("b", 5), message("c", 32, 32)]
    for each in sent:
        assert core.handle(each) == []
    outputs = finish(core)
    assert all(output.error is None for output in outputs)
    assert rows_of(outputs) == {each.request_id: {i: row(one) for i, one in enumerate(each.inputs)} for each in sent}
    stats = core.stats
    assert (stats.num_finished, stats.num_waiting, stats.num_prompt_tokens) == (3, 0, 46 + 5 + 64)


def test_one_output_a_request_in_a_step() -> None:
    core = EncoderCore(FakeEncoder())
    core.handle(message("a", 4, 4, 4))
    core.handle(message("b", 4))
    outputs = core.step()
    assert sorted(output.request_id for output in outputs) == ["a", "b"]
    assert core.report(outputs).stats.num_steps == 1


def test_a_cancelled_request_is_computed_no_more() -> None:
    runner = FakeEncoder()
    core = EncoderCore(runner)
    core.handle(message("a", 30, 30, 30))
    core.handle(message("b", 2))
    core.step()
    assert core.handle(Cancel("a")) == []
    assert core.handle(Cancel("nobody")) == []
    finish(core)
    assert sum(len(each.token_ids) == 30 for step in runner.steps for each in step) <= 1
    assert (core.stats.num_cancelled, core.stats.num_finished) == (1, 1)


def test_a_failed_step_costs_its_requests_alone() -> None:
    runner = FakeEncoder()
    runner.errors = [ValueError("no")]
    core = EncoderCore(runner)
    core.handle(message("a", 30, 30))
    core.handle(message("b", 30))
    (failed,) = core.step()
    assert failed.request_id == "a"
    assert failed.error is not None
    assert rows_of(finish(core)).keys() == {"b"}
    assert (core.stats.num_finished, core.stats.num_prompt_tokens) == (2, 30)


def test_out_of_memory_half_of_it_is_tried() -> None:
    runner = FakeEncoder()
    runner.errors = [MemoryError()]
    core = EncoderCore(runner)
    core.handle(sent := message("a", 8, 8, 8, 8))
    outputs = finish(core)
    assert [len(step) for step in runner.steps] == [4, 2, 2]
    assert rows_of(outputs) == {"a": {i: row(each) for i, each in enumerate(sent.inputs)}}
    assert core.stats.num_prompt_tokens == 32


def test_out_of_memory_to_the_end_is_an_error() -> None:
    runner = FakeEncoder()
    runner.errors = [MemoryError(), MemoryError()]
    core = EncoderCore(runner)
    core.handle(message("a", 16, 16))
    core.handle(message("b", 32))
    assert [(output.request_id, output.error is not None) for output in core.step()] == [("a", True)]
    runner.errors = [MemoryError()]
    assert [(output.request_id, output.error is not None) for output in core.step()] == [("b", True)], "one alone"
    finish(core)


def test_a_device_that_cannot_be_trusted_ends_the_engine() -> None:
    runner = FakeEncoder()
    runner.errors = [FatalRunnerError("gone")]
    core = EncoderCore(runner)
    core.handle(message("a", 1))
    with pytest.raises(FatalRunnerError):
        core.step()


def test_rows_that_are_missing_are_a_failed_step() -> None:
    runner = FakeEncoder()
    core = EncoderCore(runner)
    core.handle(message("a", 1, 1))
    runner.encode = lambda inputs: [b""]  # type: ignore[method-assign]
    assert [output.error is not None for output in core.step()] == [True]


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "empty"),
        ([EncoderInput([1]), EncoderInput([])], "empty"),
        ([EncoderInput([100])], "vocabulary"),
        ([EncoderInput([-1])], "vocabulary"),
        ([EncoderInput([1] * 65)], "65 tokens, and the model takes 64"),
    ],
)
def test_what_the_api_process_should_have_refused(inputs: list[EncoderInput], says: str) -> None:
    core = EncoderCore(FakeEncoder())
    (refused,) = core.handle(Encode("a", inputs))
    assert says in (refused.error or "")
    assert not core.has_work


def test_the_longest_input_and_the_highest_token_are_taken() -> None:
    core = EncoderCore(FakeEncoder())
    assert core.handle(Encode("a", [EncoderInput([VOCAB_SIZE - 1] * 64), EncoderInput([0])])) == []
    assert rows_of(finish(core))["a"].keys() == {0, 1}


def test_idle_a_request_that_was_lost_is_found() -> None:
    core = EncoderCore(FakeEncoder())
    core.handle(message("a", 1))
    core._queue.pick(32)
    with pytest.raises(IntegrityError, match="1 requests are alive"):
        core.check_integrity()


def test_an_id_that_runs_already() -> None:
    core = EncoderCore(FakeEncoder())
    core.handle(message("a", 1))
    (refused,) = core.handle(message("a", 2))
    assert "already" in (refused.error or "")
    assert rows_of(finish(core)) == {"a": {0: row(EncoderInput([1]))}}


def test_other_messages_have_no_place() -> None:
    with pytest.raises(AssertionError, match="Pause"):
        EncoderCore(FakeEncoder()).handle(Pause("a"))
