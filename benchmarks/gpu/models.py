"""The runner that the worker would make of a model, around random weights."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.roofline import ModelSize
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import make_model, size_of
from lmserve.config import ModelConfig
from lmserve.engine.core import EngineCore, limits_of
from lmserve.runtime.build import assemble_runner
from lmserve.runtime.model_runner import PackedModelRunner


@dataclass(frozen=True, slots=True)
class Served:
    """A model as the worker would serve it."""

    runner: PackedModelRunner
    size: ModelSize
    seconds: float
    """From weights on the device to a runner that could serve."""
    said: tuple[str, ...]
    """What a person would have been told while it was made."""

    def engine(self, *, reads_at_once: bool = False) -> EngineCore:
        """A new engine around it, with the limits that the worker gives it. ``reads_at_once``: prompts are read without
        regard for those who decode meanwhile."""
        info = self.runner.info
        config = ModelConfig()
        return EngineCore(
            self.runner,
            limits_of(
                info,
                prefix_caching=config.prefix_caching,
                mixed_step_factor=math.inf if reads_at_once else config.mixed_step_factor,
            ),
        )


def serve(setting: Setting, **options: Any) -> Served:
    """Makes the setting's model and the runner around it, by the function that the worker calls once it has read the
    weights. ``options``: of ``ModelConfig``.

    The self-check is left out: it may refuse a model, and is measured instead (``steps``).
    """
    model = make_model(setting.model, setting.device, setting.dtype, tiny=setting.tiny)
    size = size_of(model)
    dtype = str(setting.dtype).removeprefix("torch.")
    chosen = {"max_num_seqs": 8 if setting.tiny else 256, "attention_backend": "auto"}
    if not setting.is_cuda:  # what is tried there is the benchmark: a native program has one of its own
        chosen |= {"attention_backend": setting.backend, "kv_cache_memory": 2**24}
    config = ModelConfig(
        model=setting.model, device=setting.device_type, dtype=dtype, self_check=False, **{**chosen, **options}
    )
    said: list[str] = []
    began = time.perf_counter()
    runner = assemble_runner(model, config, setting.dtype, lambda sentence, fraction: said.append(sentence))
    took = time.perf_counter() - began
    if setting.is_cuda:  # as the worker does, so that the collector does not walk the model during a step
        gc.collect()
        gc.freeze()
    return Served(runner, size, took, tuple(said))


def capture_all(served: Served) -> float:
    """Captures what the worker would capture in idle time; the seconds that it took."""
    began = time.perf_counter()
    while served.runner.use_idle_time():
        pass
    return time.perf_counter() - began
