"""Chats with an image each, all at once over HTTP, against ``generate`` one by one; and what images cost others.

    python -m benchmarks.images MODELFOLDER [--chats 16] [--tokens 32] [--dtype bfloat16]

``generate`` gets what the model's own processor makes of the same chats, in a process with nothing else to do, and
its time begins with the processor's work, as the server's does. In float32 the answers are compared first. Then the
gaps between the tokens of a streamed text are measured: alone, and while photographs come in that take long to decode.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from benchmarks.contenders import EXIT_TERMINATED, Machine, lmserve_command, model_folder, positive
from benchmarks.embeddings import p95
from lmserve import __version__
from lmserve.cli.bench.process import Server, StartFailed, free_port
from lmserve.images.processor import ImageProcessor

MODEL_ID = "bench"
PHOTOGRAPH = (4000, 3000)
STORY_TOKENS = 150


def make_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Blurred noise: unlike any other, and a JPEG of it is about as large as one of a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def chat(picture: Image.Image, seed: int) -> list[dict[str, Any]]:
    """With a PIL image in it, as processors want it."""
    text = f"This is picture number {seed}. What does it show?"
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def on_the_wire(messages: Sequence[dict[str, Any]], kind: str = "PNG") -> list[dict[str, Any]]:
    """As OpenAI has it."""

    def part(given: dict[str, Any]) -> dict[str, Any]:
        if given["type"] != "image":
            return given
        file = io.BytesIO()
        given["image"].save(file, kind)
        url = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    return [{**message, "content": [part(each) for each in message["content"]]} for message in messages]


def one_by_one(folder: Path, chats: Sequence[Any], dtype: str, tokens: int) -> tuple[float, list[str]]:
    """Seconds, and the answers of stock transformers."""
    load: Any = AutoModelForImageTextToText.from_pretrained
    model = load(folder, dtype=getattr(torch, dtype))
    processor = ImageProcessor.load(str(folder)).processor

    def answer(messages: Any) -> str:
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return str(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    with torch.inference_mode():
        answer(chats[0])
        began = time.perf_counter()
        answers = [answer(messages) for messages in chats]
        return time.perf_counter() - began, answers


async def all_at_once(base_url: str, chats: Sequence[Any], tokens: int) -> tuple[float, list[str]]:
    """Seconds, and the server's answers."""
    wire = [on_the_wire(messages) for messages in chats]
    async with httpx.AsyncClient(base_url=base_url, timeout=600, trust_env=False) as client:
        await _ask(client, wire[0], tokens)
        began = time.perf_counter()
        answers = await asyncio.gather(*(_ask(client, messages, tokens) for messages in wire))
        return time.perf_counter() - began, answers


async def _ask(client: httpx.AsyncClient, messages: Any, tokens: int) -> str:
    body = {"model": MODEL_ID, "messages": messages, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0}
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code != httpx.codes.OK:
        raise StartFailed(response.text[:500])
    return str(response.json()["choices"][0]["message"]["content"])


async def token_gaps(base_url: str, photographs: Sequence[Any]) -> list[float]:
    """Seconds between the pieces of one streamed text, while the photographs are asked about one after the other."""
    body = {
        "model": MODEL_ID,
        "messages": [{"role": "user", "content": "Tell me a long story."}],
        "max_tokens": STORY_TOKENS,
        "min_tokens": STORY_TOKENS,
        "temperature": 0,
        "logprobs": True,
        "stream": True,
    }
    async with httpx.AsyncClient(base_url=base_url, timeout=600, trust_env=False) as client:
        others = asyncio.create_task(_one_after_the_other(client, photographs))
        times = []
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {") and json.loads(line.removeprefix("data: "))["choices"]:
                    times.append(time.perf_counter())
        others.cancel()
        await asyncio.gather(others, return_exceptions=True)
    return list(np.diff(times))


async def _one_after_the_other(client: httpx.AsyncClient, photographs: Sequence[Any]) -> None:
    while photographs:
        for messages in photographs:
            await _ask(client, messages, 1)


@contextmanager
def _server(machine: Machine, folder: Path) -> Iterator[Server]:
    port = free_port()
    named = Machine(f"{MODEL_ID}={folder}", machine.device, machine.dtype, machine.threads)
    with Server([*lmserve_command(named, port), "--max-model-len", "4096"], port, machine.environment) as server:
        yield server


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    chats = [chat(make_picture(i, (320 + 16 * i, 240)), i) for i in range(options.chats)]
    photographs = [on_the_wire(chat(make_picture(100 + i, PHOTOGRAPH), i), "JPEG") for i in range(3)]
    machine = Machine(str(options.model), "cpu", options.dtype, options.threads)
    torch.set_num_threads(options.threads)
    try:
        with _server(machine, options.model) as server:
            ours, answers = asyncio.run(all_at_once(server.base_url, chats, options.tokens))
            alone = asyncio.run(token_gaps(server.base_url, ()))
            beside = asyncio.run(token_gaps(server.base_url, photographs))
    except StartFailed as error:
        print(error, file=sys.stderr)
        return 1
    theirs, expected = one_by_one(options.model, chats, options.dtype, options.tokens)
    same = sum(_words(a) == _words(b) for a, b in zip(answers, expected, strict=True))
    if options.dtype == "float32" and same < len(chats):
        print(f"only {same} of {len(chats)} answers are the same: no time is worth telling", file=sys.stderr)
        return 1
    print("\n".join(f"- {line}" for line in report(options, (ours, theirs, same), (alone, beside))))
    return 0


def report(
    options: argparse.Namespace, chats: tuple[float, float, int], gaps: tuple[Sequence[float], Sequence[float]]
) -> Iterator[str]:
    """``chats``: seconds of ours and theirs, and how many answers are the same. ``gaps``: alone, and beside others."""
    ours, theirs, same = chats
    count = options.chats * options.tokens
    yield f"lmserve {__version__}, torch {torch.__version__}, {options.dtype}, {options.threads} threads"
    yield f"{options.chats} chats with an image each, {options.tokens} tokens each; {same} answers are as theirs"
    yield f"all at once: {ours:.1f} s, {count / ours:.0f} tokens/s"
    yield f"generate one by one: {theirs:.1f} s, {count / theirs:.0f} tokens/s"
    yield f"ratio: {theirs / ours:.2f}"
    width, height = PHOTOGRAPH
    yield f"gaps between a text's tokens, alone: {_gaps(gaps[0])}"
    yield f"while photographs of {width} by {height} come in: {_gaps(gaps[1])}"


def _words(text: str) -> str:
    """Without half a character at the end, which one shows and the other keeps back."""
    return text.rstrip("\ufffd")


def _gaps(seconds: Sequence[float]) -> str:
    return f"median {1e3 * statistics.median(seconds):.1f} ms, p95 {1e3 * p95(seconds):.1f} ms"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=model_folder, help="folder of a model that reads images")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--chats", type=positive, default=16)
    parser.add_argument("--tokens", type=positive, default=32, help="of each answer")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
