"""Which models the server knows of, loaded or not: what is configured, aliases, and what lies on this machine."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lmserve.errors import ConfigError
from lmserve.models.facts import ModelFacts, NotAModel, gguf_parts, read_facts
from lmserve.models.scan import Found, scan_hub_cache, scan_models_dir
from lmserve.models.starter import STARTERS, find_source, made_folder

Source = Literal["configured", "alias", "models_dir", "hub_cache", "starter"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_Signature = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model that could be loaded, or that says why not."""

    model_id: str
    """What clients call it, in lower case."""
    location: str
    """Local folder, GGUF file or hub name; a starter's name until its folder is made."""
    source: Source
    facts: ModelFacts | None
    """None: not on this machine, or not readable."""
    problem: str | None
    """Why a model that should be on this machine cannot be served: a sentence."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a model is."""

    location: str
    path: Path | None
    """What its facts are read from; None: nothing is on this machine."""
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An entry before it is known whether another hides it."""

    model: KnownModel
    real_path: str | None


class Registry:
    """Owns the list of known models, as of the last ``refresh``; before the first one it is empty.

    An id is the first source's that has it, in the order configured, alias, models_dir, hub_cache, starter. A model
    that several sources find is listed once, under the first one's name, and found under all of them; an alias is a
    further entry. Any thread may call any method.
    """

    def __init__(
        self,
        configured: Sequence[tuple[str, str]],
        aliases: Sequence[tuple[str, str]] = (),
        *,
        models_dir: Path | None = None,
        hub_cache: Path | None = None,
        starter_cache: Path | None = None,
    ) -> None:
        """``configured`` and ``aliases`` are pairs of an id and a model: folder, GGUF file, hub name or starter; an
        alias may also name another known model. A folder that is None is not looked at, but for ``starter_cache``:
        then it is the user's own.

        Raises:
            ConfigError: an alias is given twice, for different models.
        """
        self._configured = tuple((model_id.lower(), model) for model_id, model in configured)
        self._aliases: dict[str, str] = {}
        for alias, target in aliases:
            if self._aliases.setdefault(alias.lower(), target) != target:
                raise ConfigError(f"the alias {alias} is given twice, for {self._aliases[alias.lower()]} and {target}")
        self._models_dir = models_dir
        self._hub_cache = hub_cache
        self._starter_cache = starter_cache
        self._refreshing = threading.Lock()
        self._facts = _FactsCache()
        self._names = _Names(())
        self._is_first_refresh = True

    def refresh(self) -> None:
        """Looks at all sources anew. Blocks while it reads; files that are as they were are not read again.

        Raises:
            ConfigError: at the first refresh, an alias leads nowhere. Later ones list it with that problem: a file
                that goes away while the server runs is no reason to forget the others.
        """
        with self._refreshing:
            self._facts.start_round()
            hub = scan_hub_cache(self._hub_cache) if self._hub_cache else []
            snapshots = {found.name.lower(): found for found in hub}
            configured = [
                self._candidate(model_id, self._place(model, snapshots) or _missing(model), "configured")
                for model_id, model in self._configured
            ]
            found = [*self._in_models_dir(), *self._in_hub_cache(hub), *self._starters()]
            aliases = self._resolve_aliases(_Names([*_sorted(configured), *found]), snapshots)
            self._names = _Names([*_sorted(configured), *_sorted(aliases), *found])
            self._facts.end_round()
            self._is_first_refresh = False

    def models(self) -> list[KnownModel]:
        """Source by source in the order above, by id within each."""
        return list(self._names.models)

    def find(self, name: str) -> KnownModel | None:
        """By id in any case; else by the end of an id behind a slash, if only one ends so; else by location."""
        return self._names.find(name)

    def similar(self, name: str) -> list[str]:
        """The ids that contain the text, in any case."""
        return [model.model_id for model in self._names.models if name.lower() in model.model_id]

    def _candidate(self, model_id: str, place: _Place, source: Source) -> _Candidate:
        facts, problem = self._facts.read(place.path) if place.path else (None, place.problem)
        model = KnownModel(
            model_id=model_id.lower(), location=place.location, source=source, facts=facts, problem=problem
        )
        return _Candidate(model, os.path.realpath(place.path) if place.path else None)

    def _place(self, model: str, snapshots: Mapping[str, Found]) -> _Place | None:
        """Where a model is that somebody wrote down; None: nowhere."""
        path = os.path.expanduser(model)
        if os.path.exists(path):
            return _Place(path, Path(path))
        if model.lower() in STARTERS:
            return self._starter_place(model.lower())
        if found := snapshots.get(model.lower()):
            return _Place(found.hub_location, found.path)
        if _HUB_NAME.fullmatch(model) and not model.lower().endswith(".gguf"):
            return _Place(model, None)
        return None

    def _starter_place(self, name: str) -> _Place:
        folder = made_folder(name, self._starter_cache)
        if folder:
            return _Place(str(folder), folder)
        try:
            return _Place(name, find_source(STARTERS[name]))
        except ConfigError as error:
            return _Place(name, None, str(error))

    def _in_models_dir(self) -> list[_Candidate]:
        found = scan_models_dir(self._models_dir) if self._models_dir else []
        return _sorted(self._candidate(item.name, _Place(str(item.path), item.path), "models_dir") for item in found)

    def _in_hub_cache(self, found: Sequence[Found]) -> list[_Candidate]:
        return _sorted(self._candidate(item.name, _Place(item.hub_location, item.path), "hub_cache") for item in found)

    def _starters(self) -> list[_Candidate]:
        places = ((name, self._starter_place(name)) for name in STARTERS)
        return _sorted(self._candidate(name, place, "starter") for name, place in places if place.path)

    def _resolve_aliases(self, known: _Names, snapshots: Mapping[str, Found]) -> list[_Candidate]:
        """
        Raises:
            ConfigError: see ``refresh``.
        """
        resolved: dict[str, _Candidate] = {}
        for alias, target in self._aliases.items():
            earlier = resolved.get(target.lower())
            if model := earlier.model if earlier else known.find(target):
                resolved[alias] = _Candidate(replace(model, model_id=alias, source="alias"), None)
                continue
            place = self._place(target, snapshots)
            if place is None and self._is_first_refresh:
                raise ConfigError(
                    f"the alias {alias} names {target}, which is no known model, no file or folder and no hub name"
                )
            candidate = self._candidate(alias, place or _missing(target), "alias")
            resolved[alias] = replace(candidate, real_path=None)  # another name, beside the one it stands for
        return list(resolved.values())


def _missing(model: str) -> _Place:
    return _Place(model, None, f"{model}: there is no such file or folder")


def _sorted(candidates: Iterable[_Candidate]) -> list[_Candidate]:
    return sorted(candidates, key=lambda candidate: (candidate.model.model_id, candidate.model.location))


class _Names:
    """Which entries are listed, and what each is called."""

    def __init__(self, candidates: Iterable[_Candidate]) -> None:
        by_path: dict[str, KnownModel] = {}
        self._by_id: dict[str, KnownModel] = {}
        listed = []
        for candidate in candidates:
            model = candidate.model
            if model.model_id in self._by_id:
                continue
            same = by_path.setdefault(candidate.real_path, model) if candidate.real_path else model
            if same is model or model.source == "configured":
                self._by_id[model.model_id] = model
                listed.append(model)
            else:
                self._by_id[model.model_id] = same  # not listed, and found
        self.models = tuple(listed)

    def find(self, name: str) -> KnownModel | None:
        wanted = name.lower()
        if wanted in self._by_id:
            return self._by_id[wanted]
        if not wanted:
            return None
        ends = {model.model_id: model for known, model in self._by_id.items() if known.endswith("/" + wanted)}
        if ends:
            return next(iter(ends.values())) if len(ends) == 1 else None
        return next((model for model in self.models if model.location == name), None)


class _FactsCache:
    """Facts, or the reason why there are none, by path; kept while name, time and size of each file are the same."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[_Signature, tuple[ModelFacts | None, str | None]]] = {}
        self._used: set[Path] = set()

    def start_round(self) -> None:
        self._used = set()

    def end_round(self) -> None:
        """Forgets what this round did not ask for."""
        self._kept = {path: kept for path, kept in self._kept.items() if path in self._used}

    def read(self, path: Path) -> tuple[ModelFacts | None, str | None]:
        self._used.add(path)
        try:
            signature = _signature(path)
            kept = self._kept.get(path)
            if kept is None or kept[0] != signature:
                kept = self._kept[path] = (signature, _facts_or_problem(path))
            return kept[1]
        except (OSError, NotAModel):  # it says why when it is read
            return _facts_or_problem(path)


def _facts_or_problem(path: Path) -> tuple[ModelFacts | None, str | None]:
    try:
        return read_facts(path), None
    except NotAModel as error:
        return None, str(error)


def _signature(path: Path) -> _Signature:
    """
    Raises:
        NotAModel: a part of a split GGUF file is missing.
        OSError: something cannot be looked at.
    """
    within = path.is_dir()
    files = [*path.iterdir(), *path.glob("additional_chat_templates/*")] if within else gguf_parts(path)
    states = [(str(file), file.stat()) for file in sorted(files) if file.exists()]
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)
