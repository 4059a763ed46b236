"""Which model a client means."""

from __future__ import annotations

from collections.abc import Sequence

from lmserve.errors import ModelNotFound
from lmserve.models.entry import ModelEntry
from lmserve.runtime.interface import Task

MAX_NAMES = 20
"""Of models, in an error's message."""


def find_entry(
    entries: Sequence[ModelEntry], name: str | None, *, strict: bool, task: Task | None = None
) -> ModelEntry:
    """A model's id, whatever its case is; or what stands behind the id's slash, or where the model comes from, if that
    is one model's alone, loaded ones before the others; or any name if one model is loaded and names are not strict.

    ``task``: what it is asked for. A name that is nobody's means the one loaded model that does it; of encoders, if
    none is loaded, the one that is known: programs are often written with a name that means nothing.

    Raises:
        ModelNotFound: with the names there are.
    """
    live = [entry for entry in entries if entry.is_live]
    if name is not None:
        wanted = name.lower()
        for test in (_is_its_name, _is_like_its_name):
            for group in (live, entries):
                found = [entry for entry in group if test(entry, wanted)]
                if len(found) == 1:
                    return found[0]
    if name is None or not strict:
        able = [entry for entry in live if entry.task in (None, task)] if task is not None else live
        if task not in (None, "generate") and not able:
            able = [entry for entry in entries if entry.task == task and entry.known.problem is None]
        for group in (able, live):
            if len(group) == 1:
                return group[0]
    if name is None and not live and len(entries) == 1:
        return entries[0]
    raise ModelNotFound(_explain(entries, live, name), "model")


def is_called(entry: ModelEntry, name: str) -> bool:
    """Whether the name is one of its own."""
    return _is_its_name(entry, name.lower()) or _is_like_its_name(entry, name.lower())


def _is_its_name(entry: ModelEntry, wanted: str) -> bool:
    return entry.model_id.lower() == wanted


def _is_like_its_name(entry: ModelEntry, wanted: str) -> bool:
    return wanted in (entry.model_id.lower().rpartition("/")[2], entry.path.lower(), entry.known.location.lower())


def _explain(entries: Sequence[ModelEntry], live: Sequence[ModelEntry], name: str | None) -> str:
    asked = "No model was named" if name is None else f"Model {name[:200]!r} is not known"
    loaded = [entry.model_id for entry in live]
    known = [entry.model_id for entry in entries if not entry.is_live]
    words = f"{asked}. Your models: {_listed(loaded)}."
    return f"{words} Known, and loaded when asked for: {_listed(known)}." if known else words


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more if names else "none is loaded"
