"""One model as the server runs it, or could run it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Literal, cast

from lmserve.config import ModelConfig, ModelSetup
from lmserve.engine.async_engine import AsyncEngine
from lmserve.errors import InvalidRequest, ModelLoadFailed, NotReady
from lmserve.models.facts import ModelFacts, ModelType
from lmserve.models.registry import KnownModel
from lmserve.models.usage import Watched, WorkerUsage
from lmserve.models.worker_process import Worker
from lmserve.runtime.interface import MemoryPlan, RunnerInfo, Task

RETRY_SECONDS = 2.0

State = Literal["not-loaded", "loading", "loaded", "failed"]


TASKS: Mapping[ModelType, Task] = MappingProxyType(
    {"llm": "generate", "vlm": "generate", "embeddings": "embed", "reranker": "score"}
)
DOES: Mapping[Task | None, str] = MappingProxyType(
    {"generate": "is a language model", "embed": "makes embeddings", "score": "scores pairs of texts"}
)
CANNOT: Mapping[Task, str] = MappingProxyType(
    {"generate": "cannot generate text", "embed": "makes no embeddings", "score": "scores no pairs of texts"}
)


class Origin(Enum):
    """Who wanted a model loaded."""

    START = "start"
    PERSON = "person"
    REQUEST = "request"
    """Just in time: only these are unloaded by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What a person may want of one load. None: as the server is configured."""

    identifier: str | None = None
    ttl_seconds: float | None = None
    """None: never."""
    context_length: int | None = None
    parallel: int | None = None
    eval_batch_size: int | None = None
    force: bool = False
    """Load also what the memory plan says does not fit."""

    def configure(self, config: ModelConfig) -> ModelConfig:
        """The configuration with what is asked for."""
        return replace(
            config,
            max_model_len=self.context_length or config.max_model_len,
            max_num_seqs=self.parallel or config.max_num_seqs,
            max_num_batched_tokens=self.eval_batch_size or config.max_num_batched_tokens,
        )


@dataclass(slots=True, eq=False)
class ModelEntry:
    """A model under the name that clients use. Its state is the manager's to change."""

    known: KnownModel
    config: ModelConfig
    sampling: Mapping[str, float]
    """What its preset says, by the names in a generation config."""
    created: int = field(default_factory=lambda: int(time.time()))
    state: State = "not-loaded"
    origin: Origin = Origin.START
    ttl_seconds: float | None = None
    stage: str = ""
    """What a loading model is doing, for people."""
    progress: float = 0.0
    failure: str | None = None
    """Why it is failed, or why its last load or its last worker ended."""
    restarts: int = 0
    worker: Worker | None = None
    """From the start of its process on."""
    plan: MemoryPlan | None = None
    """What it may take in the end, from before its weights are read."""
    usage: WorkerUsage | None = None
    """What its worker has of the device, as it was last looked at; None: it was not."""
    num_users: int = 0
    """Requests that need it loaded: none of them ends with it."""
    idle_since: float = field(default_factory=time.monotonic)
    """When the last of them ended."""

    @classmethod
    def of(cls, known: KnownModel, setup: ModelSetup) -> ModelEntry:
        return cls(known, setup.config, setup.sampling)

    @property
    def model_id(self) -> str:
        return self.config.model_id

    @property
    def path(self) -> str:
        """Local folder, GGUF file or hub name."""
        return self.config.model

    @property
    def facts(self) -> ModelFacts | None:
        return self.known.facts

    @property
    def info(self) -> RunnerInfo | None:
        return None if self.worker is None or self.state != "loaded" else self.worker.engine.info

    @property
    def capabilities(self) -> tuple[str, ...]:
        """As its files say, and as loading has shown."""
        found = () if self.facts is None else self.facts.capabilities
        blind = self.info is not None and self.info.images == "none"
        return tuple(each for each in found if not (blind and each == "vision"))

    @property
    def is_live(self) -> bool:
        """Whether it is loaded, or is meant to be."""
        return self.state != "not-loaded"

    @property
    def is_just_in_time(self) -> bool:
        return self.origin is Origin.REQUEST

    @property
    def is_idle(self) -> bool:
        return self.state == "loaded" and self.num_users == 0

    @property
    def ttl_left_seconds(self) -> float | None:
        """Until it is unloaded; None: not before somebody asks for it, or while a request runs."""
        if self.ttl_seconds is None or not self.is_idle:
            return None
        return max(0.0, self.idle_since + self.ttl_seconds - time.monotonic())

    @property
    def resident_bytes(self) -> int:
        """Memory of its process now."""
        return 0 if self.worker is None else self.worker.resident_bytes

    @property
    def own_bytes(self) -> int:
        """Memory of its device that its process has, as far as that can be told."""
        if self.usage is None or self.usage.device is None or self.usage.device.name.startswith("cpu"):
            return self.resident_bytes
        return self.usage.own_bytes

    @property
    def watched(self) -> Watched | None:
        """Its worker, as who looks at devices wants to know it; None: there is none."""
        if self.worker is None:
            return None
        pid, info = self.worker.process.pid, self.info
        if info is not None:
            return Watched(pid, info.device, info.device_memory)
        return Watched(pid, "" if self.plan is None else self.plan.device)

    @property
    def is_busy(self) -> bool:
        """Whether its worker has something to do."""
        return self.worker is not None and (self.state == "loading" or self.num_users > 0)

    @property
    def promised_bytes(self) -> int:
        """What it has not taken yet of what it may take.

        A CPU gives the KV cache's pages when they are first written to. Of a GPU's memory large steps take some for a
        while, and those that are captured later for good.
        """
        if self.plan is None:
            return 0
        if self.plan.device.startswith("cpu"):
            return max(0, self.plan.total_bytes - self.resident_bytes)
        has = self.usage.own_bytes if self.usage is not None and self.usage.device is not None else 0
        info = self.info
        if info is None:
            return max(0, self.plan.peak_bytes - has)
        if info.device_memory is not None:
            has = max(has, info.device_memory.own_bytes)
        will_have = info.weight_bytes + info.kv_cache_bytes + self.plan.activation_bytes + self.plan.fixed_bytes
        return max(0, will_have - has) if has else 0

    @property
    def task(self) -> Task | None:
        """What it does, as its configuration, its worker or its files say; None: not known yet."""
        if self.config.task != "auto":
            return cast(Task, self.config.task)
        if self.info is not None:
            return self.info.task
        return None if self.facts is None else TASKS[self.facts.type]

    @property
    def worker_config(self) -> ModelConfig:
        """What its worker is told: what the files say here, it need not find out."""
        return replace(self.config, task=self.task or "auto")

    def check_servable(self, task: Task | None = None) -> None:
        """
        Raises:
            ModelLoadFailed: its files are known to be of no use.
            InvalidRequest: it is a model, and none for this task.
        """
        if self.known.problem is not None and self.facts is None:
            raise ModelLoadFailed(f"Model {self.model_id} cannot be loaded: {self.known.problem}")
        if task is not None and self.task not in (None, task):
            raise InvalidRequest(f"Model {self.model_id} {DOES[self.task]}: it {CANNOT[task]}.", "model")

    @property
    def engine(self) -> AsyncEngine:
        """Raises NotReady unless the model is loaded."""
        if self.worker is None or self.state != "loaded":
            reason = f": {self.failure}" if self.failure else f" ({self.stage})" if self.stage else ""
            raise NotReady(f"Model {self.model_id} is {self.state}{reason}", retry_after=RETRY_SECONDS)
        return self.worker.engine
