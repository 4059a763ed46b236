"""The models' tokenizers and templates: read once each, used in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lmserve.errors import ModelLoadFailed
from lmserve.grammar.proof import GrammarProver
from lmserve.service.chat_template import ChatTemplate
from lmserve.service.model_text import ModelText
from lmserve.service.protocols import ModelEntry

T = TypeVar("T")
TEXT_THREADS = 2
"""Encoding releases the interpreter's lock; templates do not, and more threads would not make them faster."""


def load_model_text(entry: ModelEntry) -> ModelText:
    """The text side of a model, read from where the model is."""
    config = entry.config
    return ModelText.load(entry.path, trust_remote_code=config.trust_remote_code, revision=config.revision)


class Texts:
    """Owns the models' tokenizers, and the threads that render and encode: other requests go on meanwhile."""

    def __init__(self, load_text: Callable[[ModelEntry], ModelText] = load_model_text) -> None:
        self._load_text = load_text
        self._threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._loaders = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="tokenizer")
        """Their own: a tokenizer that takes its time holds up no request for another model."""
        self.prover = GrammarProver()
        self._texts: dict[str, asyncio.Task[tuple[ModelText, ChatTemplate]]] = {}

    async def load(self, entries: Iterable[ModelEntry]) -> None:
        """Load these models' tokenizers.

        Raises:
            ModelLoadFailed: one of them cannot be read.
        """
        await asyncio.gather(*(self.of(entry) for entry in entries))

    def forget(self, entry: ModelEntry) -> None:
        """Give up what is kept for a model that is loaded no more."""
        self._texts.pop(entry.model_id, None)

    async def of(self, entry: ModelEntry) -> tuple[ModelText, ChatTemplate]:
        """Loaded by whoever comes first; a failure is not remembered. Raises as ``load``."""
        loading = self._texts.get(entry.model_id)
        if loading is None:
            loading = self._texts[entry.model_id] = asyncio.create_task(self._load(entry))
        return await asyncio.shield(loading)

    async def reads_images(self, entry: ModelEntry) -> bool:
        """Whether the model has an image encoder. Raises as ``load``."""
        text, _ = await self.of(entry)
        return text.reads_images

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Its result."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """End the threads. Work that has begun is not waited for."""
        for threads in (self._threads, self._loaders):
            threads.shutdown(wait=False, cancel_futures=True)
        self.prover.close()

    async def _load(self, entry: ModelEntry) -> tuple[ModelText, ChatTemplate]:
        try:
            text = await asyncio.get_running_loop().run_in_executor(self._loaders, self._load_text, entry)
        except Exception as error:
            self.forget(entry)
            raise ModelLoadFailed(f"The tokenizer of {entry.model_id} cannot be loaded: {error}") from error
        return text, ChatTemplate(text)
