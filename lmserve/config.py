"""The configuration: every key once, with its default, its meaning and its limits.

Flags, ``LMSERVE_*`` variables, a TOML file and presets resolve into one frozen ``Config`` (``config_sources.py``);
the command line's options, the commented example file and the documentation are generated from the fields here.
"""

from __future__ import annotations

import functools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_BYTE_UNITS: Mapping[str, int] = types.MappingProxyType(
    {"": 1, "b": 1}
    | {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
    | {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}
)


def _key(default: Any, help: str, **extra: Any) -> Any:
    """A configuration key. ``extra``: the optional fields of ``Key``, or ``derived`` for what is no key of its own."""
    return field(default=default, repr=not extra.get("secret", False), metadata={"help": help, **extra})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What a worker needs to load one model and run it. Plain values only: it travels in the ``Load`` message."""

    model: str = _key("", "local folder, GGUF file or hub name", derived=True)
    model_id: str = _key("", "the name that clients use", derived=True)
    revision: str = _key("", "branch, tag or commit on the hub")
    trust_remote_code: bool = _key(False, "run Python code that comes with the model")
    device: str = _key("auto", "where the model runs", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = _key(
        "auto",
        "number format of the weights; auto: the checkpoint's own where the device is fast at it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = _key(
        "none",
        "weights in 8 or 4 bits: smaller, faster, with a loss; fp8: on GPUs (docs/quantization.md, docs/embeddings.md)",
        choices=("none", "int8", "int4", "fp8"),
    )
    task: str = _key(
        "auto",
        "what the model is for; auto: its files say",
        choices=("auto", "generate", "embed", "score"),
    )
    threads: int = _key(0, "processor threads of a worker; 0: one for each core", low=0)
    attention_backend: str = _key(
        "auto", "attention implementation", choices=("auto", "reference", "sdpa", "cpu", "triton", "fa3")
    )
    compile: bool = _key(
        True, "on a GPU, let torch.compile make a layer's small operations into few; off: faster start"
    )
    cuda_graphs: bool = _key(True, "on a GPU, capture steps that only decode, and run them again as one launch")
    max_model_len: int = _key(0, "tokens of prompt and output together; 0: what the model and the memory allow", low=0)
    max_num_seqs: int = _key(64, "sequences that run at once", low=1, high=4096)
    max_num_batched_tokens: int = _key(
        0, "tokens that one step computes; 0: 512 on a CPU (encoders: 1024), 4096 elsewhere", low=0
    )
    mixed_step_factor: float = _key(
        1.4,
        "so many times as long as a step of decodes one may take that reads prompts, too, while few wait; more: first "
        "tokens come sooner, and streams less evenly",
        low=1.0,
        high=1000.0,
    )
    block_size: int = _key(16, "tokens in one KV block", low=1, high=1024)
    kv_cache_memory: int = _key(
        0,
        "bytes for the KV cache (512MiB, 4GiB, …); 0: a quarter of the free memory on a CPU, most of it on a GPU",
        low=0,
        unit="bytes",
    )
    kv_cache_dtype: str = _key(
        "auto",
        "number format of the KV cache; auto: the model's; fp8: half the memory, with a loss",
        choices=("auto", "fp8"),
    )
    gpu_memory_utilization: float = _key(
        0.9,
        "share of a GPU's memory that this model's worker may take, weights and all, if it is free",
        low=0.05,
        high=1.0,
    )
    prefix_caching: bool = _key(True, "reuse the KV blocks of equal beginnings of prompts")
    max_waiting: int = _key(1024, "requests that may wait; one more is a 429", low=1)
    self_check: bool = _key(True, "compare a short packed batch with the stock forward before serving")

    def to_options(self) -> dict[str, str | int | float | bool | None]:
        """As the ``Load`` message carries it."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class ModelSetup:
    """How one model is run."""

    config: ModelConfig
    sampling: Mapping[str, float] = field(default_factory=dict)
    """What its preset says, by the names in a generation config: it applies where neither request, ``default_*`` nor
    generation config says anything."""


SetupModel = Callable[[str, str], ModelSetup]
"""Takes a model's id, and the folder, file or hub name."""


def _plain_setup(model_id: str, model: str) -> ModelSetup:
    return ModelSetup(ModelConfig(model=model, model_id=model_id))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a server runs with. The keys of ``ModelConfig`` are keys beside these; they hold for every model.

    ``default_*`` is what a sampling parameter is when a request does not say. Set by a flag, a variable or a file, it
    goes before the checkpoint's ``generation_config.json``; what a preset says comes after that, and is kept apart.
    """

    model: tuple[str, ...] = _key(
        ("smollm2-135m-instruct",),
        "local folder, GGUF file, hub name or starter model, or NAME=one of these, loaded at the start; may be "
        "repeated; with models_dir there need be none",
        path=True,
        metavar="MODEL",
    )
    models_dir: str = _key("", "folder with models: Hugging Face folders and GGUF files, at any depth", path=True)
    alias: tuple[str, ...] = _key(
        (), "NAME=MODEL: one more name for a model, which is not loaded at the start; may be repeated", path=True
    )
    just_in_time: bool = _key(True, "load a known model when a request first asks for it")
    ttl_seconds: float = _key(
        3600.0, "idle time after which a model that a request loaded is unloaded; 0: never", low=0, high=10**9
    )
    host: str = _key("127.0.0.1", "address to listen on")
    port: int = _key(1234, "port to listen on; 0: any free one", low=0, high=65535)
    uds: str = _key("", "Unix socket to listen on instead of host and port", path=True)
    api_key: tuple[str, ...] = _key(
        (),
        "key that clients must show; may be repeated; better given as variable: flags can be seen by all users",
        secret=True,
    )
    strict_model_names: bool = _key(False, "refuse unknown model names also when only one model is loaded")
    cors_origins: tuple[str, ...] = _key((), "origin of web pages that may call the server, or *; may be repeated")
    ssl_certfile: str = _key("", "TLS certificate (PEM); with it the server speaks https", path=True)
    ssl_keyfile: str = _key("", "TLS key (PEM), if it is not in the certificate's file", path=True)
    max_body_bytes: int = _key(32 * 2**20, "bytes of a request's body at most", low=1, unit="bytes")
    body_seconds: float = _key(120.0, "time that a request's body may take to come", low=0.1, high=86400)
    max_json_nesting: int = _key(64, "levels of objects and arrays in a request's body", low=4, high=500)
    max_n: int = _key(128, "choices of one prompt (n)", low=1, high=128)
    max_choices: int = _key(2048, "choices of one request: prompts times n", low=1, high=65536)
    max_inputs: int = _key(2048, "texts or pairs of one request for embeddings or scores", low=1, high=65536)
    max_images: int = _key(32, "images of one request", low=0, high=1024)
    max_image_pixels: int = _key(64_000_000, "pixels of one image", low=1, high=2**30)
    image_hosts: tuple[str, ...] = _key(
        (),
        "host that images may be fetched from, .DOMAIN for all of a domain's, or * for all public ones; repeatable; "
        "none: images come in the request only",
    )
    max_stop: int = _key(16, "stop strings of one request", low=1, high=1024)
    max_prompt_tokens: int = _key(0, "tokens of one prompt; 0: what the context allows", low=0)
    first_token_seconds: float = _key(
        600.0, "time that a request may wait for its first token; then it is a 503", low=0.1, high=86400
    )
    keep_alive_seconds: float = _key(10.0, "silence after which a stream gets a comment line", low=0.1, high=3600)
    drain_seconds: float = _key(
        30.0, "time that running requests have when the server is told to stop", low=0, high=86400
    )
    log_level: str = _key("info", "how much the server says", choices=("debug", "info", "warning", "error"))
    cache: str = _key("", "folder for the starter models; default: lmserve in XDG_CACHE_HOME or ~/.cache", path=True)
    config: str = _key("", "TOML file with any of these keys", path=True)
    preset: str = _key(
        "auto", "sampling defaults for a family of models; auto: found by the model's name; none: no preset"
    )
    default_temperature: float | None = _key(None, "temperature; 0 is greedy", low=0, high=2, example=0.7)
    default_top_p: float | None = _key(None, "top_p", low=0, low_open=True, high=1, example=0.95)
    default_top_k: int | None = _key(None, "top_k; 0: off", low=0, high=2**31 - 1, example=40)
    default_min_p: float | None = _key(None, "min_p", low=0, high=1, example=0.05)
    default_repeat_penalty: float | None = _key(
        None, "repeat_penalty; 1: off", low=0, low_open=True, high=10, example=1.1
    )

    models: tuple[ModelConfig, ...] = ()
    """``model`` and the model keys, resolved: one for each model, ids distinct."""
    aliases: tuple[tuple[str, str], ...] = ()
    """``alias``, resolved: names and models."""
    setup: SetupModel = field(default=_plain_setup, compare=False, repr=False)
    """The configuration of any other model that comes to be known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One configuration key as users see it."""

    name: str
    kind: type
    """str, int, float, bool, or tuple (of strings)."""
    default: Any
    help: str
    section: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    unit: str = ""
    """"bytes": the value may be written with a unit."""
    path: bool = False
    """A leading ``~`` is the home folder."""
    secret: bool = False
    """The value is never printed."""
    example: Any = None
    """A value to show where the default is None."""
    metavar: str = ""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "LMSERVE_" + self.name.upper()

    @property
    def limits(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind in (int, float):
            noun = "a number of bytes" if self.unit == "bytes" else "a whole number" if self.kind is int else "a number"
            if self.high is not None:
                return f"{noun} in {'(' if self.low_open else '['}{self.low}, {self.high}]"
            return f"{noun}, at least {self.low}"
        if self.kind is tuple:
            return "a text or a list of texts"
        return "true or false" if self.kind is bool else "a text"

    def parse(self, value: object) -> Any:
        """The value as ``Config`` holds it, from a text or from what TOML made of it.

        Raises:
            ValueError: it is malformed or out of range; ``limits`` says what it must be.
        """
        if self.kind is tuple:
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
                raise ValueError(value)
            return tuple(self._path(text) for text in texts)
        if self.kind is bool:
            return _parse_bool(value)
        if self.kind is str:
            if not isinstance(value, str) or (self.choices and value not in self.choices):
                raise ValueError(value)
            return self._path(value)
        return self._parse_number(value)

    def _path(self, text: str) -> str:
        return os.path.expanduser(text) if self.path else text

    def _parse_number(self, value: object) -> int | float:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(value)
        number: int | float = (
            parse_bytes(value) if self.unit == "bytes" and isinstance(value, str) else self.kind(value)
        )
        if isinstance(value, float) and number != value:
            raise ValueError(value)
        above = self.low is None or (self.low < number if self.low_open else self.low <= number)
        if not math.isfinite(number) or not above or (self.high is not None and number > self.high):
            raise ValueError(value)
        return number


@functools.cache
def keys() -> Mapping[str, Key]:
    """Every key that users may set, in the order of the documentation."""
    found: dict[str, Key] = {}
    for owner in (Config, ModelConfig):
        hints = typing.get_type_hints(owner)
        for item in fields(owner):
            extra = dict(item.metadata)
            if not extra or extra.pop("derived", False):
                continue
            section = "Sampling defaults" if item.name.startswith("default_") else _SECTIONS[owner]
            kind = _kind(hints[item.name])
            found[item.name] = Key(name=item.name, kind=kind, default=item.default, section=section, **extra)
    return types.MappingProxyType(found)


_SECTIONS: Mapping[type, str] = types.MappingProxyType({Config: "Server", ModelConfig: "Models"})


def parse_bytes(text: str) -> int:
    """512, 512MB (millions) or 512MiB (2 to the 20th), in bytes.

    Raises:
        ValueError: the text is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _BYTE_UNITS:
        raise ValueError(text)
    return int(float(match[1]) * _BYTE_UNITS[match[2]]) if "." in match[1] else int(match[1]) * _BYTE_UNITS[match[2]]


def format_bytes(count: int) -> str:
    """The shortest exact text that ``parse_bytes`` reads back."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count and count % 1024**power == 0:
            return f"{count // 1024**power}{unit}"
    return str(count)


def _parse_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = value.strip().lower() if isinstance(value, str) else ""
    if text not in _TRUE + _FALSE:
        raise ValueError(value)
    return text in _TRUE


def _kind(hint: Any) -> type:
    """The type in ``X``, ``X | None`` or ``tuple[X, ...]``."""
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    kind: type = typing.get_origin(hint) or hint
    return kind


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """What is made once is kept there: ``LMSERVE_CACHE``, else ``lmserve`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if environ.get("LMSERVE_CACHE"):
        return Path(environ["LMSERVE_CACHE"]).expanduser()
    home = environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lmserve"
