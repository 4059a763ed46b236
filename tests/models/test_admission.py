"""Models that make room for others, and those that do not: real workers behind the manager."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lmserve.config import ModelSetup
from lmserve.errors import InsufficientMemory
from lmserve.models.admission import Admission
from lmserve.models.entry import LoadOptions, ModelEntry, Origin
from lmserve.models.usage import DeviceUsage, WorkerUsage
from lmserve.runtime.interface import DeviceMemory, MemoryPlan
from tests.models.managing import Recorder, ask, lazy, play, setup_tiny


class Crowded:
    """A machine on which two of three models fit, by the KV cache that they ask for."""

    def __init__(self) -> None:
        self.share = int(psutil.virtual_memory().available * 0.4)

    def __call__(self, model_id: str, model: str) -> ModelSetup:
        return setup_tiny(model_id, model, kv_cache_memory=self.share, max_num_seqs=4096, max_model_len=10**6)


@pytest.mark.slow
def test_the_least_recently_used_idle_model_makes_room(tiny_folder: Path, recorder: Recorder) -> None:
    manager = lazy(tiny_folder, recorder, ("a", "b", "c"), setup=Crowded())

    async def scenario() -> None:
        for name in ("a", "b"):
            await ask(manager, name)
        await ask(manager, "a")
        estimate = await manager.estimate("c", LoadOptions())
        assert (estimate.leaving, estimate.fits) == (["b"], True)
        assert "once b is unloaded" in estimate.message
        await ask(manager, "c")
        assert recorder.gone == ["b"]
        assert {e.model_id for e in manager.entries() if e.is_live} == {"a", "c"}

    play(manager, scenario)


@pytest.mark.slow
def test_nothing_makes_room_that_is_in_use_or_a_persons_and_the_refusal_has_the_numbers(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder, None, ("a", "b", "c"), setup=Crowded())

    async def scenario() -> None:
        await manager.load("a", LoadOptions())
        async with manager.use("b"):
            with pytest.raises(InsufficientMemory) as refused:
                await ask(manager, "c")
            words = str(refused.value)
            for fact in ("Model c needs", "weights", "KV cache", "activations", "fixed", "are free"):
                assert fact in words
            assert "a (" in words
            assert "loaded by a person" in words
            assert "in use" in words
            assert manager.resolve("c").state == "not-loaded"
            estimate = await manager.estimate("c", LoadOptions())
            assert not estimate.fits
            assert (await manager.load("c", LoadOptions(force=True))).state == "loaded"

    play(manager, scenario)


GIB = 2**30


def on_gpu(name: str, weights: int, kv_cache: int, *, free: int, share: int = 72, **terms: int) -> MemoryPlan:
    """In GiB. A device of 80, of which one model may have 72."""
    return MemoryPlan(
        device=name,
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=64,
        weight_bytes=weights * GIB,
        kv_cache_bytes=kv_cache * GIB,
        kv_cache_tokens=1000,
        activation_bytes=2 * GIB,
        fixed_bytes=0,
        free_bytes=free * GIB,
        share_bytes=share * GIB,
        **{term: count * GIB for term, count in terms.items()},
    )


async def nobody_goes(entry: ModelEntry) -> None:
    raise AssertionError(f"{entry.model_id} was unloaded")


def test_on_a_gpu_one_goes_only_if_that_helps_and_who_is_on_another_device_stays(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder, None, ("large", "beside", "newcomer"))
    large, beside, newcomer = (manager.resolve(name) for name in ("large", "beside", "newcomer"))
    for entry in (large, beside):
        entry.state, entry.origin = "loaded", Origin.REQUEST
    large.plan = on_gpu("cuda:0", 16, 54, free=80)
    beside.plan = replace(on_gpu("cpu", 1, 1, free=80), share_bytes=0)
    admission = Admission(manager.entries, nobody_goes)

    second = on_gpu("cuda", 16, 4, free=8)
    assert admission.leaving(newcomer, second) == [large]
    assert "are free of the 72.00 GiB that one model may have: it fits once large is" in (
        admission.explain(newcomer, second)
    )
    too_large = on_gpu("cuda", 71, 4, free=8)
    assert admission.leaving(newcomer, too_large) == [], "its share is too small, whoever goes"
    words = admission.explain(newcomer, too_large)
    assert "it does not fit. Loaded: large (72.00 GiB, idle). gpu_memory_utilization says" in words
    large.num_users = 1
    words = admission.explain(newcomer, second)
    assert words.endswith("With a lower gpu_memory_utilization or kv_cache_memory they would leave more.")
    assert "beside" not in words


def test_what_is_taken_while_weights_are_brought_into_fewer_bits_counts(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder, None, ("newcomer",))
    admission = Admission(manager.entries, nobody_goes)
    plan = on_gpu("cuda", 8, 4, free=20, loading_bytes=28)
    assert (plan.total_bytes, plan.fits) == (14 * GIB, False)
    words = admission.explain(manager.resolve("newcomer"), plan)
    assert "28.00 GiB while its weights are brought into fewer bits, and 20.00 GiB are free" in words
    assert on_gpu("cuda", 8, 4, free=30, loading_bytes=28).fits


def test_what_a_model_on_another_device_may_still_take_is_not_kept_free_here(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder, None, ("beside", "newcomer"))
    beside, newcomer = manager.resolve("beside"), manager.resolve("newcomer")
    beside.plan, beside.state = on_gpu("cuda", 16, 4, free=80), "loading"
    admission = Admission(manager.entries, nobody_goes)
    assert newcomer.config.device == "cpu"
    assert admission.reserved_bytes(newcomer) == 0
    newcomer.config = replace(newcomer.config, device="auto")
    assert admission.reserved_bytes(newcomer) == 22 * GIB, "it may be there"


def test_a_loaded_model_on_a_gpu_keeps_what_its_steps_will_take(tiny_folder: Path) -> None:
    """Of what its largest step and captured ones take, it has nothing right after its load."""
    manager = lazy(tiny_folder)

    async def scenario() -> None:
        entry = await manager.load("tiny", LoadOptions())
        assert entry.worker is not None
        engine = entry.worker.engine
        engine.info = replace(
            engine.info,
            device="cuda:0",
            weight_bytes=16 * GIB,
            kv_cache_bytes=40 * GIB,
            device_memory=DeviceMemory(80 * GIB, 57 * GIB),
        )
        entry.plan, entry.usage = replace(on_gpu("cuda", 16, 54, free=80), fixed_bytes=GIB), None
        assert entry.promised_bytes == (16 + 40 + 2 + 1 - 57) * GIB
        device = DeviceUsage(name="cuda:0", total_bytes=80 * GIB)
        entry.usage = WorkerUsage(device=device, own_bytes=58 * GIB, cpu=0.0)
        assert entry.promised_bytes == GIB
        entry.usage = replace(entry.usage, own_bytes=60 * GIB)
        assert entry.promised_bytes == 0

    play(manager, scenario)
