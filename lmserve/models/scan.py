"""Where models lie on this machine: a folder of models, and the cache of the Hugging Face hub.

The cache is walked here and not with ``huggingface_hub.scan_cache_dir``, which looks at every file of every revision
and warns about what it does not know; its layout (``models--*/refs``, ``snapshots``) is documented and stable.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lmserve.models.facts import is_later_part
from lmserve.models.weight_files import holds_weights

MAX_DEPTH = 4
"""Names in a model's path below the scanned folder; LM Studio's layout has three: publisher, repository, file."""

_FIRST_PART = re.compile(r"-00001-of-\d{5}$")
_WEIGHT_FILE = re.compile(r"model.*\.safetensors|pytorch_model.*\.bin")
_REPOSITORY_PREFIX = "models--"


@dataclass(frozen=True, slots=True)
class Found:
    """A model's name, as its place spells it, and the folder or GGUF file."""

    name: str
    path: Path

    @property
    def hub_location(self) -> str:
        """Of a find in the hub's cache: the hub's name, with which the loader finds the folder there, or the file."""
        return str(self.path) if self.path.suffix.lower() == ".gguf" else self.name


def hub_cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps what it has loaded, by the same variables."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(variable):
            return Path(os.path.expandvars(environ[variable])).expanduser()
    cache = Path(environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = Path(os.path.expandvars(environ["HF_HOME"])) if environ.get("HF_HOME") else cache / "huggingface"
    return home.expanduser() / "hub"


def scan_models_dir(root: Path) -> list[Found]:
    """The model folders and GGUF files at most ``MAX_DEPTH`` names below ``root``, which may be a model folder itself.

    Names are relative paths, without ".gguf". Not looked at: what is hidden, what lies inside a model folder or a
    diffusers pipeline, later parts of split GGUF files, the vision parts of others (mmproj), folders that may not be
    read.
    """
    return list(_walk(root, (), set()))


def _walk(folder: Path, parts: tuple[str, ...], visited: set[str]) -> Iterator[Found]:
    real = os.path.realpath(folder)
    if real in visited:  # also how links in a circle end
        return
    visited.add(real)
    names = _visible_names(folder)
    files = [name for name in names if os.path.isfile(folder / name)]
    if "config.json" in files and holds_weights(files):
        yield Found("/".join(parts) or folder.resolve().name, folder)
        return
    if "model_index.json" in files:
        return
    for name in filter(_is_gguf_model, files):
        yield Found("/".join((*parts, _gguf_stem(name))), folder / name)
    if len(parts) + 1 < MAX_DEPTH:
        for name in sorted(set(names).difference(files)):
            if os.path.isdir(folder / name):
                yield from _walk(folder / name, (*parts, name), visited)


def _is_gguf_model(name: str) -> bool:
    return name.lower().endswith(".gguf") and "mmproj" not in name.lower() and not is_later_part(name)


def _gguf_stem(name: str) -> str:
    return _FIRST_PART.sub("", os.path.splitext(name)[0])


def _visible_names(folder: Path) -> list[str]:
    """In order; none that is not text: it could not be sent to clients."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted(name for name in names if not name.startswith(".") and name.isprintable())


def scan_hub_cache(cache: Path) -> list[Found]:
    """The repositories that have a configuration and weights in the revision that ``from_pretrained`` would load, and
    the GGUF files of those that have such.

    Names are the repositories' (org/name), and their files' behind them where there are several; paths are snapshots,
    or files in them.
    """
    found = []
    for folder in _visible_names(cache):
        if folder.startswith(_REPOSITORY_PREFIX) and (snapshot := _snapshot(cache / folder)):
            files = [name for name in _visible_names(snapshot) if os.path.isfile(snapshot / name)]
            # The index comes before the files that it names.
            has_weights = holds_weights(files) and any(_WEIGHT_FILE.fullmatch(name) for name in files)
            name = folder.removeprefix(_REPOSITORY_PREFIX).replace("--", "/")
            if "config.json" in files and has_weights:
                found.append(Found(name, snapshot))
                continue
            models = [file for file in files if _is_gguf_model(file)]
            names = [name] if len(models) == 1 else [f"{name}/{_gguf_stem(file)}" for file in models]
            found += [Found(name, snapshot / file) for name, file in zip(names, models, strict=True)]
    return found


def _snapshot(repository: Path) -> Path | None:
    """That of the main branch, else the newest."""
    snapshots = repository / "snapshots"
    with contextlib.suppress(OSError, UnicodeDecodeError):  # no main branch: a commit was asked for by its hash
        commit = (repository / "refs" / "main").read_text(encoding="ascii").strip()
        if commit and commit == os.path.basename(commit) and os.path.isdir(snapshots / commit):
            return snapshots / commit
    folders = [snapshots / name for name in _visible_names(snapshots) if os.path.isdir(snapshots / name)]
    return max(folders, key=_modified, default=None)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0
