"""What service and api need of the rooms below them: the models and one model's engine, as protocols."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from lmserve.config import ModelConfig
from lmserve.engine.messages import AddRequest, Encode
from lmserve.grammar.tokenizer_text import TokenizerText
from lmserve.models.facts import ModelFacts
from lmserve.outputs import EncoderOutput, RequestOutput
from lmserve.runtime.interface import RunnerInfo, Task


class Engine(Protocol):
    """One model's engine, seen from the API process."""

    @property
    def info(self) -> RunnerInfo: ...

    def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        """The request's news, until each of its choices has a finish reason. Closing the generator cancels the request.

        Raises:
            Unavailable: the engine does not take the request now.
            WorkerDied: the worker ended meanwhile.
        """
        ...

    def encode(self, request: Encode) -> AsyncGenerator[EncoderOutput, None]:
        """An encoder's news of the request, until each of its inputs is done or it has failed. As ``generate``."""
        ...

    @property
    def knows_vocabulary(self) -> bool:
        """Whether ``use_vocabulary`` has been called."""
        ...

    def use_vocabulary(self, text: TokenizerText) -> None:
        """Has to be called once before the first request with a grammar. Raises ``InvalidRequest``."""
        ...

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Stop a request, or one of its choices; unknown ones are ignored."""
        ...


class ModelEntry(Protocol):
    """One model that the server knows."""

    @property
    def model_id(self) -> str: ...

    @property
    def path(self) -> str:
        """Local folder, GGUF file or hub name."""
        ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def sampling(self) -> Mapping[str, float]:
        """What the model's preset says, by the names in a generation config."""
        ...

    @property
    def created(self) -> int:
        """Unix time in seconds."""
        ...

    @property
    def state(self) -> str:
        """not-loaded, loading, loaded or failed."""
        ...

    @property
    def stage(self) -> str:
        """What a loading model is doing, for people."""
        ...

    @property
    def progress(self) -> float:
        """Of the load, in [0, 1]."""
        ...

    @property
    def facts(self) -> ModelFacts | None:
        """What its files say; None where they are not on this machine."""
        ...

    @property
    def capabilities(self) -> Sequence[str]:
        """Out of completion, chat, tools, vision, embeddings, rerank."""
        ...

    @property
    def info(self) -> RunnerInfo | None:
        """Known once the model is loaded."""
        ...

    @property
    def engine(self) -> Engine:
        """Raises ``NotReady`` while the model cannot be served."""
        ...


class Models(Protocol):
    """The models of this server."""

    def entries(self) -> Sequence[ModelEntry]: ...

    @property
    def just_in_time(self) -> bool:
        """Whether ``use`` loads models."""
        ...

    def resolve(self, name: str | None, task: Task | None = None) -> ModelEntry:
        """The model that serves a name for a task, loaded or not. Raises ``ModelNotFound``."""
        ...

    def use(
        self, name: str | None, ttl_seconds: float | None = None, task: Task | None = None
    ) -> AbstractAsyncContextManager[ModelEntry]:
        """The model that serves a name for a task, loaded, and so until the context ends.

        ``ttl_seconds``: the idle time that it has afterwards; infinity for ever, None as it is.
        Raises ``ModelNotFound``, ``InvalidRequest`` if the model is not for that, or why it cannot be loaded.
        """
        ...

    async def refresh(self) -> None:
        """Look again which models there are."""
        ...

    def problem(self) -> str | None:
        """Why the server cannot answer now, or None."""
        ...
