"""What the plan says against what a worker really takes."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from lmserve.config import ModelConfig
from lmserve.engine.messages import AddRequest, Encode
from lmserve.models.entry import ModelEntry
from lmserve.models.starter import STARTERS, find_source
from lmserve.runtime.interface import EncoderInput
from lmserve.sampling_params import SamplingParams
from tests.models.managing import manager_of, play

TOLERANCE = 0.15
NUM_SEQS = 16


async def fill(entry: ModelEntry) -> None:
    """Writes to every block of the KV cache, with steps as large as they get and a sampler that does its most."""
    assert entry.info is not None
    draw = random.Random(0)
    length = entry.info.num_blocks // NUM_SEQS * entry.info.block_size - 16

    async def ask(number: int) -> None:
        prompt = [draw.randrange(1000, 40000) for _ in range(length)]
        sampling = SamplingParams(max_tokens=8, temperature=1.0, top_p=0.9, ignore_eos=True)
        async for _ in entry.engine.generate(AddRequest(f"r{number}", prompt, sampling)):
            pass

    await asyncio.gather(*(ask(number) for number in range(NUM_SEQS)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_of_the_starter_model_is_what_its_worker_takes(starter_folder: Path, dtype: str) -> None:
    config = ModelConfig(
        model=str(starter_folder),
        model_id="starter",
        device="cpu",
        dtype=dtype,
        kv_cache_memory=128 * 2**20,
        max_num_seqs=NUM_SEQS,
    )
    manager = manager_of(config)

    async def scenario() -> None:
        manager.start()
        await manager.wait_loaded()
        entry = manager.resolve("starter")
        assert entry.plan is not None
        assert entry.info is not None
        assert entry.plan.kv_cache_bytes == entry.info.kv_cache_bytes
        assert entry.plan.max_model_len == entry.info.max_model_len
        assert entry.plan.dtype == entry.info.dtype
        await fill(entry)
        assert entry.resident_bytes == pytest.approx(entry.plan.total_bytes, rel=TOLERANCE)

    play(manager, scenario)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "quantization"), [("float32", "none"), ("bfloat16", "none"), ("float32", "int8")])
def test_the_plan_of_the_starter_for_embeddings_is_what_its_worker_takes(dtype: str, quantization: str) -> None:
    folder = find_source(STARTERS["all-minilm-l6-v2"])
    manager = manager_of(
        ModelConfig(model=str(folder), model_id="starter", device="cpu", dtype=dtype, quantization=quantization)
    )

    async def scenario() -> None:
        manager.start()
        await manager.wait_loaded()
        entry = manager.resolve("starter")
        assert entry.plan is not None
        assert entry.info is not None
        assert (entry.plan.kv_cache_bytes, entry.plan.max_model_len) == (0, entry.info.max_model_len)
        draw = random.Random(0)
        inputs = [EncoderInput(draw.choices(range(1000, 30000), k=draw.randint(1, 256))) for _ in range(80)]
        async for output in entry.engine.encode(Encode("r", inputs)):
            assert output.error is None
        assert entry.resident_bytes == pytest.approx(entry.plan.total_bytes, rel=TOLERANCE)

    play(manager, scenario)
