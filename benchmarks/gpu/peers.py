"""The same streams by transformers itself: its continuous batching, and plain ``generate`` over one batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.gpu.results import Row, attempt
from benchmarks.gpu.serving import TINY_PROMPT, TINY_TOKENS, WHOLE_PROMPT, WHOLE_TOKENS
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import make_model
from benchmarks.gpu.streams import prompts
from benchmarks.gpu.timing import finish

STREAMS, TINY_STREAMS = 32, 4
SMALL_CACHE = {"num_blocks": 64, "max_batch_tokens": 64}
"""On a CPU it would take all memory, which takes a minute."""


def run(setting: Setting) -> Iterator[Row]:
    model = make_model(setting.model, setting.device, setting.dtype, tiny=setting.tiny)
    count = TINY_STREAMS if setting.tiny else STREAMS
    for name, generate in (("generate_batch", _continuous), ("generate", _plain)):
        yield from attempt(f"{name}, {count} streams", partial(_measure, setting, model, name, generate, count))
        _give_back(model)


def _measure(setting: Setting, model: PreTrainedModel, name: str, generate: Any, count: int) -> Iterator[Row]:
    """From the requests to the last token of each, after a run of the same size: what is made once, and for that size,
    is not counted."""
    length, num_tokens = (TINY_PROMPT, TINY_TOKENS) if setting.tiny else (WHOLE_PROMPT, WHOLE_TOKENS)
    vocab_size = int(model.config.vocab_size)
    generate(model, prompts(count, length, vocab_size, 3), num_tokens)
    finish(setting.device)
    asked = prompts(count, length, vocab_size, 2)
    began = time.perf_counter()
    num_generated = generate(model, asked, num_tokens)
    finish(setting.device)
    took = time.perf_counter() - began
    if num_generated != count * num_tokens:
        raise RuntimeError(f"{num_generated} tokens came, and {count * num_tokens} were asked for")
    attention = model.config._attn_implementation
    note = f"transformers {version('transformers')}, attention {attention}, {length} tokens in, {num_tokens} out"
    yield Row(f"{name}, {count} streams", num_generated / took, "tokens/s", note=note)


def _generation(num_tokens: int) -> GenerationConfig:
    """Greedy, and no token ends it."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )


def _continuous(model: Any, asked: list[list[int]], num_tokens: int) -> int:
    """Tokens that came. Its manager stays for the next call, as in a server."""
    generation = _generation(num_tokens)
    sizes: dict[str, Any] = SMALL_CACHE if model.device.type == "cpu" else {}
    make_config = getattr(transformers, "ContinuousBatchingConfig", None)  # not every version has it there
    options = {} if make_config is None else {"continuous_batching_config": make_config(**sizes)}
    results = model.generate_batch(asked, generation_config=generation, persistent_manager=True, **options)
    for result in results.values():
        if result.error:
            raise RuntimeError(result.error)
    return sum(len(result.generated_tokens) for result in results.values())


def _give_back(model: Any) -> None:
    """The memory of the manager that stays; versions without the method have none that does."""
    getattr(model, "destroy_cached_continuous_batching_manager", lambda: None)()


def _plain(model: Any, asked: list[list[int]], num_tokens: int) -> int:
    """Tokens that came."""
    ids = torch.tensor(asked, device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=_generation(num_tokens))
    return int(out[:, ids.shape[1] :].numel())
