from __future__ import annotations

import psutil
import pytest
import torch

from lmserve.runtime.attention.base import CacheLayout
from lmserve.runtime.kv_cache import KVCache, LayerShape, block_bytes
from lmserve.runtime.pages import populate, zeros

CPU = torch.device("cpu")


def test_pools_have_the_layers_shapes_and_hold_zeros() -> None:
    shapes = {7: LayerShape(2, 16, 16), 8: LayerShape(4, 24, 16)}
    cache = KVCache(shapes, CacheLayout(4, 10, CPU, torch.bfloat16))
    assert cache.layers[7].k.shape == (44, 2, 16), "a scratch block follows the ten"
    assert cache.layers[8].k.shape == (44, 4, 24)
    assert cache.layers[8].v.shape == (44, 4, 16)
    assert {layer.k.dtype for layer in cache.layers.values()} == {torch.bfloat16}
    assert all(not layer.k.any() and not layer.v.any() for layer in cache.layers.values())


def test_block_bytes() -> None:
    shapes = {1: LayerShape(3, 64, 64), 2: LayerShape(3, 64, 64)}
    assert block_bytes(shapes, 16, torch.bfloat16) == 2 * 3 * 128 * 16 * 2


def test_pools_in_8_bits_take_half_the_memory() -> None:
    shapes = {1: LayerShape(3, 64, 32)}
    layout = CacheLayout(16, 10, CPU, torch.bfloat16, torch.float8_e4m3fn)
    layer = KVCache(shapes, layout).layers[1]
    assert layer.k.dtype == layer.v.dtype == torch.float8_e4m3fn
    assert not layer.k.float().any()
    assert (layer.k_scale, layer.v_scale) == (1.0, 1.0)
    assert layer.k.nbytes + layer.v.nbytes == 11 * block_bytes(shapes, 16, layout.pool_dtype)
    assert block_bytes(shapes, 16, layout.pool_dtype) * 2 == block_bytes(shapes, 16, layout.dtype)


@pytest.mark.skipif(not populate(zeros(4096)), reason="the system makes no memory ready: Linux 5.14 does")
def test_memory_is_made_ready_ahead_of_what_is_used_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmserve.runtime.kv_cache.READY_BYTES", 64 * 2**20)
    cache = KVCache({1: LayerShape(8, 128, 128)}, CacheLayout(16, 8192, CPU, torch.float32))
    cache.layers[1].k[5] = 7.0
    process = psutil.Process()
    taken = []
    for num_used in (0, 0, 8192 * 8):
        before = process.memory_info().rss
        while cache.get_ready(num_used):
            pass
        taken.append((process.memory_info().rss - before) / 2**20)
    assert taken[0] == pytest.approx(64, abs=8)
    assert taken[1] < 1, "it is there already"
    assert taken[2] == pytest.approx(512, abs=16), "half of the pools has been used, or so it was said"
    k = cache.layers[1].k
    assert (k[5] == 7).all()
    assert not k[:5].any()
    assert not k[6:70_000].any()


def test_a_system_that_makes_no_memory_ready_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache({1: LayerShape(2, 16, 16)}, CacheLayout(4, 10, CPU, torch.bfloat16))
    asked: list[int] = []
    monkeypatch.setattr("lmserve.runtime.kv_cache.populate", lambda array: asked.append(array.size))
    assert not cache.get_ready(0)
    assert not cache.get_ready(40)
    assert len(asked) == 1


def test_memory_is_taken_when_it_is_written_to() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    cache = KVCache({1: LayerShape(8, 128, 128)}, CacheLayout(16, 8192, CPU, torch.float32))
    assert process.memory_info().rss - before < 64 * 2**20
    assert sum(pool.nbytes for pool in (cache.layers[1].k, cache.layers[1].v)) > 2**30
