"""The graphs that tests of a CPU have are as unforgiving as real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import Library

from lmserve.runtime.graphs import CaptureFailed
from tests.runtime.recorded_graph import RecordedGraphs

# What is done again


def test_a_replay_reads_and_writes_the_same_memory() -> None:
    x, out = torch.arange(6.0), torch.zeros(2, 3)

    def run() -> None:
        y = x.view(2, 3) * 2  # a view, a new tensor
        y[0] += 1  # in place, through a view
        out.copy_(torch.nn.functional.linear(y, torch.eye(3)).sort(-1, descending=True).values)

    graph = RecordedGraphs().capture(run)
    x.copy_(torch.tensor([5.0, 1.0, 3.0, 0.0, 2.0, 7.0]))
    expected = torch.tensor([[11.0, 7.0, 3.0], [14.0, 4.0, 0.0]])
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


def test_none_of_the_python_runs_again_and_its_numbers_stay() -> None:
    calls: list[int] = []
    length = [3]
    x, out = torch.ones(8), torch.zeros(2)

    def run() -> None:
        calls.append(1)
        out[0] = x[: length[0]].sum()
        out[1] = x.sum() * length[0]

    graph = RecordedGraphs().capture(run)
    assert len(calls) == 2
    length[0] = 5
    graph.replay()
    assert len(calls) == 2
    assert out.tolist() == [3.0, 24.0], "stale, as it would be"


def test_what_was_read_on_the_host_stays() -> None:
    x, out = torch.tensor([2, 3]), torch.zeros(1)

    def run() -> None:
        out.fill_(sum(x.tolist()))  # a CPU does not call it an operation

    graph = RecordedGraphs().capture(run)
    x.add_(10)
    graph.replay()
    assert out.item() == 5.0


def test_an_operation_that_is_not_torchs_own_is_taken_apart() -> None:
    """Whatever it finds outside of its arguments is there no more in a replay."""
    library: Any = Library("lmserve_recorded", "DEF")  # type: ignore[no-untyped-call]
    library.define("twice(Tensor x) -> Tensor")
    factor: list[Tensor] = [torch.tensor(2.0)]
    library.impl("twice", lambda x: x * factor[0], "CPU")
    x, out = torch.ones(2), torch.zeros(2)

    def run() -> None:
        out.copy_(torch.ops.lmserve_recorded.twice(x))

    graph = RecordedGraphs().capture(run)
    factor.clear()
    x.fill_(4.0)
    graph.replay()
    assert out.tolist() == [8.0, 8.0]


# What cannot be captured

REFUSED: list[Callable[[Tensor], Any]] = [
    lambda t: t[0].item(),
    lambda t: bool((t > 0).any()),
    lambda t: t[t > 0],
    lambda t: t.nonzero(),
    lambda t: torch.unique(t),
    lambda t: t.repeat_interleave(t.long()),
    lambda t: torch.nn.functional.one_hot(t.long()),
    lambda t: t + torch.tensor([1.0, 2.0]),
]


@pytest.mark.parametrize("run", REFUSED)
def test_what_would_wait_is_refused(run: Callable[[Tensor], Any]) -> None:
    x = torch.ones(2)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(CaptureFailed):
            RecordedGraphs().capture(lambda: run(x))
