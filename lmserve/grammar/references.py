"""Where the schemas within a schema are, and which of them its `$ref`s mean."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

from lmserve.errors import InvalidRequest

Schema = dict[str, Any] | bool
"""A schema after the gate."""
Pointer = tuple[str, ...]
"""The names on the way from the root, as in a JSON pointer."""

_ANCHOR = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


class References:
    """Collects a schema's places, anchors and `$ref`s; then gives each `$ref` its target, under a name of our own.

    Only places that hold a schema can be meant: a pointer into a value or an annotation was never checked.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._places: dict[Pointer, Schema] = {}
        self._anchors: dict[str, Pointer] = {}
        self._pending: list[tuple[dict[str, Any], Pointer | str, str]] = []
        self._names: dict[Pointer, str] = {}
        self.targets: dict[str, Schema] = {}
        """By the text of a cleaned `$ref`; filled by `resolve`."""

    def add_place(self, pointer: Pointer, schema: Schema) -> None:
        """A checked schema, which may still be filled."""
        self._places[pointer] = schema

    def add_anchor(self, anchor: object, pointer: Pointer, path: str) -> None:
        """Another name of the place."""
        if not isinstance(anchor, str) or not _ANCHOR.fullmatch(anchor):
            raise InvalidRequest(f"{path} must be a plain name.", path)
        if anchor in self._anchors:
            raise InvalidRequest(f"{path}: another schema has the same anchor.", path)
        self._anchors[anchor] = pointer

    def add_reference(self, reference: object, holder: dict[str, Any], path: str) -> None:
        """A `$ref`, which ``holder`` is to have."""
        if not isinstance(reference, str):
            raise InvalidRequest(f"{path} must be a string.", path)
        fragment = unquote(reference[1:])
        if not reference.startswith("#") or not (fragment[:1] in ("", "/") or _ANCHOR.fullmatch(fragment)):
            raise InvalidRequest(f"{path} must point into this schema: #, #/$defs/name or #anchor.", path)
        is_anchor = bool(fragment) and fragment[0] != "/"
        pointer = tuple(part.replace("~1", "/").replace("~0", "~") for part in fragment.split("/")[1:])
        self._pending.append((holder, fragment if is_anchor else pointer, path))

    def resolve(self) -> None:
        """Gives each `$ref` its target.

        Raises:
            InvalidRequest: there is no schema where it points.
        """
        for holder, meant, path in self._pending:
            pointer = self._anchors.get(meant) if isinstance(meant, str) else meant
            if pointer is None or pointer not in self._places:
                raise InvalidRequest(f"{path} points at no schema.", path)
            name = self._names.setdefault(pointer, f"#/$defs/{len(self._names)}" if pointer else "#")
            holder["$ref"] = name
            self.targets[name] = self._places[pointer]

    def with_definitions(self, root: dict[str, Any]) -> dict[str, Any]:
        """The root with every target beside it; where a target stood, a `$ref` stands, so that none is there twice."""
        definitions: dict[str, Schema] = {}
        for pointer, name in self._names.items():
            target = self._places[pointer]
            if not pointer:
                continue
            definitions[name.removeprefix("#/$defs/")] = dict(target) if isinstance(target, dict) else target
            if isinstance(target, dict):
                target.clear()
                target["$ref"] = name
        return {**root, "$defs": definitions} if definitions else root
