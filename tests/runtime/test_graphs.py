"""Tables of graphs, and what CUDA's own do where there is a device."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch

from lmserve.runtime.graphs import CaptureFailed, CudaGraphs, GraphTable
from tests.runtime.recorded_graph import RecordedGraphs


def test_each_key_is_captured_once_and_replayed_for_itself() -> None:
    graphs = RecordedGraphs()
    table, out = GraphTable[int](graphs, "a test"), torch.zeros(1)
    for value in (3, 4, 3):
        assert table.capture(value, partial(out.fill_, value))
    assert (graphs.num_captures, len(table)) == (2, 2)
    table.replay(3)
    assert out.item() == 3
    table.replay(4)
    assert out.item() == 4


def test_after_a_failure_nothing_else_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    graphs, x = RecordedGraphs(), torch.zeros(1)
    table = GraphTable[str](graphs, "a test")
    assert table.capture("good", lambda: x.add_(1))
    with caplog.at_level(logging.WARNING):
        assert not table.capture("bad", lambda: x.item())
        assert not table.capture("other", lambda: x.add_(1))
    assert table.capture("good", lambda: x.add_(1)), "those that are there can be used"
    assert len(caplog.records) == 1
    assert caplog.text.count("a test: no CUDA graph") == 1
    assert graphs.num_captures == 1


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
def test_cuda_does_again_what_was_captured() -> None:
    graphs = CudaGraphs(torch.device("cuda"))
    x, out = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    tables = [graphs.capture(partial(lambda n: out.copy_((x * n).exp().log()), n)) for n in (3, 2)]
    x.fill_(5.0)
    for graph, expected in zip(tables, (15.0, 10.0), strict=True):
        graph.replay()
        assert out.tolist() == pytest.approx([expected] * 4, rel=1e-5)


@pytest.mark.gpu
@needs_cuda
def test_cuda_goes_on_after_a_capture_that_failed() -> None:
    graphs = CudaGraphs(torch.device("cuda"))
    x = torch.ones(4, device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.raises(CaptureFailed):
        graphs.capture(lambda: x.add_(x.sum().item()))
    assert torch.cuda.current_stream() == stream
    x.fill_(1.0)
    graphs.capture(lambda: x.mul_(2)).replay()
    assert (x + 1).tolist() == [9.0] * 4, "two runs before the capture, and the replay"
