"""How fast streams are served, end to end but for the network: the engine, the runner and the device."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.models import Served, capture_all, serve
from benchmarks.gpu.results import Row, attempt
from benchmarks.gpu.roofline import decode_step, prefill
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.streams import decode, prompts, whole

STREAMS, TINY_STREAMS = (1, 32, 256), (1, 4)
DECODE_PROMPT, DECODE_STEPS, WARM_UPS = 896, 192, 16
"""With them contexts are a thousand tokens on average, as the aims have it."""
WHOLE_PROMPT, WHOLE_TOKENS = 256, 256
WARM_UP_TOKENS = 4
PREFILL = (1024, 8192)
PREFILL_ROUNDS = 3
TINY_PROMPT, TINY_TOKENS, TINY_STEPS, TINY_PREFILL = 24, 8, 4, (64,)


def streams_name(count: int) -> str:
    return f"{count} stream" + ("s" if count > 1 else "")


def run(setting: Setting) -> Iterator[Row]:
    served = serve(setting)
    yield from _how_it_is_served(setting, served)
    counts = TINY_STREAMS if setting.tiny else STREAMS
    for count in counts:
        yield from attempt(f"decode, {streams_name(count)}", partial(_decode, setting, served, count))
    for length in TINY_PREFILL if setting.tiny else PREFILL:
        yield from attempt(f"prefill of {length}", partial(_prefill, setting, served, length))
    for count in counts:
        yield from attempt(f"whole, {streams_name(count)}", partial(_whole, setting, served, count))


def _how_it_is_served(setting: Setting, served: Served) -> Iterator[Row]:
    info = served.runner.info
    refused = "; ".join(sentence for sentence in served.said if ":" in sentence)
    yield Row("getting ready", served.seconds, "s", note=refused or f"attention {info.attention_backend}")
    yield Row("KV cache", info.kv_cache_tokens, "tokens", note=f"contexts up to {info.max_model_len}")
    if setting.is_cuda:
        before = torch.cuda.memory_reserved()
        took = capture_all(served)
        taken = (torch.cuda.memory_reserved() - before) / 2**20
        yield Row("capturing all sizes", took, "s", note=f"the allocator took {taken:.0f} MiB for it")


def _decode(setting: Setting, served: Served, count: int) -> Iterator[Row]:
    length = TINY_PROMPT if setting.tiny else DECODE_PROMPT
    asked = prompts(count, length, served.runner.info.vocab_size, 1)
    core = served.engine(reads_at_once=True)
    num_steps, num_warm_ups = (TINY_STEPS, 1) if setting.tiny else (DECODE_STEPS, WARM_UPS)
    found = decode(core, asked, num_steps=num_steps, num_warm_ups=num_warm_ups)
    shortest = decode_step(served.size, count, found.context).seconds(setting.limits)
    note = f"{1e3 * count / found.tokens_per_second:.2f} ms a step, contexts of {found.context:.0f}"
    limit = count / shortest if shortest else None
    yield Row.of_rate(f"decode, {streams_name(count)}", found.tokens_per_second, "tokens/s", limit, note)


def _prefill(setting: Setting, served: Served, length: int) -> Iterator[Row]:
    """Of one prompt alone, from the request to its first token, in steps of as many tokens as the engine takes."""
    times = []
    for seed in range(1 + PREFILL_ROUNDS):
        asked = prompts(1, length, served.runner.info.vocab_size, seed)
        times.append(whole(served.engine(), asked, 1).first_token_seconds)
    took = statistics.median(times[1:])
    work = prefill(served.size, length)
    note = f"{length / took:.0f} tokens/s, first token after {1e3 * took:.1f} ms, {PREFILL_ROUNDS} rounds"
    limit = setting.limits.flops / 1e12 or None
    yield Row.of_rate(f"prefill of {length}", work.flops / took / 1e12, "TFLOP/s", limit, note)


def _whole(setting: Setting, served: Served, count: int) -> Iterator[Row]:
    length, num_tokens = (TINY_PROMPT, TINY_TOKENS) if setting.tiny else (WHOLE_PROMPT, WHOLE_TOKENS)
    vocab_size = served.runner.info.vocab_size
    whole(served.engine(), prompts(count, length, vocab_size, 3), WARM_UP_TOKENS)  # steps of all kinds, once
    asked = prompts(count, length, vocab_size, 2)
    found = whole(served.engine(), asked, num_tokens)
    note = f"{length} tokens in, {num_tokens} out, first token after {1e3 * found.first_token_seconds:.0f} ms"
    yield Row(f"whole, {streams_name(count)}", found.tokens_per_second, "tokens/s", note=note)
