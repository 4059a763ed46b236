"""Where a configuration comes from: flags, then ``LMSERVE_*`` variables, then a TOML file, then presets, then defaults.

For the sampling defaults the checkpoint's own ``generation_config.json`` stands between the file and the preset.

``python -m lmserve.config_sources`` prints the commented example file.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmserve.config import Config, Key, ModelConfig, ModelSetup, format_bytes, keys
from lmserve.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "LMSERVE_"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ALIAS = re.compile(r"[\w.:@/-]+")
_GENERATION_NAMES = {"default_repeat_penalty": "repetition_penalty"}


@dataclass(frozen=True, slots=True)
class Setting:
    """A key's value as it was written, and where."""

    value: Any
    source: str
    """For people: ``flag --port``, ``variable LMSERVE_PORT``, ``file server.toml``."""


Layer = dict[str, Setting]
"""What one source says, by key."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Values for a family of models."""

    name: str
    patterns: tuple[str, ...]
    """Globs in lower case, for a model's name or its ``model_type``."""
    layer: Layer


def resolve(flags: Mapping[str, Any], environ: Mapping[str, str], presets: Iterable[Preset] | None = None) -> Config:
    """The configuration.

    ``flags``: by key name; None is not given. ``presets``: those that ship with lmserve by default.

    Raises:
        ConfigError: an unknown key, a bad value or a model that is not there, with its source.
    """
    upper = {**_environment_layer(environ), **_flags_layer(flags)}
    path = _value("config", upper)
    layer = {**_file_layer(Path(path)), **upper} if path else upper
    known = load_presets(configs_folder() / "presets") if presets is None else tuple(presets)
    values = {name: _value(name, layer) for name in keys()}
    if values["models_dir"] and "model" not in layer:
        values["model"] = ()
    elif not values["model"]:
        raise ConfigError("model: the list is empty")
    own = {name: values[name] for name in Config.__dataclass_fields__ if name in values}

    def setup(model_id: str, model: str) -> ModelSetup:
        preset = _choose_preset(values["preset"], known, model)
        below = preset.layer if preset else {}
        return ModelSetup(_model_config(model_id, model, {**below, **layer}), _sampling_values(below))

    setup("", "")  # a preset that is not there is known at once
    named = _named_models(values["model"])
    aliases = _named_models(values["alias"], "alias")
    for name in {name.lower() for name in named} & {name.lower() for name in aliases}:
        raise ConfigError(f"alias {name!r}: a model has this name")
    _check_models_dir(own["models_dir"])
    _check_tls(own["ssl_certfile"], own["ssl_keyfile"])
    models = tuple(setup(model_id, model).config for model_id, model in named.items())
    return Config(**own, models=models, aliases=tuple(aliases.items()), setup=setup)


def _named_models(texts: Iterable[str], key: str = "model") -> dict[str, str]:
    """Model by id. Ids are distinct whatever their case is."""
    named: dict[str, str] = {}
    for text in texts:
        model_id, model = _split_alias(text)
        if key == "alias":
            if model_id != text.partition("=")[0]:
                raise ConfigError(f"alias {text!r} must be NAME=MODEL")
        else:
            _check_model(model)
        if model_id.lower() in {name.lower() for name in named}:
            raise ConfigError(f"two models are called {model_id!r}; give one of them another name: NAME={model}")
        named[model_id] = model
    return named


def _check_models_dir(folder: str) -> None:
    if folder and not os.path.isdir(folder):
        raise ConfigError(f"models_dir: there is no folder {folder}")


def configs_folder() -> Path:
    """The files that ship with lmserve: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def load_presets(folder: Path) -> tuple[Preset, ...]:
    """All presets of a folder, by name.

    Raises:
        ConfigError: a file is malformed, or has a key that is none of a model's.
    """
    return tuple(_load_preset(path) for path in sorted(folder.glob("*.toml")))


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name, or nothing; begins with a semicolon."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def render_example() -> str:
    """``configs/server.example.toml``: every key, commented out, with its default."""
    lines = [
        "# Every key of lmserve, each with its default. Copy what you need: lmserve serve --config server.toml",
        "# A flag (--max-num-seqs) or a variable (LMSERVE_MAX_NUM_SEQS) of the same name goes before the file.",
        "# This file is made by: python -m lmserve.config_sources",
    ]
    section = ""
    for key in keys().values():
        if key.name == "config":
            continue
        if key.section != section:
            section = key.section
            lines += ["", f"# ---- {section} ----"]
        unset = " Not set by default." if key.default is None else ""
        limits = f" ({key.limits})" if key.choices or key.low is not None else ""
        value = key.example if key.default is None else key.default
        lines += ["", f"# {key.help}{limits}.{unset}", f"#{key.name} = {_as_toml(key, value)}"]
    return "\n".join(lines) + "\n"


def _flags_layer(flags: Mapping[str, Any]) -> Layer:
    given = {name: value for name, value in flags.items() if value is not None}
    return _checked(given, lambda name: f"flag --{name.replace('_', '-')}")


def _environment_layer(environ: Mapping[str, str]) -> Layer:
    """An empty variable is one that is not set; lists are separated by commas."""
    given: dict[str, Any] = {}
    for variable, text in environ.items():
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or not text.strip():
            continue
        is_list = name in keys() and keys()[name].kind is tuple
        given[name] = [part.strip() for part in text.split(",") if part.strip()] if is_list else text
    return _checked(given, lambda name: f"variable {PREFIX}{name.upper()}")


def _file_layer(path: Path) -> Layer:
    table = _read_toml(path)
    if "config" in table:
        raise ConfigError(f"file {path}: config cannot stand in a configuration file")
    return _checked(table, lambda name: f"file {path}")


def _load_preset(path: Path) -> Preset:
    table = _read_toml(path)
    match = table.pop("match", None)
    patterns = match.get("model") if isinstance(match, dict) else None
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"preset {path.stem}: [match] must have model = [glob, …]")
    layer = _checked(table, lambda name: f"preset {path.stem}")
    for name in layer:
        if keys()[name].section == "Server":
            raise ConfigError(f"preset {path.stem}: {name} is the server's, not a model's")
        _value(name, layer)
    return Preset(path.stem, tuple(pattern.lower() for pattern in patterns), layer)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # malformed TOML or UTF-8
        raise ConfigError(f"{path}: {error}") from error


def _checked(given: Mapping[str, Any], source: Callable[[str], str]) -> Layer:
    """The layer, with every name known."""
    for name in given:
        if name not in keys():
            raise ConfigError(f"{source(name)}: there is no key {name!r}{nearest(name, keys())}")
    return {name: Setting(value, source(name)) for name, value in given.items()}


def _value(name: str, layer: Layer) -> Any:
    """The key's value as the layer has it, or its default."""
    key = keys()[name]
    if name not in layer:
        return key.default
    setting = layer[name]
    try:
        return key.parse(setting.value)
    except (ValueError, OverflowError):
        got = "" if key.secret else f", got {setting.value!r}"
        raise ConfigError(f"{name} ({setting.source}) must be {key.limits}{got}") from None


def _model_config(model_id: str, model: str, layer: Layer) -> ModelConfig:
    values = {name: _value(name, layer) for name, key in keys().items() if key.section == "Models"}
    return ModelConfig(model=model, model_id=model_id, **values)


def _sampling_values(layer: Layer) -> dict[str, float]:
    return {
        _GENERATION_NAMES.get(name, name.removeprefix("default_")): _value(name, layer)
        for name in layer
        if name.startswith("default_")
    }


def _split_alias(text: str) -> tuple[str, str]:
    """(id, model) of ``NAME=MODEL`` or ``MODEL``.

    Without NAME the id is what the folder, the file or the repository on the hub is called, in lower case.
    """
    alias, equals, model = text.partition("=")
    if equals and not os.path.exists(text):
        model = os.path.expanduser(model)
        if not model or not _ALIAS.fullmatch(alias):
            raise ConfigError(
                f"model {text!r}: NAME=MODEL needs a name of letters, digits and . _ - : @ /, and a model"
            )
        return alias, model
    path = Path(text)
    name = path.stem if path.is_file() else path.resolve().name
    return name.lower(), text


def _check_model(model: str) -> None:
    """Mistakes that can be seen before a worker is started."""
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"model {model}: the folder has no config.json")
    if path.is_file() and path.suffix != ".gguf":
        raise ConfigError(f"model {model}: a model is a folder, a .gguf file or a hub name")
    if not path.exists() and (not _HUB_NAME.fullmatch(model) or model.startswith(".") or path.suffix == ".gguf"):
        raise ConfigError(f"model {model}: there is no such folder or file")


def _choose_preset(wanted: str, presets: tuple[Preset, ...], model: str) -> Preset | None:
    """A fine-tuned model often has its family's ``model_type`` and other habits: a match by name goes first.

    Of several matches the one with the longest glob wins.
    """
    if wanted == "none":
        return None
    if wanted != "auto":
        for preset in presets:
            if preset.name == wanted:
                return preset
        known = ["auto", "none", *(preset.name for preset in presets)]
        raise ConfigError(f"preset {wanted!r} is none of {', '.join(known)}{nearest(wanted, known)}")
    path = Path(model)
    names = (path.resolve().name,) if path.exists() else (model, model.rpartition("/")[2])
    return _best_match(presets, names) or _best_match(presets, _model_type(path))


def _best_match(presets: tuple[Preset, ...], names: Iterable[str]) -> Preset | None:
    found = [
        (len(pattern), preset)
        for preset in presets
        for pattern in preset.patterns
        if any(fnmatch.fnmatchcase(name.lower(), pattern) for name in names)
    ]
    return max(found, key=lambda match: match[0])[1] if found else None


def _model_type(folder: Path) -> tuple[str, ...]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return (str(content["model_type"]),)
    except (OSError, ValueError, KeyError, TypeError):
        return ()  # the worker will say what is wrong with the folder


def _check_tls(certfile: str, keyfile: str) -> None:
    if keyfile and not certfile:
        raise ConfigError("ssl_keyfile needs ssl_certfile")
    for name, path in (("ssl_certfile", certfile), ("ssl_keyfile", keyfile)):
        if path and not os.access(path, os.R_OK):
            raise ConfigError(f"{name}: cannot read {path}")


def _as_toml(key: Key, value: Any) -> str:
    """TOML's strings, arrays, numbers and booleans are JSON's, for the values there are."""
    if key.unit == "bytes" and value:
        return json.dumps(format_bytes(value))
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    sys.stdout.write(render_example())
