"""The models that the server knows, each under the names that clients use."""

from __future__ import annotations

import asyncio
import math
import re
import time
from dataclasses import replace
from pathlib import Path

from lmserve.config import Config
from lmserve.errors import InvalidRequest, ModelNotFound
from lmserve.models.entry import ModelEntry
from lmserve.models.names import find_entry, is_called
from lmserve.models.registry import KnownModel, Registry
from lmserve.models.scan import hub_cache_folder
from lmserve.runtime.interface import Task

REFRESH_SECONDS = 2.0
"""How long what was found on the disk is good for those who list it."""
OTHER_NAME_SECONDS = 30.0
"""The same, for requests with a name that no model has, which the loaded one serves."""
_IDENTIFIER = re.compile(r"[\w.:@/-]{1,200}")


class Entries:
    """Owns an entry for each known model, and for each further instance that somebody named."""

    def __init__(self, config: Config, starter_cache: Path) -> None:
        self._config = config
        self._registry = Registry(
            [(model.model_id, model.model) for model in config.models],
            config.aliases,
            models_dir=Path(config.models_dir) if config.models_dir else None,
            hub_cache=hub_cache_folder(),
            starter_cache=starter_cache,
        )
        self._entries: dict[str, ModelEntry] = {}
        self._refreshed_at = -math.inf
        self._refreshing = asyncio.Lock()
        self._registry.refresh()
        self._take_known()

    def all(self) -> list[ModelEntry]:
        return list(self._entries.values())

    def configured(self) -> list[ModelEntry]:
        """Those that are loaded at the start."""
        return [self._entries[config.model_id.lower()] for config in self._config.models]

    def resolve(self, name: str | None, task: Task | None = None) -> ModelEntry:
        """The one a client means (``find_entry``). Raises ModelNotFound with the names there are."""
        return find_entry(self.all(), name, strict=self._config.strict_model_names, task=task)

    async def find(self, name: str | None, task: Task | None = None) -> ModelEntry:
        """As ``resolve``; looks on the disk before it gives up, or takes the loaded model for one of another name."""
        try:
            entry = self.resolve(name, task)
            if name is None or is_called(entry, name):
                return entry
            await self.refresh(OTHER_NAME_SECONDS)
        except ModelNotFound:
            await self.refresh()
        return self.resolve(name, task)

    async def refresh(self, max_age: float = REFRESH_SECONDS) -> None:
        """Look again which models there are on the disk, unless that was done less than ``max_age`` seconds ago."""
        async with self._refreshing:
            if time.monotonic() - self._refreshed_at >= max_age:
                await asyncio.to_thread(self._registry.refresh)
                self._refreshed_at = time.monotonic()
                self._take_known()

    def instance(self, entry: ModelEntry, identifier: str | None) -> ModelEntry:
        """The entry itself, or another one of the same model for another identifier.

        Raises:
            InvalidRequest: it cannot be one, or another model has it.
        """
        if identifier is None or identifier.lower() == entry.model_id.lower():
            return entry
        if not _IDENTIFIER.fullmatch(identifier):
            raise InvalidRequest(
                "identifier must have 1 to 200 letters, digits or characters of . _ - : @ /", "identifier"
            )
        other = self._entries.get(identifier.lower())
        if other is not None and other.known.location != entry.known.location:
            raise InvalidRequest(f"identifier: another model is called {other.model_id}.", "identifier")
        if other is None:
            other = self._entries[identifier.lower()] = self.new(entry.known, identifier)
        return other

    def new(self, model: KnownModel, model_id: str | None = None) -> ModelEntry:
        """An entry as the server is configured, on no list. ``model_id``: the name of a further instance."""
        setup = self._config.setup(model_id or model.model_id, model.location)
        configured = {config.model_id.lower(): config for config in self._config.models}
        config = configured.get(setup.config.model_id.lower(), setup.config)
        if model.source not in ("configured", "alias"):  # nobody has vouched for the code of what merely lies there
            config = replace(config, trust_remote_code=False)
        return ModelEntry(model, config, setup.sampling)

    def put_back(self, entry: ModelEntry) -> None:
        """An entry that is loaded no more is as if it had never been; one with a name of its own goes."""
        entry.config = self.new(entry.known, entry.model_id).config
        name = entry.model_id.lower()
        if self._registry.find(name) is None and not entry.num_users and self._entries.get(name) is entry:
            del self._entries[name]

    def _take_known(self) -> None:
        """Entries for what is known now; those that nobody uses and that are known no more go."""
        known = {model.model_id.lower(): model for model in self._registry.models()}
        for name, model in known.items():
            entry = self._entries.get(name)
            if entry is None:
                self._entries[name] = self.new(model)
            elif entry.known.location == model.location:
                entry.known = model
            elif not entry.is_live and not entry.num_users:
                self._entries[name] = self.new(model)
        for name, entry in list(self._entries.items()):
            if name not in known and not entry.is_live and not entry.num_users:
                del self._entries[name]
