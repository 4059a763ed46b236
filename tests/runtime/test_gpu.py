"""What is done for GPUs, done on a CPU: the same functions in the same order, with recorded graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.attention import backend_class
from lmserve.runtime.attention.base import CacheLayout
from lmserve.runtime.attention.reference import ReferenceBackend
from lmserve.runtime.build import assemble_runner
from lmserve.runtime.compiled import compile_layers
from lmserve.runtime.gpu import check_cache_format, rehearse, rework
from lmserve.runtime.kv_cache import KVCache
from lmserve.runtime.merged_linear import MergedLinear
from lmserve.runtime.packed_lane import PackedLane
from lmserve.runtime.self_check import check_lane
from tests.runtime import test_exactness as exactness
from tests.runtime.captured_engine import runner_of
from tests.runtime.test_exactness import generated, greedy, prompts
from tests.runtime.tiny_models import VOCAB_SIZE, build_tiny

CPU = torch.device("cpu")


def config(**options: Any) -> ModelConfig:
    return ModelConfig(**{"model": "tiny", "max_num_seqs": 4, "max_num_batched_tokens": 96, "block_size": 8, **options})


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral"])
def test_a_reworked_model_is_exact_in_the_cache_of_the_rehearsal(family: str) -> None:
    with torch.inference_mode():
        lane = PackedLane(build_tiny(family))
        lane.probe()
        rework(lane, None)
        assert any(isinstance(module, MergedLinear) for module in lane.model.modules())
        expected_bytes = rehearse(lane, config(), torch.float32, ReferenceBackend, VOCAB_SIZE)
        assert expected_bytes > 0
        assert lane.num_slots >= 96
        assert compile_layers(lane, backend="aot_eager") == "" or family == "mixtral"
        result = check_lane(lane, VOCAB_SIZE, 8, lane.num_slots // 4, torch.float32)
        assert result.error < 1e-5


def test_keys_and_values_in_8_bits_change_little() -> None:
    """The whole build, and answers of which the first tokens are those of the model."""
    engine = exactness.make_engine("llama", attention_backend="reference", kv_cache_dtype="fp8")
    plain = exactness.make_engine("llama", attention_backend="reference")
    eight, others = runner_of(engine), runner_of(plain)
    lanes: list[Any] = [runner._lane for runner in (eight, others)]
    pool, other = (lane._caches[0].k for lane in lanes)
    assert (pool.dtype, other.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert eight.info.kv_cache_bytes / eight.info.num_blocks * 4 == others.info.kv_cache_bytes / others.info.num_blocks
    answers = exactness.run(engine, [(prompt, greedy()) for prompt in prompts()])
    expected = [generated("llama", prompt) for prompt in prompts()]
    assert len(answers) == len(expected)
    assert sum(a[0] == b[0] for a, b in zip(answers, expected, strict=True)) > len(expected) / 2


def test_8_bits_are_for_backends_that_read_them() -> None:
    assert check_cache_format(config(), backend_class("sdpa", "cpu"), CPU) is None
    for name in ("sdpa", "cpu"):
        with pytest.raises(ModelLoadFailed, match=f"kv_cache_dtype fp8 is not for the attention backend {name}"):
            check_cache_format(config(kv_cache_dtype="fp8"), backend_class(name, "cpu"), CPU)
    with pytest.raises(ModelLoadFailed, match="kv_cache_dtype fp8"):
        assemble_runner(build_tiny("llama"), config(kv_cache_dtype="fp8"), torch.float32)
    assert check_cache_format(config(kv_cache_dtype="fp8"), ReferenceBackend, CPU) == torch.float8_e4m3fn


def test_an_expectation_holds_where_the_device_does_not_tell() -> None:
    lane = PackedLane(build_tiny("llama"))
    lane.probe()
    few, many = (
        rehearse(lane, config(max_num_batched_tokens=count), torch.float32, ReferenceBackend, VOCAB_SIZE)
        for count in (64, 640)
    )
    assert few < many
    layout = CacheLayout(8, 4, CPU, torch.float32)
    lane.attach(KVCache(lane.shapes, layout), ReferenceBackend(layout))
    assert lane.num_slots == 32
