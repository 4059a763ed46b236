"""Builds the attention kernels for a GPU that need not be there, and says what came out.

A script; its arguments are a capability (90, say) and a folder.

A process of its own, because the tests run with Triton's interpreter, which replaces its compiler.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmserve.runtime.attention.base import CacheLayout, LayerCache, LayerOptions
from lmserve.runtime.attention.triton import Shape, TritonBackend
from lmserve.runtime.attention.triton_kernels import decode_kernel, prompt_kernel

HEADS, KV_HEADS = 32, 8
LENGTHS = {"TABLES", "TABLE_ROWS", "KV_LENS", "ROWS", "Q_LENS", "TILE_SPAN", "TILE_FIRST", "ROW_ENDS"}
PARTS = {"PARTS", "PART_MAX", "PART_SUM"}
STRIDES = {"q_token", "q_head", "o_token", "o_head", "table_width", "window"}
FORMATS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float8_e4m3fn: "*fp8e4nv"}


def build(capability: int, *, is_decode: bool, head_size: int, cache_dtype: torch.dtype) -> dict[str, Any]:
    """Registers, spills, shared memory, and how often instructions of a few kinds occur."""
    backend = TritonBackend(CacheLayout(16, 8, torch.device("meta"), torch.bfloat16))
    q = torch.empty(4, HEADS, head_size, dtype=torch.bfloat16)
    pool = torch.empty(16, KV_HEADS, head_size, dtype=cache_dtype)
    shape = Shape.of(q, LayerCache(pool, pool), capability, is_decode=is_decode)
    constants = backend.constants(shape, LayerOptions(0.1), is_decode=is_decode)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    if not is_decode:
        constants["HAS_ENDS"] = False
    function = decode_kernel if is_decode else prompt_kernel
    names = function.arg_names
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("KEYS", "VALUES"):
            signature[name] = FORMATS[cache_dtype]
        elif name in ("Q", "OUT", "SINKS"):
            signature[name] = "*bf16"
        elif name in LENGTHS | PARTS:
            signature[name] = "*i32" if name in LENGTHS else "*fp32"
        else:
            signature[name] = "i32" if name in STRIDES else "fp32"
    # what a launch finds out of its arguments: see test_real_arguments_are_aligned
    aligned = {"Q", "OUT", "KEYS", "VALUES", "SINKS"} | LENGTHS | PARTS | STRIDES
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned}
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared": kernel.metadata.shared, **look_at(kernel.asm["cubin"], kernel.asm["ptx"])}


def look_at(cubin: bytes, ptx: str) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    file = Path(sys.argv[2]) / "kernel.cubin"
    file.write_bytes(cubin)

    def dump(option: str) -> str:
        return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage")))
    found = Counter(re.findall(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA|QMMA|LDGSTS|STL|LDL)\b", dump("--dump-sass")))
    wide = len(
        re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x10\b|cp\.async\.c[ag]\.shared\.global[^;]*?, 16\b", ptx)
    )
    return {**{key: int(value) for key, value in usage.items()}, "instructions": dict(found), "wide_copies": wide,
            "copies": ptx.count("cp.async.c")}  # fmt: skip


def main() -> None:
    capability = int(sys.argv[1])
    formats = [torch.bfloat16] + ([torch.float8_e4m3fn] if capability >= 89 else [])
    built = {}
    for dtype in formats:
        for is_decode in (True, False):
            for head_size in (128, 256) if dtype == torch.bfloat16 else (128,):
                name = f"{'decode' if is_decode else 'prompt'} {head_size} {str(dtype).removeprefix('torch.')}"
                built[name] = build(capability, is_decode=is_decode, head_size=head_size, cache_dtype=dtype)
    print(json.dumps(built))  # noqa: T201


if __name__ == "__main__":
    main()
