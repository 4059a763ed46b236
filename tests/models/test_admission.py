"""Models that make room for others, and those that do not: real workers behind the manager."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from lmserve.config import ModelSetup
from lmserve.errors import (
    InsufficientMemory,
)
from lmserve.models.entry import LoadOptions
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
