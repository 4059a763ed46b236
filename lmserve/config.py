"""The configuration: every key once, with its default, its meaning and its limits.

Flags, ``LMSERVE_*`` variables, a TOML file and presets resolve into one frozen ``Config``;
the command line's options, the commented example file and the documentation are generated from the fields here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def _key(default: Any, help: str, **extra: Any) -> Any:
    """A configuration key. ``extra``: ``choices``, ``low``, ``high``, ``metavar``, ``secret``."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What a worker needs to load one model and run it. Plain values only: it travels in the ``Load`` message."""

    model: str = _key("", "local folder, GGUF file or hub name")
    model_id: str = _key("", "the name that clients use")
    revision: str = _key("", "branch, tag or commit on the hub")
    trust_remote_code: bool = _key(False, "run Python code that comes with the model")
    device: str = _key("auto", "where the model runs", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = _key(
        "auto",
        "number format of the weights; auto: the checkpoint's own where the device is fast at it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    threads: int = _key(0, "processor threads of a worker; 0: one for each core", low=0)
    attention_backend: str = _key("auto", "attention implementation", choices=("auto", "reference", "sdpa", "cpu"))
    max_model_len: int = _key(0, "tokens of prompt and output together; 0: what the model and the memory allow", low=0)
    max_num_seqs: int = _key(64, "sequences that run at once", low=1, high=4096)
    max_num_batched_tokens: int = _key(0, "tokens that one step computes; 0: 512 on a CPU, 4096 elsewhere", low=0)
    block_size: int = _key(16, "tokens in one KV block", low=1, high=1024)
    kv_cache_memory: int = _key(
        0,
        "bytes for the KV cache (512MiB, 4GiB, …); 0: a quarter of the free memory on a CPU, most of it on a GPU",
        low=0,
        unit="bytes",
    )
    prefix_caching: bool = _key(True, "reuse the KV blocks of equal beginnings of prompts")
    max_waiting: int = _key(1024, "requests that may wait; one more is a 429", low=1)
    self_check: bool = _key(True, "compare a short packed batch with the stock forward before serving")

    def to_options(self) -> dict[str, str | int | float | bool | None]:
        """As the ``Load`` message carries it."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
