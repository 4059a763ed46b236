"""Engines whose decode steps are captured, on a CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from lmserve.engine.core import EngineCore
from lmserve.engine.scheduler import SchedulerConfig
from lmserve.runtime.attention.base import CacheLayout
from lmserve.runtime.attention.reference import ReferenceBackend
from lmserve.runtime.decode_step import DecodeSteps
from lmserve.runtime.graphs import Graphs
from lmserve.runtime.model_runner import PackedModelRunner
from tests.runtime import test_exactness as exactness
from tests.runtime.recorded_graph import RecordedGraphs


def captured(family: str, *, ahead: bool = False, **config: Any) -> tuple[EngineCore, DecodeSteps, RecordedGraphs]:
    runner, graphs = make_runner(family, **config), RecordedGraphs()
    steps = capture_steps(runner, graphs, ahead=ahead)
    return engine_around(runner), steps, graphs


def make_runner(family: str, **config: Any) -> PackedModelRunner:
    """The family's tiny model with the backend that can be captured."""
    return runner_of(exactness.make_engine(family, attention_backend="reference", self_check=False, **config))


def capture_steps(runner: PackedModelRunner, graphs: Graphs | None = None, *, ahead: bool = False) -> DecodeSteps:
    """Lets a runner that was made with the reference backend capture its decode steps. ``ahead``: its engine is to
    launch the next step before it collects the last one."""
    info = runner.info
    layout = CacheLayout(info.block_size, info.num_blocks, torch.device("cpu"), torch.float32)
    runner.use_graphs(ReferenceBackend(layout), graphs or RecordedGraphs())
    runner.info = replace(info, launches_ahead=ahead)
    assert runner._decode_steps is not None
    return runner._decode_steps


def runner_of(engine: EngineCore) -> PackedModelRunner:
    runner: Any = engine._runner
    assert isinstance(runner, PackedModelRunner)
    return runner


def engine_around(runner: PackedModelRunner, **config: Any) -> EngineCore:
    info = runner.info
    whole = {
        "max_num_seqs": info.max_num_seqs,
        "max_num_batched_tokens": info.max_num_batched_tokens,
        "max_model_len": info.max_model_len,
        "whole_images": info.images == "whole",
    }
    return EngineCore(runner, SchedulerConfig(**{**whole, **config}))


def sizes_used(steps: DecodeSteps) -> Counter[int]:
    """How often each size is replayed from now on."""
    used: Counter[int] = Counter()
    replay = steps._forwards.replay

    def watched(key: int) -> None:
        used[key] += 1
        replay(key)

    steps._forwards.replay = watched  # type: ignore[method-assign]
    return used
