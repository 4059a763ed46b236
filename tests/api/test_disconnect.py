"""A client that goes away, in every phase: its work stops with the step in flight. Counted in steps, never timed."""

from __future__ import annotations

import pytest

from tests.api.engine_server import engine_server
from tests.api.running_server import wait_until
from tests.engine.engine_thread import GatedRunner
from tests.engine.fake_runner import make_info

STEPS_INTO = {"queued": 2, "prefill": 2, "decode": 7}
"""How many steps after the victim came it is in its phase: its prompt of 30 tokens is computed by seven."""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", STEPS_INTO)
def test_a_client_that_goes_away(phase: str, stream: bool) -> None:
    num_seqs = 1 if phase == "queued" else 2
    runner = GatedRunner(make_info(max_num_seqs=num_seqs, max_num_batched_tokens=8))
    with engine_server(runner) as server:
        other = server.ask([1, 2, 3], 30)
        runner.wait_launched()
        victim = server.ask(list(range(10, 40)), 20, stream=stream)
        wait_until(lambda: server.engine.num_live == 2)
        for _ in range(STEPS_INTO[phase]):
            runner.allow(1)
            step = runner.wait_launched()
        lengths = [chunk.num_tokens for chunk in step.chunks]
        assert lengths == {"queued": [1], "prefill": [1, 7], "decode": [1, 1]}[phase]

        victim.close()
        wait_until(lambda: server.engine.num_live == 1)
        runner.allow(1)
        step = runner.wait_launched()
        assert [chunk.num_tokens for chunk in step.chunks] == [1], "the next step is without it"
        stats = server.thread.core.stats
        assert (stats.num_cancelled, stats.num_running, stats.num_waiting) == (1, 1, 0)
        assert stats.num_free_blocks == 64 - len(step.chunks[0].block_table)

        runner.allow()
        assert "".join(other.read()), "the other one was not disturbed"
        wait_until(lambda: server.engine.num_live == 0)
    stats = server.thread.core.stats
    assert (stats.num_finished, stats.num_cancelled, stats.num_free_blocks) == (1, 1, 64)
    assert stats.num_generated_tokens >= 30
