"""The process of one download: ``python -m lmserve.models.hub_download MODEL REVISION [QUANTIZATION]``.

It is a process of its own so that a cancelled download ends at once, and so that threads that copy gigabytes and reckon
checksums never keep the API process from its streams. What it has to say is on its standard output (``hub_messages``).
Endpoint, cache and token are what huggingface_hub reads from the environment.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from lmserve.errors import InvalidRequest, ModelNotFound
from lmserve.models.hub_cache import CachedCommit, HubFile, remove_orphans
from lmserve.models.hub_files import choose_files
from lmserve.models.hub_messages import Done, Failed, Message, Plan, Progress, encode

PR_SET_PDEATHSIG = 1
PROGRESS_SECONDS = 0.25
MAX_WORKERS = 4
"""Files at once. A file that is interrupted begins anew, so it pays to finish some."""

Say = Callable[[Message], None]


class DownloadFailed(Exception):
    """A failure with its message for the client."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


def main(model: str, revision: str, quantization: str | None) -> int:
    """Returns the exit code: 0 if the model is there, 1 if not. The last message says the same."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the API process's to handle
    say = _take_stdout()
    try:
        say(download(model, revision, quantization, say))
        return 0
    except DownloadFailed as error:
        say(error.failed)
    except Exception as error:
        say(failure(error, model, revision))
    return 1


def download(model: str, revision: str, quantization: str | None, say: Say) -> Done:
    """Brings what is missing of a model into the cache, and checks it.

    Raises:
        DownloadFailed: it cannot be, or what came is not what the hub described.
        Exception: huggingface_hub's own, and the system's; ``failure`` says them in words.
    """
    info = HfApi().model_info(model, revision=revision, files_metadata=True)
    storage = Path(constants.HF_HUB_CACHE).expanduser() / f"models--{model.replace('/', '--')}"
    remove_orphans(storage)
    files = _files(info, model, quantization)
    commit = _commit(info)
    cached = CachedCommit(storage, commit, files)
    missing, present = cached.missing(), cached.present_bytes()
    total = sum(file.size for file in files)
    if missing:
        _refuse_what_does_not_fit(model, total - present, storage)
        if info.gated:
            get_hf_file_metadata(hf_hub_url(model, missing[0].name, revision=commit))  # raises where it may not be had
        cached.mark_unchecked(missing)
        say(Plan(total, present, str(storage)))
    with _ProgressThread(cached, say):
        path = snapshot_download(
            model,
            revision=revision,  # not the commit: then the name would not be remembered in the cache
            allow_patterns=[glob.escape(file.name) for file in files],
            max_workers=MAX_WORKERS,
        )
    if Path(path).name != commit:
        raise DownloadFailed(Failed("failed", f"{model} was changed on the hub meanwhile. Ask for it again."))
    wrong = cached.check(missing)
    if wrong is not None:
        reason = f"{wrong} of {model} is not what the hub says that it is (size or checksum). It was deleted"
        raise DownloadFailed(Failed("failed", f"{reason}: ask for the model again."))
    return Done(path, total, already=not missing)


def _files(info: ModelInfo, model: str, quantization: str | None) -> list[HubFile]:
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    try:
        names = choose_files(siblings, quantization)
    except ModelNotFound as error:
        raise DownloadFailed(Failed("not_found", f"{model} cannot be used. {error}", "model")) from None
    except InvalidRequest as error:
        raise DownloadFailed(Failed("invalid", str(error), error.param)) from None
    files = []
    for name in names:
        sibling = siblings[name]
        etag = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
        if etag is None or sibling.size is None:
            raise DownloadFailed(Failed("failed", f"The hub does not tell size and checksum of {name} of {model}."))
        files.append(HubFile(name, sibling.size, etag, sibling.lfs is not None))
    return files


def _commit(info: ModelInfo) -> str:
    if info.sha is None:
        raise DownloadFailed(Failed("failed", f"The hub does not tell the commit of {info.id}."))
    return info.sha


def _refuse_what_does_not_fit(model: str, needed: int, storage: Path) -> None:
    folder = next(path for path in (storage, *storage.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        numbers = f"{needed:,} bytes are to come, and {free:,} are free where {storage.parent} is"
        raise DownloadFailed(Failed("no_space", f"{model} does not fit on the disk: {numbers}.", "model"))


class _ProgressThread:
    """Says how much is there, while inside. By the files themselves: that holds for every way the bytes may come."""

    def __init__(self, cached: CachedCommit, say: Say) -> None:
        self._cached = cached
        self._say = say
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(PROGRESS_SECONDS):
            self._say(Progress(self._cached.present_bytes()))


def failure(error: Exception, model: str, revision: str) -> Failed:
    """What went wrong, in a sentence that says what can be done."""
    if isinstance(error, GatedRepoError):
        return Failed("forbidden", f"{model} is gated: ask for access on its page, and {_SET_TOKEN}.", "model")
    if isinstance(error, RevisionNotFoundError):
        return Failed("not_found", f"{model} has no revision {revision!r} on the hub.", "revision")
    if isinstance(error, DisabledRepoError):
        return Failed("forbidden", f"The hub has disabled {model}.", "model")
    if isinstance(error, RepositoryNotFoundError):
        private = f"If it is private, {_SET_TOKEN}."
        return Failed("not_found", f"{model} is not on the hub ({constants.ENDPOINT}). {private}", "model")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return Failed("forbidden", f"The hub refuses {model} (status {status}): {_SET_TOKEN}.", "model")
        return Failed("unreachable", f"The hub ({constants.ENDPOINT}) answers with status {status}.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failed("no_space", f"The disk is full: {constants.HF_HUB_CACHE}.", "model")
    if isinstance(error, PermissionError):
        return Failed("failed", f"The cache cannot be written: {error}.")
    if _is_of_the_network(error):
        detail = f"{type(error).__name__}: {error}".splitlines()[0]
        return Failed("unreachable", f"The hub ({constants.ENDPOINT}) cannot be reached, or broke off ({detail}).")
    traceback.print_exception(error)
    return Failed("failed", f"{model} could not be downloaded: {type(error).__name__}: {error}.")


_SET_TOKEN = "set HF_TOKEN in the server's environment to a token that may read it"


def _is_of_the_network(error: BaseException | None) -> bool:
    """huggingface_hub's HTTP library is httpx or httpx2, as its version wants; their errors are named alike.

    It also wraps them: what it could not fetch it calls missing in the cache.
    """
    while error is not None:
        if any(cls.__name__ == "TransportError" for cls in type(error).__mro__) or isinstance(error, ConnectionError):
            return True
        error = error.__cause__
    return False


def _take_stdout() -> Say:
    """Standard output for our messages alone; what others print goes to standard error."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(message: Message) -> None:
        with lock:
            try:
                out.write(encode(message) + b"\n")
            except BrokenPipeError:
                os._exit(1)  # nobody waits for this download any more

    return say


def _die_with_parent() -> None:
    """On Linux the kernel ends this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None))
