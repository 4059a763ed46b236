"""Attention over the paged cache in native code, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmserve.runtime.attention.base import CacheLayout, LayerCache, Span, visible
from lmserve.runtime.native.build import FORMATS, _pack
from lmserve.runtime.native.plan import plan
from lmserve.runtime.native.program import Limits, Program, compile_segments
from lmserve.runtime.native.trace import trace
from tests.runtime.native.availability import needs_native

pytestmark = needs_native
NUM_TOKENS = 400
"""Different ones: each has a query, a key and a value of its own."""


@dataclass(frozen=True, slots=True)
class Case:
    heads: int = 6
    kv_heads: int = 2
    key_size: int = 64
    value_size: int = 64
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    block_size: int = 16
    scaling: float = 0.2


class OneLayer(nn.Module):
    """A token's embedding is its query, key and value; logits are what attention makes of them."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case, self.dtype = case, dtype
        self.widths = [
            case.heads * case.key_size, case.kv_heads * case.key_size, case.kv_heads * case.value_size
        ]  # fmt: skip
        out = case.heads * case.value_size
        self.embed = nn.Embedding(NUM_TOKENS, sum(self.widths))
        self.head = nn.Linear(out, out, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(out))
        self.sinks = nn.Parameter(torch.randn(case.heads))
        self.to(dtype).requires_grad_(False)

    def split(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, heads, T, size) each."""
        case, parts = self.case, torch.split(self.embed(ids), self.widths, -1)
        heads = (case.heads, case.kv_heads, case.kv_heads)
        q, k, v = (part.view(*ids.shape, n, -1).transpose(1, 2) for part, n in zip(parts, heads, strict=True))
        return q, k, v

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool, logits_to_keep: Tensor) -> Any:
        case = self.case
        sinks = self.sinks if case.sinks else None
        out = torch.ops.lmserve.attend(*self.split(input_ids), 0, case.scaling, case.window, case.softcap, sinks)
        # Logits that do not depend on positions would not be asked for them.
        kept = (out.flatten(2) + 0.0 * position_ids[..., None].to(self.dtype))[:, logits_to_keep]
        return SimpleNamespace(logits=self.head(kept))


class Machine:
    """One layer as a program, with a cache whose blocks are handed out in disorder."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.bfloat16, num_blocks: int = 300) -> None:
        self.case, self.model = case, OneLayer(case, dtype)
        self.layout = CacheLayout(case.block_size, num_blocks, torch.device("cpu"), dtype)
        slots = self.layout.num_slots
        cache = LayerCache(
            torch.zeros(slots, case.kv_heads, case.key_size, dtype=dtype),
            torch.zeros(slots, case.kv_heads, case.value_size, dtype=dtype),
        )
        with torch.no_grad():
            graph = trace(self.model)
            made = plan(graph)
            segments = compile_segments(graph, made)
            weights = _pack(self.model, graph, made, FORMATS[dtype])
        self.program = Program(graph, made, segments, [cache], self.layout, Limits(600, 600), weights)
        self.free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()

    def step(self, chunks: list[tuple[Tensor, int, list[int]]]) -> list[Tensor]:
        """Each (ids, start, block table); the new rows of each."""
        ids, positions, slots, spans, row = [], [], [], [], 0
        for new, start, table in chunks:
            where = torch.arange(start, start + len(new))
            ids.append(new)
            positions.append(where)
            blocks = torch.tensor(table)
            slots.append(blocks[where // self.case.block_size] * self.case.block_size + where % self.case.block_size)
            spans.append(Span(row, len(new), start + len(new), table))
            row += len(new)
        out = self.program.run(torch.cat(ids), torch.cat(positions), torch.cat(slots), torch.arange(row), spans)
        return list(torch.split(out.clone(), [len(new) for new, _, _ in chunks]))

    def table(self, num_tokens: int) -> list[int]:
        count = -(-num_tokens // self.case.block_size)
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def expected(self, ids: Tensor) -> Tensor:
        """(T, heads * value size) in float64, each token attending to those before it."""
        case = self.case
        q, k, v = (part[0].double() for part in self.model.split(ids[None]))
        k, v = (part.repeat_interleave(case.heads // case.kv_heads, 0) for part in (k, v))
        scores = q @ k.transpose(1, 2) * case.scaling
        if case.softcap:
            scores = torch.tanh(scores / case.softcap) * case.softcap
        where = torch.arange(len(ids))
        scores = scores.masked_fill(~visible(where, where, case.window or None), float("-inf"))
        if case.sinks:
            sinks = self.model.sinks.double()[:, None, None].expand(-1, len(ids), 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)


CASES = {
    "grouped": Case(),
    "one head each": Case(heads=3, kv_heads=3),
    "many heads of one": Case(heads=14, kv_heads=2, key_size=128, value_size=128),
    "window": Case(window=37),
    "softcap": Case(softcap=1.5),
    "sinks": Case(sinks=True),
    "all": Case(window=20, softcap=2.0, sinks=True, key_size=256, value_size=256),
    "smaller values": Case(key_size=96, value_size=64),
    "odd sizes": Case(key_size=24, value_size=20),
    "small blocks": Case(block_size=1),
    "odd blocks": Case(block_size=5),
}


def near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    error = float((got.double() - expected).norm() / expected.norm())
    return error < (1e-5 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_whole_prompts_chunks_and_decodes(name: str, dtype: torch.dtype) -> None:
    machine = Machine(CASES[name], dtype)
    sequences = [torch.randint(0, NUM_TOKENS, (length,)) for length in (131, 70, 9)]
    expected = [machine.expected(ids) for ids in sequences]
    tables = [machine.table(len(ids)) for ids in sequences]
    done = [0, 0, 0]
    for takes in ((100, 1, 5), (1, 68, 1), (29, 1, 1), (1, 0, 1), (0, 0, 1)):
        chunks = [
            (ids[at : at + n], at, table) for ids, at, n, table in zip(sequences, done, takes, tables, strict=True) if n
        ]
        got = iter(machine.step(chunks))
        for i, n in enumerate(takes):
            if n:
                assert near(next(got), expected[i][done[i] : done[i] + n], dtype), (name, takes, i)
            done[i] += n
    assert done == [131, 70, 9]


def test_neither_neighbours_nor_cuts_change_a_bit() -> None:
    ids, other = torch.randint(0, NUM_TOKENS, (150,)), torch.randint(0, NUM_TOKENS, (90,))
    machine = Machine(Case())
    (alone,) = machine.step([(ids, 0, machine.table(150))])
    table, others = machine.table(150), machine.table(90)
    first, _ = machine.step([(ids[:64], 0, table), (other[:33], 0, others)])
    _, second = machine.step([(other[33:80], 33, others), (ids[64:149], 64, table)])
    assert torch.equal(torch.cat([first, second]), alone[:149])
    (decoded,) = machine.step([(ids[149:], 149, table)])
    _, again = machine.step([(other[80:81], 80, others), (ids[149:], 149, table)])
    assert torch.equal(decoded, again)


def test_a_long_context() -> None:
    machine = Machine(Case(heads=4, kv_heads=1), num_blocks=400)
    ids = torch.randint(0, NUM_TOKENS, (2500,))
    table = machine.table(2500)
    for start in range(0, 2400, 600):
        machine.step([(ids[start : start + 600], start, table)])
    (last,) = machine.step([(ids[2400:2499], 2400, table)])
    (decoded,) = machine.step([(ids[2499:], 2499, table)])
    expected = machine.expected(ids)
    assert near(last, expected[2400:2499], torch.bfloat16)
    assert near(decoded, expected[2499:], torch.bfloat16)
