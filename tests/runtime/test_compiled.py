"""Compiled layers give what the layers give, from one or two programs for all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from lmserve.runtime.attention_op import give_handle
from lmserve.runtime.compiled import CACHES, compile_layers, find_layers, keep_compiled_code
from lmserve.runtime.merged_linear import hand_over_products, merge_linears
from lmserve.runtime.packed_lane import PackedLane
from tests.runtime.attached_lane import CountingBackend, attach, logits, norm_error
from tests.runtime.tiny_models import FAMILIES, build_tiny, in_dtype

ROWS = (2, 64, 5, 17, 32, 33, 4)
QUICK = ("llama", "qwen3", "gemma2")
EVERY_FAMILY = [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.inference_mode()
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_all_layers_and_all_numbers_of_rows_share_at_most_two_programs(family: str) -> None:
    lane, cache = attach(build_tiny(family))
    expected = {num_rows: logits(lane, num_rows) for num_rows in ROWS}
    places = [(layer.k.data_ptr(), layer.v.data_ptr()) for layer in cache.layers.values()]
    backend = CountingBackend()
    assert compile_layers(lane, backend=backend) == ""
    num_compiled, backend.num_runs = backend.num_compiled, 0
    assert 1 <= num_compiled <= 2
    for num_rows in ROWS:
        assert torch.allclose(logits(lane, num_rows), expected[num_rows], rtol=1e-4, atol=1e-5)
    assert backend.num_runs == len(ROWS) * len(find_layers(lane.model))
    assert backend.num_compiled == num_compiled
    assert places == [(layer.k.data_ptr(), layer.v.data_ptr()) for layer in cache.layers.values()]


@torch.inference_mode()
def test_the_stock_forward_runs_as_written_and_nothing_is_forgotten_over_it() -> None:
    lane, _ = attach(build_tiny("llama", num_hidden_layers=2))
    expected = logits(lane, 9)
    backend = CountingBackend()
    assert compile_layers(lane, backend=backend) == ""
    backend.num_runs = 0
    for _ in range(2):
        with lane.stock_attention():
            lane.model(input_ids=torch.arange(9)[None], use_cache=False)
        with lane.watched(lambda module, q, k, v, *_: q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])):
            lane.model(input_ids=torch.arange(9)[None], position_ids=torch.arange(9)[None], use_cache=False)
    assert backend.num_runs == 0
    assert torch.allclose(logits(lane, 9), expected, rtol=1e-4, atol=1e-5)
    assert (backend.num_runs, backend.num_compiled) == (2, 1)


@torch.inference_mode()
@pytest.mark.parametrize("handed_over", [False, True])
def test_layers_with_merged_products_share_a_program_too(handed_over: bool) -> None:
    model = build_tiny("llama", num_hidden_layers=3)
    expected = logits(attach(model)[0], 9)
    assert merge_linears(model, PackedLane(model).probe) == 6
    if handed_over:
        hand_over_products(model)
    lane, _ = attach(model)
    backend = CountingBackend()
    assert compile_layers(lane, backend=backend) == ""
    backend.num_runs = 0
    assert torch.allclose(logits(lane, 9), expected, rtol=1e-4, atol=1e-5)
    assert (backend.num_runs, backend.num_compiled) == (3, 1)


class Odd(nn.Module):
    """A layer's normalization, and something that depends on the rows."""

    def __init__(self, norm: nn.Module, kind: str) -> None:
        super().__init__()
        self.norm, self.kind = norm, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "values" and x.sum() > 0:
            x = x + 0.0
        if self.kind == "number" and x.shape[1] in {61, 7}:
            x = x + 0.0
        normed: Tensor = self.norm(x)
        return normed


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("values", "its layers are not compiled: Data-dependent branching"),
        ("number", "its layers are not compiled: each number of rows would have to be compiled for"),
    ],
)
def test_a_model_that_cannot_be_compiled_runs_as_it_is_written(kind: str, message: str) -> None:
    model = build_tiny("llama", num_hidden_layers=2)
    for layer in find_layers(attach(model)[0].model):
        layer.input_layernorm = Odd(layer.input_layernorm, kind)  # type: ignore[arg-type]
    lane, _ = attach(model)
    expected = logits(lane, 9)
    backend = CountingBackend()
    assert compile_layers(lane, backend=backend) == message
    assert lane.compiled is None
    backend.num_runs = 0
    assert torch.equal(logits(lane, 9), expected)
    assert backend.num_runs == 0


@torch.inference_mode()
def test_a_compiler_that_fails_is_no_error() -> None:
    def fail(module: Any, inputs: Any) -> Any:
        raise OSError("no C compiler")

    lane, _ = attach(build_tiny("llama", num_hidden_layers=1))
    assert "no C compiler" in compile_layers(lane, backend=fail)
    assert logits(lane, 9).shape[0] == 9


def test_what_no_program_fits_runs_as_it_is_written() -> None:
    with torch.inference_mode():
        lane, _ = attach(in_dtype(build_tiny("llama", num_hidden_layers=2), torch.bfloat16))
        expected = logits(lane, 9)
        backend = CountingBackend()
        assert compile_layers(lane, backend=backend) == ""
        backend.num_runs = 0
        assert norm_error(logits(lane, 9), expected) < 0.02
        assert backend.num_runs == 2
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)  # programs are for a number of threads
        try:
            assert norm_error(logits(lane, 9), expected) < 0.02
        finally:
            torch.set_num_threads(before)
    assert (backend.num_runs, backend.num_compiled) == (2, 1)


def test_layers_are_where_the_attention_is() -> None:
    model = build_tiny("qwen3-moe")
    model.experts_elsewhere = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    assert find_layers(model) == []
    PackedLane(model).probe()
    assert [type(layer).__name__ for layer in find_layers(model)] == ["Qwen3MoeDecoderLayer"] * 4


def test_of_several_lists_the_outermost_is_meant() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2)])
    outer = nn.ModuleList([nn.Sequential(inner)])
    give_handle(inner[0], 0)
    assert find_layers(nn.Sequential(outer)) == [outer[0]]


@torch.inference_mode()
def test_a_model_without_such_a_list_says_so() -> None:
    lane, _ = attach(build_tiny("llama", num_hidden_layers=1))
    stack = lane.model.model
    layers = stack.layers
    del stack.layers
    stack.layers = nn.Sequential(*layers)
    assert compile_layers(lane, backend="aot_eager") == "its layers are not compiled: they stand in no list"
    assert logits(lane, 5).shape[0] == 5


def test_compiled_code_is_kept_in_our_folder_unless_a_place_is_named() -> None:
    environ = {"LMSERVE_CACHE": "/somewhere", "TRITON_CACHE_DIR": "/mine"}
    keep_compiled_code(environ)
    assert environ == {
        "LMSERVE_CACHE": "/somewhere",
        "TRITON_CACHE_DIR": "/mine",
        "TORCHINDUCTOR_CACHE_DIR": "/somewhere/inductor",
    }
    environ = {"LMSERVE_CACHE": "/somewhere", "TORCHINDUCTOR_CACHE_DIR": default_cache_dir()}
    keep_compiled_code(environ)
    assert environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere/inductor"
    assert environ["TRITON_CACHE_DIR"] == "/somewhere/triton"


PROGRAM = """
import json, sys
from lmserve.runtime.compiled import compile_layers, keep_compiled_code
keep_compiled_code()
import torch
from torch._dynamo.utils import counters
from tests.runtime.attached_lane import attach, logits, norm_error
from tests.runtime.tiny_models import build_tiny
with torch.inference_mode():
    lane, _ = attach(build_tiny(sys.argv[1]))
    expected = {n: logits(lane, n) for n in (2, 9, 64)}
    reason = compile_layers(lane)
    errors = [norm_error(logits(lane, n), wanted) for n, wanted in expected.items()]
print(json.dumps({"reason": reason, "error": max(errors), **counters["aot_autograd"], **counters["inductor"]}))
"""


def start(cache: Path, family: str) -> dict[str, Any]:
    """What a fresh process compiles, and whether it is right."""
    environ = {name: value for name, value in os.environ.items() if name not in CACHES}
    environ |= {"LMSERVE_CACHE": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, family]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_second_start_finds_what_the_first_has_compiled(family: str, tmp_path: Path) -> None:
    first, second = start(tmp_path, family), start(tmp_path, family)
    num_kinds = {"llama": 1, "gemma2": 2}[family]
    for found in (first, second):
        assert found["reason"] == ""
        assert found["error"] < 1e-5
    assert (first["autograd_cache_miss"], first.get("autograd_cache_hit", 0)) == (num_kinds, 0)
    assert (second["autograd_cache_hit"], second.get("autograd_cache_miss", 0)) == (num_kinds, 0)
    assert second.get("fxgraph_cache_miss", 0) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"inductor"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_on_a_gpu_compiled_layers_give_what_the_layers_give() -> None:
    model = build_tiny("llama").to("cuda")  # type: ignore[arg-type]
    assert merge_linears(model, PackedLane(model).probe) == 8
    lane, _ = attach(model)
    expected = {num_rows: logits(lane, num_rows) for num_rows in ROWS}
    assert compile_layers(lane) == ""
    for num_rows in ROWS:
        assert norm_error(logits(lane, num_rows), expected[num_rows]) < 1e-3
