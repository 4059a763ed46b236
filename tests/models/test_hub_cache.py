from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

import pytest

from lmserve.models.hub_cache import CachedCommit, HubFile, remove_orphans

CONTENT = b"weights" * 100
SMALL = b"{}"


def lfs(name: str, content: bytes) -> HubFile:
    return HubFile(name, len(content), hashlib.sha256(content).hexdigest(), is_lfs=True)


def plain(name: str, content: bytes) -> HubFile:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return HubFile(name, len(content), blob, is_lfs=False)


class Repository:
    """A repository with two files in the cache, of which none is there yet."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.files = [lfs("sub/model.safetensors", CONTENT), plain("config.json", SMALL)]
        self.weights, self.config = self.files
        self.cached = CachedCommit(storage, "c" * 40, self.files)
        (storage / "blobs").mkdir(parents=True)

    def bring(self, file: HubFile, content: bytes, *, link: bool = True) -> Path:
        """As huggingface_hub does."""
        blob = self.storage / "blobs" / file.etag
        blob.write_bytes(content)
        pointer = self.cached.folder / file.name
        pointer.parent.mkdir(parents=True, exist_ok=True)
        if link:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        return pointer


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "models--a--b")


def test_what_is_missing_and_how_much_is_there(repository: Repository) -> None:
    cached = repository.cached
    assert (cached.missing(), cached.present_bytes()) == (repository.files, 0)
    (repository.storage / "blobs" / f"{repository.weights.etag}.0a1b2c3d.incomplete").write_bytes(b"x" * 30)
    (repository.storage / "blobs" / f"{repository.weights.etag}.incomplete").write_bytes(b"x" * 50)
    assert (cached.missing(), cached.present_bytes()) == (repository.files, 50)
    repository.bring(repository.weights, CONTENT, link=False)  # the longest counts no more: it is whole
    assert (cached.missing(), cached.present_bytes()) == ([repository.config], len(CONTENT))
    repository.bring(repository.config, SMALL)
    assert (cached.missing(), cached.present_bytes()) == ([], len(CONTENT) + len(SMALL))


def test_more_than_the_whole_is_never_there(repository: Repository) -> None:
    (repository.storage / "blobs" / f"{repository.config.etag}.incomplete").write_bytes(b"x" * 50)
    assert repository.cached.present_bytes() == len(SMALL)


def test_what_is_right_passes_and_is_trusted_from_then_on(repository: Repository) -> None:
    repository.cached.mark_unchecked(repository.files)
    repository.bring(repository.weights, CONTENT)
    repository.bring(repository.config, SMALL)
    assert repository.cached.missing() == repository.files  # as if the process had been killed here
    assert repository.cached.check(repository.files) is None
    assert repository.cached.missing() == []
    assert not [path for path in repository.storage.iterdir() if path.name.startswith(".lmserve")]


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"?", CONTENT[:-1], CONTENT + b"?", b""])
def test_what_is_wrong_is_deleted(repository: Repository, content: bytes) -> None:
    repository.cached.mark_unchecked(repository.files)
    repository.bring(repository.config, SMALL)
    pointer = repository.bring(repository.weights, content)
    assert repository.cached.check(repository.files) == "sub/model.safetensors"
    assert not os.path.lexists(pointer)
    assert not (repository.storage / "blobs" / repository.weights.etag).exists()
    assert repository.weights in repository.cached.missing()


def test_a_wrong_small_file_is_found_too(repository: Repository) -> None:
    repository.bring(repository.config, b"[]")
    assert repository.cached.check([repository.config]) == "config.json"


def test_a_file_that_others_cut_short_is_brought_again(repository: Repository) -> None:
    repository.bring(repository.weights, CONTENT[:10])
    assert repository.weights in repository.cached.missing()
    repository.cached.mark_unchecked(repository.cached.missing())
    assert not (repository.storage / "blobs" / repository.weights.etag).exists()


def test_orphans_are_removed_and_what_somebody_writes_is_not(repository: Repository) -> None:
    blobs, locks = repository.storage / "blobs", repository.storage.parent / ".locks" / repository.storage.name
    etags = [digit * 64 for digit in "1234"]
    for etag in etags:
        (blobs / f"{etag}.0a1b2c3d.incomplete").touch()
    (blobs / f"{etags[0]}.incomplete").touch()
    (blobs / etags[0]).touch()
    locks.mkdir(parents=True)
    with (locks / f"{etags[1]}.lock").open("w") as held, (locks / f"{etags[2]}.lock").open("w"):
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_orphans(repository.storage)
        left = {etags[0], f"{etags[0]}.incomplete", f"{etags[1]}.0a1b2c3d.incomplete"}
        assert {path.name for path in blobs.iterdir()} == left


def test_no_orphans_where_there_is_nothing(tmp_path: Path) -> None:
    remove_orphans(tmp_path / "models--a--b")
    assert not list(tmp_path.iterdir())
