"""Broken bodies of every kind: each is a request or the client's error, never ours."""

from __future__ import annotations

import contextlib
import json
import random

import pytest

from lmserve.api.body import parse_body
from lmserve.api.schema.chat import ChatCompletionRequest
from lmserve.api.schema.completions import CompletionRequest
from lmserve.api.schema.sampling import SamplingFields
from lmserve.api.strict_json import check_json
from lmserve.errors import RequestError

CHAT = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "h\u00e9 \U0001f600"}]}],
    "temperature": 0.5,
    "logit_bias": {"1": 2},
    "stop": ["a", "b"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "seed": 123,
    "tools": [],
    "user": "x",
}
COMPLETION = {"prompt": [[1, 2], [3]], "echo": True, "logprobs": 2, "best_of": 1, "max_tokens": 0, "n": 1}
PIECES = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"null", b"true", b"1e999", b"-", b"\xff", b"\\ud800"]
PIECES += [b"9" * 30, b"\x00", b"NaN", b"[" * 70, b'"seed":1,', b"\xed\xa0\x80"]


def mutate(rng: random.Random, body: bytearray) -> None:
    where = rng.randrange(len(body))
    match rng.randrange(4):
        case 0:
            body[where] = rng.randrange(256)
        case 1:
            del body[where : where + rng.randint(1, 6)]
        case 2:
            body[where:where] = rng.choice(PIECES)
        case _:
            start = rng.randrange(len(body))
            body[where:where] = body[start : start + rng.randint(1, 20)]


@pytest.mark.parametrize("seed", range(4))
def test_broken_bodies(seed: int) -> None:
    rng, kinds = random.Random(seed), ((CHAT, ChatCompletionRequest), (COMPLETION, CompletionRequest))
    taken = 0
    for _ in range(1500):
        fields, kind = rng.choice(kinds)
        body = bytearray(json.dumps(fields, ensure_ascii=rng.random() < 0.5).encode())
        for _ in range(rng.randint(0, 3)):
            mutate(rng, body)
        with contextlib.suppress(RequestError):
            read(bytes(body), kind)
            taken += 1
    assert 100 < taken < 1400, "some are taken, some refused"


def read(body: bytes, kind: type[SamplingFields]) -> None:
    """Everything that is done with a body before the service sees it."""
    check_json(body, 64)
    wire, _ = parse_body(body, kind)
    _ = wire.include_usage, wire.ignored(), wire.names()
    if isinstance(wire, ChatCompletionRequest | CompletionRequest):
        wire.options(wire.num_logprobs())
    if isinstance(wire, CompletionRequest):
        wire.prompts()
