"""One repository in huggingface_hub's cache: what is there of a commit, whether it is right, and what is litter.

The layout is huggingface_hub's own: ``blobs/ETAG``, ``snapshots/COMMIT/NAME`` that link to them, and while a file comes
``blobs/ETAG.XXXXXXXX.incomplete`` (before its version 2: ``blobs/ETAG.incomplete``) under the lock
``../.locks/REPOSITORY/ETAG.lock``. An ETag is the file's SHA-256 if it is stored by LFS, else the id of its git blob.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_PIECE_BYTES = 1 << 22
_ORPHAN = re.compile(r"(?P<etag>[0-9a-f]{40,64})\.[0-9a-f]{8}\.incomplete")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub describes it."""

    name: str
    """With the folders in the repository."""
    size: int
    etag: str
    is_lfs: bool


class CachedCommit:
    """A commit's files in the cache. ``storage`` is the repository's folder."""

    def __init__(self, storage: Path, commit: str, files: Sequence[HubFile]) -> None:
        self.folder = storage / "snapshots" / commit
        self._blobs = storage / "blobs"
        self._unchecked = storage / ".lmserve-unchecked"
        self._files = files

    def missing(self) -> list[HubFile]:
        """What has to come, or has come and was never checked: the process that fetched it was ended before."""
        return [file for file in self._files if not self._is_there(file) or self._mark(file).exists()]

    def present_bytes(self) -> int:
        """Of all files, with what there is of those that are coming."""
        coming = self._coming()
        return sum(
            file.size if self._is_there(file) else min(file.size, coming.get(file.etag, 0)) for file in self._files
        )

    def mark_unchecked(self, files: Sequence[HubFile]) -> None:
        """Remembers, on disk, that these are not to be trusted until ``check`` has seen them."""
        self._unchecked.mkdir(parents=True, exist_ok=True)
        for file in files:
            self._mark(file).touch()
            blob = self._blobs / file.etag
            if blob.exists() and blob.stat().st_size != file.size:
                blob.unlink()  # cut short by others: huggingface_hub would link it as it is

    def check(self, files: Sequence[HubFile]) -> str | None:
        """Reads these files; None if they are what the hub described. Else the wrong one is deleted: its name."""
        for file in files:
            path = self.folder / file.name
            if not path.exists() or path.stat().st_size != file.size or _etag(path, file) != file.etag:
                with contextlib.suppress(FileNotFoundError):
                    path.resolve().unlink()
                path.unlink(missing_ok=True)
                return file.name
            self._mark(file).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._unchecked.rmdir()
        return None

    def _is_there(self, file: HubFile) -> bool:
        with contextlib.suppress(OSError):
            return (self.folder / file.name).stat().st_size == file.size
        with contextlib.suppress(OSError):
            return (self._blobs / file.etag).stat().st_size == file.size
        return False

    def _coming(self) -> dict[str, int]:
        """ETag -> bytes of the longest unfinished download."""
        sizes: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self._blobs) as entries:
            for entry in entries:
                if entry.name.endswith(".incomplete"):
                    with contextlib.suppress(FileNotFoundError):  # it has been finished and renamed since
                        etag = entry.name.partition(".")[0]
                        sizes[etag] = max(sizes.get(etag, 0), entry.stat().st_size)
        return sizes

    def _mark(self, file: HubFile) -> Path:
        return self._unchecked / file.etag


def remove_orphans(storage: Path) -> None:
    """Deletes unfinished files whose process was killed: huggingface_hub never goes on with them, nor deletes them.

    A file whose lock is held is somebody's. ``ETAG.incomplete``, which earlier versions go on with, stays.
    """
    for path in (storage / "blobs").glob("*.incomplete"):
        orphan = _ORPHAN.fullmatch(path.name)
        if orphan is not None:
            lock = storage.parent / ".locks" / storage.name / f"{orphan['etag']}.lock"
            _if_nobody_holds(lock, lambda path=path: path.unlink(missing_ok=True))  # type: ignore[misc]


def _if_nobody_holds(lock: Path, action: Callable[[], None]) -> None:
    if not lock.exists():
        action()
        return
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held; or the file system has no such locks, and then nothing is known
            return
        action()


def _etag(path: Path, file: HubFile) -> str:
    digest = hashlib.sha256() if file.is_lfs else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as content:
        while piece := content.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
