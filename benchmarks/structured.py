"""What enforcing a JSON schema costs: streams that are constrained against the same number that are free, over HTTP.

    python -m benchmarks.structured MODELFOLDER [--streams 16] [--tokens 128] [--rounds 5] [--dtype bfloat16]

Both kinds have the same prompts, found in the prefix cache after the first round, and give the same number of tokens:
the schema is a list without an end. The two kinds take turns, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.contenders import EXIT_TERMINATED, Machine, lmserve_command, model_folder, positive
from lmserve import __version__
from lmserve.cli.bench.process import Server, StartFailed, free_port

MODEL_ID = "bench"
ANIMAL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "legs": {"type": "integer", "minimum": 0, "maximum": 1000},
        "lives_in": {"enum": ["water", "air", "land"]},
        "tame": {"type": "boolean"},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 16}, "maxItems": 3},
    },
    "required": ["name", "legs", "lives_in", "tame", "names"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ANIMAL, "minItems": 10_000}


def bodies(streams: int, tokens: int, temperature: float, *, constrained: bool) -> list[dict[str, Any]]:
    """One request a stream, each with a prompt of its own."""
    kind: dict[str, Any] = {"guided_json": SCHEMA} if constrained else {"min_tokens": tokens}
    return [
        {
            "model": MODEL_ID,
            "messages": [{"role": "user", "content": f"List some animals of country number {i} as JSON."}],
            "max_tokens": tokens,
            "temperature": temperature,
            "seed": i,
            **kind,
        }
        for i in range(streams)
    ]


async def tokens_per_second(base_url: str, asked: Sequence[Mapping[str, Any]]) -> float:
    """Of all requests at once."""
    async with httpx.AsyncClient(base_url=base_url, timeout=600, trust_env=False) as client:
        began = time.perf_counter()
        counts = await asyncio.gather(*(_ask(client, body) for body in asked))
        return sum(counts) / (time.perf_counter() - began)


async def _ask(client: httpx.AsyncClient, body: Mapping[str, Any]) -> int:
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code != httpx.codes.OK:
        raise StartFailed(response.text[:500])
    answer = response.json()
    if answer["choices"][0]["finish_reason"] != "length":
        raise StartFailed(f"an answer ended early: {answer['choices'][0]['message']['content']}")
    return int(answer["usage"]["completion_tokens"])


def measure(base_url: str, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Tokens a second of free and of constrained streams, a pair for each round; the first, warming one is left out."""
    free, constrained = (
        bodies(options.streams, options.tokens, options.temperature, constrained=kind) for kind in (False, True)
    )
    rounds = []
    for _ in range(options.rounds + 1):
        pair = [asyncio.run(tokens_per_second(base_url, asked)) for asked in (free, constrained)]
        rounds.append((pair[0], pair[1]))
    return rounds[1:]


def report(options: argparse.Namespace, rounds: Sequence[tuple[float, float]]) -> Iterator[str]:
    """What was seen, and the ratio."""
    yield f"lmserve {__version__}, torch {torch.__version__}, {options.dtype}, {options.threads} threads"
    yield f"{options.streams} streams, {options.tokens} tokens each, temperature {options.temperature:g}"
    for free, constrained in rounds:
        yield f"free {free:.0f} tokens/s, constrained {constrained:.0f}: {constrained / free:.3f}"
    yield f"ratio, median: {statistics.median(constrained / free for free, constrained in rounds):.3f}"


@contextmanager
def _server(machine: Machine, folder: Path) -> Iterator[Server]:
    port = free_port()
    named = Machine(f"{MODEL_ID}={folder}", machine.device, machine.dtype, machine.threads)
    with Server([*lmserve_command(named, port), "--max-model-len", "2048"], port, machine.environment) as server:
        yield server


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    try:
        with _server(Machine(str(options.model), "cpu", options.dtype, options.threads), options.model) as server:
            rounds = measure(server.base_url, options)
    except StartFailed as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(f"- {line}" for line in report(options, rounds)))
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.structured", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=model_folder, help="folder of a model")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--streams", type=positive, default=16)
    parser.add_argument("--tokens", type=positive, default=128, help="of each answer")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--temperature", type=float, default=1.0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
