"""Attention as one operation, in models that torch.compile takes whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from lmserve.runtime.attention.base import LayerOptions
from lmserve.runtime.attention_op import HANDLE, attending, give_handle, has_handle, paged_attention
from lmserve.runtime.kv_cache import KVCache
from tests.runtime.attached_lane import CountingBackend, attach, logits
from tests.runtime.tiny_models import FAMILIES, build_tiny

ROWS = (2, 64, 5, 17, 32)
QUICK = ("llama", "gpt-oss")
EVERY_FAMILY = [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def contents(cache: KVCache) -> list[Tensor]:
    return [pool.clone() for layer in cache.layers.values() for pool in (layer.k, layer.v)]


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_whole_model_compiles_once_and_gives_the_same_logits(family: str) -> None:
    lane, cache = attach(build_tiny(family, num_hidden_layers=2, **layer_types(family)))
    places = [(layer.k.data_ptr(), layer.v.data_ptr()) for layer in cache.layers.values()]
    expected, written = {}, {}
    for num_rows in ROWS:
        expected[num_rows] = logits(lane, num_rows)
        written[num_rows] = contents(cache)
    backend = CountingBackend()
    lane.model.compile(fullgraph=True, backend=backend)
    for num_rows in (11, 31):  # the second time torch finds that the number of rows varies
        logits(lane, num_rows)
    assert backend.num_compiled == 2
    for num_rows in ROWS:
        for pool in (pool for layer in cache.layers.values() for pool in (layer.k, layer.v)):
            pool.zero_()
        assert torch.allclose(logits(lane, num_rows), expected[num_rows], rtol=1e-4, atol=1e-5)
        for pool, was in zip(contents(cache), written[num_rows], strict=True):
            rows = slice(0, num_rows)
            assert torch.allclose(pool[rows], was[rows], rtol=1e-4, atol=1e-5)
    assert backend.num_compiled == 2
    assert backend.num_runs == 2 + len(ROWS)
    assert places == [(layer.k.data_ptr(), layer.v.data_ptr()) for layer in cache.layers.values()]


def layer_types(family: str) -> dict[str, Any]:
    types = FAMILIES[family][1].get("layer_types")
    return {} if types is None else {"layer_types": types[:2]}


@torch.inference_mode()
def test_a_compiler_sees_one_operation_a_layer_and_never_the_cache() -> None:
    lane, cache = attach(build_tiny("llama", num_hidden_layers=3))
    graphs: list[torch.fx.GraphModule] = []
    inputs: list[Any] = []

    def keep(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)

        def run(*args: Any) -> Any:
            inputs.extend(args)
            return graph(*args)

        return run

    lane.model.compile(fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    logits(lane, 9)
    (graph,) = graphs  # functions without side effects are all that is left in it
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert names.count("lmserve.paged_attention.default") == 3
    assert not [name for name in names if "copy" in name.replace("_to_copy", "") or "index_put" in name]
    pools = {pool.untyped_storage().data_ptr() for layer in cache.layers.values() for pool in (layer.k, layer.v)}
    assert not pools & {tensor.untyped_storage().data_ptr() for tensor in inputs if isinstance(tensor, Tensor)}
    handles = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.shape == (1,)]
    assert sorted(int(handle) for handle in handles) == [0, 1, 2]


@torch.inference_mode()
def test_lanes_of_one_process_keep_their_caches_apart() -> None:
    first, second = build_tiny("llama", num_hidden_layers=1), build_tiny("llama", num_hidden_layers=1)
    for parameter in second.parameters():
        parameter.mul_(1.1)
    lanes = [attach(model)[0] for model in (first, second)]
    expected = [logits(lane, 13) for lane in lanes]
    assert not torch.allclose(expected[0], expected[1])
    for lane in lanes:
        lane.model.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for lane, wanted in zip(lanes, expected, strict=True):
            assert torch.allclose(logits(lane, 13), wanted, rtol=1e-4, atol=1e-5)


class Written:
    """A step that notes what it is asked for; its results are not laid out as the operation promises."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, LayerOptions]] = []

    def attend_layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: LayerOptions) -> Tensor:
        self.asked.append((layer, options))
        return q.new_ones(q.shape[1], q.shape[0], v.shape[2]).transpose(0, 1)


def layer_with_handle(number: int) -> nn.Module:
    module = nn.Linear(2, 2)
    give_handle(module, number)
    return module


ROWS_OF_Q, ROWS_OF_K, ROWS_OF_V = torch.ones(5, 4, 8), torch.ones(5, 2, 8), torch.ones(5, 2, 6)


@pytest.mark.parametrize(
    "options",
    [LayerOptions(0.25), LayerOptions(0.5, window=7, softcap=30.0, sinks=torch.ones(4))],
    ids=["plain", "everything"],
)
def test_the_step_gets_what_the_layer_has_asked_for(options: LayerOptions) -> None:
    step, module = Written(), layer_with_handle(3)
    with attending(step):
        out = paged_attention(module, ROWS_OF_Q, ROWS_OF_K, ROWS_OF_V, options)
    ((layer, asked),) = step.asked
    assert (layer, asked.scaling, asked.window, asked.softcap) == (3, options.scaling, options.window, options.softcap)
    assert (asked.sinks is None) == (options.sinks is None)
    assert out.shape == (5, 4, 6)


def test_a_result_is_laid_out_as_a_compiler_was_told() -> None:
    operation, sinks = torch.ops.lmserve.paged_attention.default, torch.ones(4)
    arguments = (ROWS_OF_Q, ROWS_OF_K, ROWS_OF_V, torch.tensor([0]), 1.0, 0, 0.0, sinks)
    with attending(Written()):
        torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


def test_nothing_is_attended_to_outside_of_a_step() -> None:
    module = layer_with_handle(0)
    with pytest.raises(LookupError):
        paged_attention(module, ROWS_OF_Q, ROWS_OF_K, ROWS_OF_V, LayerOptions(1.0))
    with attending(Written()):
        pass
    with pytest.raises(LookupError):
        paged_attention(module, ROWS_OF_Q, ROWS_OF_K, ROWS_OF_V, LayerOptions(1.0))


def test_a_step_within_a_step_gives_way_to_the_outer_one() -> None:
    outer, inner, module = Written(), Written(), layer_with_handle(0)
    with attending(outer):
        with attending(inner):
            pass
        paged_attention(module, ROWS_OF_Q, ROWS_OF_K, ROWS_OF_V, LayerOptions(1.0))
    assert (len(outer.asked), len(inner.asked)) == (1, 0)


def test_a_handle_stays_on_the_host_and_out_of_the_state() -> None:
    module = layer_with_handle(2)
    module.to("meta")
    assert getattr(module, HANDLE).device.type == "cpu"
    assert set(module.state_dict()) == {"weight", "bias"}
    assert has_handle(module)
    assert not has_handle(nn.Linear(2, 2))
