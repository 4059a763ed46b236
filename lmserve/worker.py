"""The worker process: the composition root of engine and runtime.

Started as ``python -m lmserve.worker FD`` with one end of a socket pair; everything else arrives in the ``Load``
message. It ends when told to, when the socket closes, or when the process that started it dies.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace

from lmserve.config import ModelConfig
from lmserve.engine.connection import ConnectionClosed, WorkerConnection
from lmserve.engine.core import EngineCore, limits_of
from lmserve.engine.encoder_core import EncoderCore
from lmserve.engine.loop import run_engine
from lmserve.engine.messages import (
    PROTOCOL_VERSION,
    Hello,
    Load,
    LoadFailed,
    LoadProgress,
    Plan,
    Planned,
    Ready,
    Shutdown,
)
from lmserve.engine.scheduler import SchedulerConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.build import build_runner
from lmserve.runtime.encoder.build import build_encoder
from lmserve.runtime.encoder.plan import plan_encoder
from lmserve.runtime.encoder.recipe import choose_task
from lmserve.runtime.interface import EncoderRunner, FatalRunnerError, MemoryPlan, ModelRunner, RunnerInfo
from lmserve.runtime.memory import device_memory
from lmserve.runtime.memory_plan import plan_memory

PR_SET_PDEATHSIG = 1


def main(fd: int) -> int:
    """Returns the exit code: 0 for an ordered end, 1 for a device fault, 3 for a model that cannot be loaded."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the API process's to handle: it drains first
    connection = WorkerConnection(socket.socket(fileno=fd))
    try:
        connection.send(Hello(PROTOCOL_VERSION, os.getpid()))
        prepared = _prepare(connection)
        if prepared is None:
            return 3
        config, runner = prepared
        gc.collect()
        gc.freeze()  # the model's objects never die: the collector need not walk them during a step
        _give_memory_back()
        connection.send(Ready(replace(runner.info, device_memory=device_memory(runner.info.device))))
        if isinstance(runner, EncoderRunner):
            run_engine(EncoderCore(runner), connection)
        else:
            run_engine(EngineCore(runner, _limits(config, runner.info)), connection)
    except ConnectionClosed:
        return 0
    except FatalRunnerError:
        traceback.print_exc()
        return 1
    return 0


def _limits(config: ModelConfig, info: RunnerInfo) -> SchedulerConfig:
    return limits_of(info, prefix_caching=config.prefix_caching, mixed_step_factor=config.mixed_step_factor)


def _prepare(connection: WorkerConnection) -> tuple[ModelConfig, ModelRunner | EncoderRunner] | None:
    """Says what the model would take, as often as it is asked, and loads it. None: it cannot, and has said so.

    Raises:
        ConnectionClosed: nobody wants it any more.
    """
    model = ""
    try:
        while True:
            message = connection.receive()
            if isinstance(message, Shutdown):
                raise ConnectionClosed
            assert isinstance(message, Plan | Load), type(message).__name__
            config = ModelConfig(**message.options)  # type: ignore[arg-type]  # checked where it was made
            model = config.model
            if isinstance(message, Load):
                reserved, say = message.reserved_bytes, _progress_to(connection)
                return config, _build(config, say, reserved)
            connection.send(Planned(_plan(config, message.reserved_bytes)))
    except ModelLoadFailed as error:
        connection.send(LoadFailed(str(error)))
    except ConnectionClosed:
        raise
    except Exception as error:
        traceback.print_exc()
        connection.send(LoadFailed(f"{model}: {type(error).__name__}: {error}"))
    return None


def _plan(config: ModelConfig, reserved_bytes: int) -> MemoryPlan:
    task = choose_task(config)
    return plan_memory(config, reserved_bytes) if task == "generate" else plan_encoder(config, task, reserved_bytes)


def _build(config: ModelConfig, say: Callable[[str, float], None], reserved: int) -> ModelRunner | EncoderRunner:
    task = choose_task(config)
    if task != "generate":
        return build_encoder(config, task, say)
    return build_runner(config, say, reserved_bytes=reserved)


def _progress_to(connection: WorkerConnection) -> Callable[[str, float], None]:
    return lambda stage, fraction: connection.send(LoadProgress(stage, fraction))


def _give_memory_back() -> None:
    """What loading took for a while and the C library keeps for later; glibc alone has a word for it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _die_with_parent() -> None:
    """On Linux the kernel ends this process when its parent dies, even in the middle of loading."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
