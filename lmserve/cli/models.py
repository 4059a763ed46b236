"""``lmserve ls`` and ``lmserve ps``: the models on disk, and those in memory."""

from __future__ import annotations

from typing import Annotated

import typer

from lmserve.api.schema.manage import Device, Instance, ManagedModel
from lmserve.cli.client import connect
from lmserve.cli.options import ApiKey, AsJson, Url
from lmserve.cli.tables import format_seconds, format_size, print_json, print_table
from lmserve.cli.terminal import say

LS_EPILOG = """Examples:

\b
  lmserve ls
  lmserve ls qwen --llm
  lmserve ls --json | jq -r '.[].key'"""
PS_EPILOG = """Examples:

\b
  lmserve ps
  lmserve ps --json | jq '.[] | {id, status}'"""
NONE_LOADED = "No models are currently loaded. To load one: lmserve load MODEL"
_HEADINGS = (("llm", "LLM"), ("embedding", "EMBEDDING"), ("reranker", "RERANKER"))
_UNKNOWN = "-"


def ls(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Only models with this in their name.")] = "",
    llm: Annotated[bool, typer.Option("--llm", help="Only language models.")] = False,
    embedding: Annotated[bool, typer.Option("--embedding", help="Only embedding models.")] = False,
    url: Url = "",
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> None:
    """List the models that the server knows, loaded or not."""
    with connect(url, api_key) as client:
        known = client.models()
    wanted = {name for name, given in (("llm", llm), ("embedding", embedding)) if given}
    types = wanted or {name for name, _ in _HEADINGS}
    models = [model for model in known if model.type in types and text.lower() in _searched(model)]
    if as_json:
        print_json(models)
    elif not models:
        say(
            "No model here is like that. All of them: lmserve ls"
            if known
            else "No models yet. Get one: lmserve get MODEL"
        )
    else:
        _print_models(models)


def _searched(model: ManagedModel) -> str:
    return f"{model.key} {model.display_name}".lower()


def _print_models(models: list[ManagedModel]) -> None:
    size = format_size(sum(model.size_bytes or 0 for model in models))
    noun = "1 model" if len(models) == 1 else f"{len(models)} models"
    print(f"You have {noun}, taking up {size} of disk space.\n")
    for kind, heading in _HEADINGS:
        rows = [_model_row(model) for model in models if model.type == kind]
        if rows:
            print_table("", [heading, "PARAMS", "ARCH", "QUANT", "SIZE", "CONTEXT", ""], rows)


def _model_row(model: ManagedModel) -> list[str]:
    loaded = sum(instance.state == "loaded" for instance in model.loaded_instances)
    mark = "✓ LOADED" if loaded == 1 else f"✓ LOADED ({loaded})" if loaded else ""
    if not loaded and model.problem:
        mark = f"✗ {model.problem}"
    return [
        model.key,
        model.params_string or _UNKNOWN,
        model.architecture or _UNKNOWN,
        model.quantization.name if model.quantization else _UNKNOWN,
        _UNKNOWN if model.size_bytes is None else format_size(model.size_bytes),
        _UNKNOWN if model.max_context_length is None else str(model.max_context_length),
        mark,
    ]


def ps(url: Url = "", api_key: ApiKey = "", as_json: AsJson = False) -> None:
    """List the loaded models, and those that are being loaded."""
    with connect(url, api_key) as client:
        models = client.models()
    found = sorted(
        ((model, instance) for model in models for instance in model.loaded_instances), key=lambda pair: pair[1].id
    )
    if as_json:
        print_json([{"model": model.key, **_fields(instance)} for model, instance in found])
    elif not found:
        say(NONE_LOADED)
    else:
        columns = ["IDENTIFIER", "MODEL", "STATUS", "SIZE", "CONTEXT", "PARALLEL", "WEIGHTS", "DEVICE", "BUSY"]
        columns += ["DEVICE MEMORY", "LANE", "TTL"]
        print_table("", columns, [_instance_row(model, instance) for model, instance in found])


def _fields(instance: Instance) -> dict[str, object]:
    return {name: getattr(instance, name) for name in instance.__struct_fields__}


def _instance_row(model: ManagedModel, instance: Instance) -> list[str]:
    config = instance.config
    return [
        instance.id,
        model.key,
        _status(instance),
        format_size(instance.device_memory_bytes) if instance.device_memory_bytes else _UNKNOWN,
        str(config.context_length) if config else _UNKNOWN,
        str(config.parallel) if config else _UNKNOWN,
        config.dtype.partition(" ")[0] if config else _UNKNOWN,
        config.device.upper() if config else _UNKNOWN,
        _busy(instance),
        _device_memory(instance.device),
        instance.lane or _UNKNOWN,
        _time_to_live(instance),
    ]


def _busy(instance: Instance) -> str:
    """Of the processors what this worker takes; of a GPU what all do there, for it is not told apart."""
    device = instance.device
    on_gpu = device is not None and not device.name.startswith("cpu")
    percent = device.utilization_percent if device is not None and on_gpu else instance.cpu_percent
    return _UNKNOWN if percent is None else f"{percent:.0f}%"


def _device_memory(device: Device | None) -> str:
    """Used and all."""
    if device is None:
        return _UNKNOWN
    used = _UNKNOWN if device.memory_used_bytes is None else format_size(device.memory_used_bytes)
    return f"{used} / {format_size(device.memory_total_bytes)}"


def _status(instance: Instance) -> str:
    if instance.status == "loading":
        return (
            f"LOADING {instance.progress:.0%} ({instance.stage})"
            if instance.stage
            else f"LOADING {instance.progress:.0%}"
        )
    if instance.status == "failed":
        return f"FAILED ({instance.failure})" if instance.failure else "FAILED"
    if instance.status == "generating":
        queued = f", {instance.num_queued} queued" if instance.num_queued else ""
        return f"GENERATING ({instance.num_running}{queued})"
    return instance.status.upper()


def _time_to_live(instance: Instance) -> str:
    if instance.ttl_seconds is None:
        return "none"
    left = instance.ttl_seconds if instance.ttl_left_seconds is None else instance.ttl_left_seconds
    return f"{format_seconds(left)} / {format_seconds(instance.ttl_seconds)}"
