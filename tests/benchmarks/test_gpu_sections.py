"""What the GPU benchmark's sections do on a GPU, as far as a CPU can do it, and that they notice what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import attention_speed, kernels, peers, start, steps, streams
from benchmarks.gpu.models import Served, capture_all, serve
from benchmarks.gpu.operations import Operation, count_operations, in_layers
from benchmarks.gpu.results import Row, Skipped
from benchmarks.gpu.setting import Limits, Setting
from benchmarks.gpu.timing import replayed, seconds
from lmserve.runtime.attention.base import LayerCache
from lmserve.runtime.attention.sdpa import SdpaBackend
from lmserve.runtime.compiled import compile_layers
from tests.runtime.captured_engine import capture_steps

CPU = torch.device("cpu")
TINY = Setting("cpu", True, "qwen3-0.6b", Limits(1e10, 1e11))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For so few numbers others only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def served() -> Served:
    return serve(TINY)


def values(rows: Iterator[Row]) -> dict[str, float]:
    found = {row.name: row for row in rows}
    assert not [row for row in found.values() if row.failed], found
    return {name: row.value for name, row in found.items() if row.value is not None}


def errors(rows: Iterator[Row]) -> list[bool]:
    return [row.value is None or row.value > (row.limit or 0) for row in rows if row.name.startswith("error")]


def test_attention_is_right() -> None:
    found = values(kernels.run(TINY))
    assert len(found) == 3 * len(kernels.TINY_SHAPES)
    assert errors(kernels.run(TINY)) == [False] * len(kernels.TINY_SHAPES)


def _scaled(out: Tensor) -> Tensor:
    return out * 1.001


def _last_row_lost(out: Tensor) -> Tensor:
    return out.index_fill(0, torch.tensor([len(out) - 1]), 0.0)


def _no_number(out: Tensor) -> Tensor:
    return out.index_fill(0, torch.tensor([3]), float("nan"))


@pytest.mark.parametrize("spoil", [_scaled, _last_row_lost, _no_number])
def test_attention_that_is_wrong_shows(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor]) -> None:
    attend = SdpaBackend.attend
    monkeypatch.setattr(SdpaBackend, "attend", lambda *arguments: spoil(attend(*arguments)))
    assert errors(kernels.run(TINY)) == [True] * len(kernels.TINY_SHAPES)


def test_a_key_that_is_left_out_of_a_long_context_shows() -> None:
    shape = kernels.Shape("", 4, 2, 16, torch.float32)
    backend, case = kernels.make_case("sdpa", shape, CPU, ((300, 1), (0, 5)))
    right, without = kernels.reference(case), kernels.attended(backend, case)
    assert kernels.worst_error(without, right) < 1e-5
    case.cache.v[kernels.rows_of(case.spans[0], CPU)[17]] = 0
    assert kernels.worst_error(kernels.attended(backend, case), right) > 100 * kernels.TOLERANCE[torch.float32]


def test_writing_to_a_wrong_place_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: SdpaBackend, k: Tensor, v: Tensor, cache: LayerCache, where: Tensor) -> None:
        cache.k.index_copy_(0, where, k)
        cache.v.index_copy_(0, where.flip(0), v)

    monkeypatch.setattr(SdpaBackend, "write", write)
    found = values(kernels.run(TINY))
    assert {value for name, value in found.items() if name.startswith("writing")} == {0.0}


def test_a_decode_that_is_not_alike_in_company_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = SdpaBackend.attend
    monkeypatch.setattr(SdpaBackend, "attend", lambda self, q, *rest: attend(self, q, *rest) + 1e-6 * len(q))
    found = values(kernels.run(TINY))
    assert {value for name, value in found.items() if name.startswith("decodes alone")} == {0.0}


def test_attention_speed_of_a_backend_that_reads_lengths_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setting, "backend", property(lambda self: "reference"))
    found = values(attention_speed.run(TINY))
    assert set(found) == {"decode, 1 x 64", "decode, 4 x 32", "prefill, 64 behind 0", "prefill, 16 behind 48"}
    assert min(found.values()) > 0


def test_decode_steps_are_counted_while_all_decode(served: Served) -> None:
    core = served.engine(reads_at_once=True)
    asked = streams.prompts(4, 24, served.runner.info.vocab_size, 1)
    assert len({tuple(prompt[:3]) for prompt in asked}) == 4
    generated = Counter[int]()
    step = core.step

    def counted() -> list[Any]:
        outputs = step()
        generated[len(outputs)] += 1
        return outputs

    core.step = counted  # type: ignore[method-assign]
    found = streams.decode(core, asked, num_steps=6, num_warm_ups=2)
    # one step for the prompts, two to warm up, six that count: between 3 and 9 new tokens behind each prompt
    assert found.context == 24 + 6
    assert generated[4] >= 9
    assert not core.has_work
    core.check_integrity()


def test_whole_requests_are_followed_to_their_end(served: Served) -> None:
    core = served.engine()
    found = streams.whole(core, streams.prompts(3, 10, served.runner.info.vocab_size, 1), 5)
    assert core.stats.num_generated_tokens == 15
    assert found.tokens_per_second > 0
    assert 0 < found.first_token_seconds < 15 / found.tokens_per_second
    with pytest.raises(streams.RequestFailed, match="outside of the vocabulary"):
        streams.whole(core, [[10**6]], 5)


def _fails() -> None:
    raise RuntimeError("the step")


def test_a_step_that_fails_is_no_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    for run in (partial(streams.whole, num_tokens=2), partial(streams.decode, num_steps=2, num_warm_ups=1)):
        failing = serve(TINY)
        monkeypatch.setattr(failing.runner, "collect", _fails)
        with pytest.raises(streams.RequestFailed, match="step that held this request failed"):
            run(failing.engine(), [[5]])


def test_steps_captured_compiled_and_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with operations that are recorded instead of a graph, and layers that are traced, not compiled."""
    torch._dynamo.reset()
    served = serve(TINY, attention_backend="reference", max_model_len=128)
    lane: Any = served.runner._lane
    assert compile_layers(lane, backend="eager") == ""
    recorded = capture_steps(served.runner, ahead=True)
    monkeypatch.setattr(steps, "serve", lambda setting: served)
    assert steps.modes(served.runner) == ["graph", "compiled", "eager"]
    layer = lane.model.model.layers[0]
    calls = {}
    for mode in steps.modes(served.runner):
        with steps.running(served.runner, mode):
            calls[mode] = served.runner._decode_steps is None, layer._compiled_call_impl is None
    assert calls == {"graph": (False, False), "compiled": (True, False), "eager": (True, True)}
    assert layer._compiled_call_impl is not None
    found = values(steps.run(TINY))
    torch._dynamo.reset()
    assert len(recorded._forwards) == 3  # the largest size, before any other, and those of one row and four
    for mode in ("graph", "compiled", "eager"):
        assert found[f"{mode}, 1 rows"] > 0
        assert found[f"{mode}, 4 rows"] > 0
    assert found["operations in layers, eager"] <= found["operations a step, eager"]
    assert found["off the stock forward"] < 1e-4
    assert found["same bits alone and among 2"] in (0.0, 1.0)
    assert served.runner._decode_steps is recorded
    capture_all(served)
    assert not served.runner.use_idle_time()


def test_a_forward_that_is_off_shows(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = SdpaBackend.attend
    monkeypatch.setattr(SdpaBackend, "attend", lambda *arguments: 0.5 * attend(*arguments))
    [row] = [row for row in steps.run(TINY) if row.name == "off the stock forward"]
    assert row.value is not None
    assert row.value > (row.limit or 0)


def test_a_row_that_is_not_alike_in_company_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = SdpaBackend.attend
    monkeypatch.setattr(SdpaBackend, "attend", lambda self, q, *rest: attend(self, q, *rest) * (1 + len(q) / 64))
    found = values(steps.run(TINY))
    assert found["same bits alone and among 8"] == 0.0  # two are padded to as many rows as one


def test_decodes_that_do_not_fit_are_refused(served: Served) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        steps.Decodes(served.runner, 8, 10**6)


def test_operations_are_counted_and_views_are_not() -> None:
    x = torch.ones(4, 4)
    found = count_operations(lambda: (x @ x.t()).add_(1).view(16) + 1, CPU)
    assert {each.name: each.count for each in found} == {
        "aten.mm.default": 1,
        "aten.add_.Tensor": 1,
        "aten.add.Tensor": 1,
    }
    assert in_layers([Operation("a", 13, 0.0), Operation("b", 4, 0.0), Operation("c", 3, 0.0)], 4) == 3 + 1


def test_times_are_of_the_middle_call() -> None:
    calls: list[int] = []
    assert seconds(lambda: calls.append(1), CPU) < 0.01
    assert len(calls) == 13
    assert replayed(calls.clear, CPU) == calls.clear


def test_starts_need_a_gpu() -> None:
    with pytest.raises(Skipped, match="needs CUDA"):
        list(start.run(TINY))


def test_what_compiling_costs_is_over_a_start_that_has_found_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"eager": [9.0, 4.0], "compiled": [20.0, 6.5]}

    def begin(setting: Setting, folder: str, *, compiled: bool) -> start.Start:
        return start.Start(found["compiled" if compiled else "eager"].pop(0), 0.5, "")

    monkeypatch.setattr(Setting, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(start, "_begin", begin)
    rows = values(start.run(TINY))
    assert rows == {
        "eager, cold": 9.0,
        "compiled, cold": 20.0,
        "more than eager, cold": 11.0,
        "eager, warm": 4.0,
        "compiled, warm": 6.5,
        "more than eager, warm": 2.5,
    }


@pytest.mark.slow
def test_a_start_is_a_process_that_says_what_it_took(tmp_path: Path) -> None:
    assert start._begin(TINY, str(tmp_path), compiled=True).seconds > 0
    with pytest.raises(RuntimeError, match="no model nothing"):
        start._begin(replace(TINY, model="nothing"), str(tmp_path), compiled=False)


def test_a_peer_that_gives_too_few_tokens_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_continuous", lambda *arguments: 7)
    rows = {row.name: row for row in peers.run(TINY)}
    assert rows["generate_batch, 4 streams"].failed
    assert "7 tokens came" in rows["generate_batch, 4 streams"].note
    assert (rows["generate, 4 streams"].value or 0) > 0
