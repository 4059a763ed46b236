"""Embeddings over HTTP against ``SentenceTransformer.encode`` in a process of its own, which has no HTTP to serve.

    python -m benchmarks.embeddings MODELFOLDER [--dtype bfloat16] [--quick] [--option max-num-batched-tokens=1024]

Both get the same texts, threads and number format. Rounds of the two alternate, so that what else the machine does
meets both; the middle ratio is told. Before any time is told the vectors are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from benchmarks.contenders import EXIT_TERMINATED, Machine, lmserve_command, model_folder, positive
from benchmarks.english import make_texts
from lmserve import __version__
from lmserve.cli.bench.process import Server, StartFailed, free_port

MODEL_ID = "bench"
SIZES = (256, 4096)
CLIENTS = (1, 8, 32)
PEER_BATCH = 32
MAX_DIFFERENCE = {"float32": 1e-5, "bfloat16": 0.02}
"""Of any number in the unit vectors."""
NUM_SHORT = 50
LARGE, LARGE_IF_QUICK = 2048, 512
"""Texts of the request that a short one is sent beside."""


class Peer(AbstractContextManager["Peer"]):
    """sentence-transformers in a process of its own; texts go in, seconds and vectors come out."""

    def __init__(self, machine: Machine) -> None:
        options = {"model": machine.model, "dtype": machine.dtype, "threads": machine.threads}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process runs, see __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.embeddings_peer", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=machine.environment,
            cwd=Path(__file__).parent.parent,
            text=True,
        )

    def encode(self, texts: Sequence[str]) -> tuple[float, NDArray[np.float32]]:
        """Seconds, and (texts, size) vectors. Raises StartFailed, with its last words, if it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(list(texts)) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            words = self._errors.read().decode(errors="replace")[-2000:]
            raise StartFailed(f"sentence-transformers ended with code {code}:\n{words}")
        answer = json.loads(line)
        vectors = np.frombuffer(base64.b64decode(answer["vectors"]), "<f4").reshape(len(texts), -1)
        return float(answer["seconds"]), vectors

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()  # closes the pipes
        self._errors.close()


async def embed(client: httpx.AsyncClient, texts: Sequence[str]) -> NDArray[np.float32]:
    """(texts, size)"""
    body = {"model": MODEL_ID, "input": list(texts), "encoding_format": "base64"}
    response = await client.post("/v1/embeddings", json=body)
    if response.status_code != httpx.codes.OK:
        raise StartFailed(response.text[:500])
    data: list[dict[str, Any]] = response.json()["data"]
    return np.stack([np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in data])


async def closed_loop(
    base_url: str, texts: Sequence[str], clients: int, batch: int
) -> tuple[float, NDArray[np.float32]]:
    """Each client sends its share in requests of ``batch`` texts at most. Seconds, and all vectors in order."""
    shares = np.array_split(np.arange(len(texts)), clients)

    async def work(client: httpx.AsyncClient, share: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        pieces = [share[start : start + batch] for start in range(0, len(share), batch)]
        return [await embed(client, [texts[i] for i in piece]) for piece in pieces]

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=base_url, timeout=600, limits=limits, trust_env=False) as client:
        began = time.perf_counter()
        parts = await asyncio.gather(*(work(client, share) for share in shares if len(share)))
        seconds = time.perf_counter() - began
    return seconds, np.concatenate([vectors for part in parts for vectors in part])


async def short_latencies(base_url: str, *, beside: Sequence[str]) -> list[float]:
    """Seconds of single short texts, one after the other; ``beside`` a large request, as long as that takes."""
    async with httpx.AsyncClient(base_url=base_url, timeout=600, trust_env=False) as client:
        large = asyncio.create_task(embed(client, beside)) if beside else None
        await asyncio.sleep(0.3)
        latencies = []
        for number in range(NUM_SHORT):
            if large is not None and large.done():
                break
            began = time.perf_counter()
            await embed(client, [f"a short text, number {number}"])
            latencies.append(time.perf_counter() - began)
        if large is not None:
            await large
    return latencies


def p95(values: Sequence[float]) -> float:
    """The value that one in twenty exceeds (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-95 * len(ordered) // 100) - 1)]


def latency(seconds: Sequence[float]) -> str:
    """For people."""
    return f"{1e3 * p95(seconds):.0f} ms of {len(seconds)}" if seconds else "the large one had ended before"


@dataclass(frozen=True, slots=True)
class Row:
    """One number of texts at one number of clients; texts a second, of the middle round each."""

    num_texts: int
    clients: int
    ours: float
    theirs: float
    ratio: float
    """The middle one of the rounds' own."""


def markdown(rows: Sequence[Row], facts: Sequence[tuple[str, str]]) -> str:
    """The facts, then a row for each."""
    lines = [f"- {name}: {value}" for name, value in facts]
    lines += ["", "| texts | clients | lmserve, texts/s | sentence-transformers, texts/s | ratio |"]
    lines.append("|---|---|---|---|---|")
    lines += [f"| {r.num_texts:,} | {r.clients} | {r.ours:.0f} | {r.theirs:.0f} | {r.ratio:.2f} |" for r in rows]
    return "\n".join(lines)


@contextmanager
def _server(machine: Machine, folder: str, options: Sequence[str]) -> Iterator[Server]:
    port = free_port()
    named = Machine(f"{MODEL_ID}={folder}", machine.device, machine.dtype, machine.threads)
    with Server([*lmserve_command(named, port), *options], port, machine.environment) as server:
        yield server


class Run:
    """One run of the benchmark: the same texts for both. Keeps how far the vectors were apart at most."""

    def __init__(self, options: argparse.Namespace, peer: Peer, server: Server) -> None:
        self.worst = 0.0
        self._options = options
        self._peer = peer
        self._base_url = server.base_url

    def throughput(self) -> list[Row]:
        """A row for each number of texts at each number of clients.

        Raises:
            StartFailed: one of the two has failed, or the vectors differ.
        """
        rows = []
        for size in self._options.texts:
            texts = make_texts(size)
            self._round(texts[:64], 1)  # both have run once before it counts
            rows += [self._measure(texts, clients) for clients in self._options.clients]
        return rows

    def latencies(self) -> list[tuple[str, str]]:
        """Facts about a short text, alone and beside a large request."""
        large = LARGE_IF_QUICK if self._options.quick else LARGE
        alone = asyncio.run(short_latencies(self._base_url, beside=()))
        beside = asyncio.run(short_latencies(self._base_url, beside=make_texts(large, seed=1)))
        return [
            ("one short text alone, p95", latency(alone)),
            (f"one short text beside a request of {large:,}, p95", latency(beside)),
        ]

    def _measure(self, texts: Sequence[str], clients: int) -> Row:
        rounds = [self._round(texts, clients) for _ in range(self._options.rounds)]
        ours, theirs = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
        ratio = statistics.median(theirs / ours for ours, theirs in rounds)
        row = Row(len(texts), clients, len(texts) / ours, len(texts) / theirs, ratio)
        print(row, file=sys.stderr, flush=True)
        return row

    def _round(self, texts: Sequence[str], clients: int) -> tuple[float, float]:
        """Seconds of ours and of theirs."""
        theirs, expected = self._peer.encode(texts)
        ours, vectors = asyncio.run(closed_loop(self._base_url, texts, clients, self._options.batch))
        self.worst = max(self.worst, float(np.abs(vectors - expected).max()))
        if not self.worst <= MAX_DIFFERENCE[self._options.dtype]:
            raise StartFailed(f"the vectors differ by {self.worst:.2g}: no time is worth telling")
        return ours, theirs


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    machine = Machine(str(options.model), "cpu", options.dtype, options.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # unwinds, so that both are ended too
    try:
        with Peer(machine) as peer, _server(machine, machine.model, options.option) as server:
            run = Run(options, peer, server)
            try:
                rows, latencies = run.throughput(), run.latencies()
            except httpx.HTTPError as error:
                raise StartFailed(f"lmserve: {error!r}\n{server.last_words()}") from error
    except StartFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(markdown(rows, [*facts(options), ("largest difference of a number", f"{run.worst:.1e}"), *latencies]))
    return 0


def facts(options: argparse.Namespace) -> list[tuple[str, str]]:
    """What a reader needs to judge the table."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    lengths = [len(ids) for ids in tokenizer(make_texts(max(options.texts)))["input_ids"]]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "sentence-transformers"))
    return [
        ("model", f"{options.model.name}, {options.dtype}, {options.threads} threads"),
        ("versions", f"lmserve {__version__}, {versions}"),
        ("texts", f"{min(lengths)} to {max(lengths)} tokens, {statistics.mean(lengths):.0f} on average"),
        ("requests", f"at most {options.batch} texts each; sentence-transformers' batches: {PEER_BATCH}"),
        ("rounds", f"{options.rounds}, of which the middle one is told"),
        *([("options", " ".join(options.option))] if options.option else []),
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.embeddings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=model_folder, help="sentence-transformers folder")
    parser.add_argument("--dtype", default="float32", choices=sorted(MAX_DIFFERENCE))
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=positive, default=64, help="texts of one request at most")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--texts", type=positive, nargs="+", default=SIZES, help="how many texts")
    parser.add_argument("--clients", type=positive, nargs="+", default=CLIENTS, help="how many clients")
    parser.add_argument("--option", nargs="+", default=[], help="more of the server's options, without their dashes")
    parser.add_argument("--quick", action="store_true", help="one round of 64 texts")
    parsed = parser.parse_args(arguments)
    parsed.option = [f"--{each}" for each in parsed.option]
    if parsed.quick:
        parsed.rounds, parsed.texts = 1, (64,)
    return parsed


if __name__ == "__main__":
    sys.exit(main())
