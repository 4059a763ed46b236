"""What the CPU attention backend's choices cost, as ratios within one run.

    python benchmarks/attention.py [--threads 2]

For decodes of B sequences with L tokens each (heads as in SmolLM2-135M: 9 over 3, size 64): a gather and one fused
call with the query heads folded into rows (what the backend does), the gather alone, one call a sequence read in
place, and one call with grouped heads instead of folded ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

KV_HEADS, GROUP, SIZE, BLOCK = 3, 3, 64, 16
SHAPES = ((1, 192), (8, 192), (32, 192), (4, 1024), (1, 4096))


def median_us(work: Callable[[], object], repeats: int = 15) -> float:
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def measure(dtype: torch.dtype, batch: int, length: int) -> list[float]:
    blocks = batch * length // BLOCK
    pools = [torch.randn(2 * blocks, BLOCK * KV_HEADS * SIZE).to(dtype) for _ in "kv"]
    table = torch.randperm(2 * blocks)[:blocks]
    q = torch.randn(batch, KV_HEADS, GROUP, SIZE).to(dtype)
    bias = torch.zeros(batch, 1, 1, length, dtype=dtype)

    def gather() -> list[Tensor]:
        return [pool.index_select(0, table).view(batch, length, KV_HEADS, SIZE).transpose(1, 2) for pool in pools]

    def folded() -> Tensor:
        keys, values = gather()
        return scaled_dot_product_attention(q, keys, values, attn_mask=bias)

    k, v = gather()
    return [
        median_us(folded),
        median_us(gather),
        median_us(
            lambda: [scaled_dot_product_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(batch)]
        ),
        median_us(
            lambda: scaled_dot_product_attention(
                q.reshape(batch, KV_HEADS * GROUP, 1, SIZE), k, v, attn_mask=bias, enable_gqa=True
            )
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    print(
        "| dtype | sequences | tokens | gather and folded call, us | gather alone | a call a sequence | grouped heads |"
    )
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        for batch, length in SHAPES:
            ours, *others = measure(dtype, batch, length)
            ratios = " | ".join(f"{other / ours:.2f}" for other in others)
            print(f"| {str(dtype)[6:]} | {batch} | {length} | {ours:.0f} | {ratios} |")


if __name__ == "__main__":
    main()
