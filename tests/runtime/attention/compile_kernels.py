"""Builds what the backend would launch on a GPU that need not be there, and says what came out.

A script; its arguments are a capability (90, say) and a folder. It writes JSON: by case and kernel, registers, spills,
shared memory, instructions, and asynchronous copies by their bytes.

A process of its own, because the tests run with Triton's interpreter, which replaces its compiler. The backend computes
a step over a real cache, on CPU tensors; its kernels are compiled for the arguments that they get, as before a launch,
and not launched.
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

from lmserve.runtime.attention import triton as backend_module
from lmserve.runtime.attention.base import CacheLayout, LayerOptions, Span
from lmserve.runtime.attention.triton import TritonBackend
from lmserve.runtime.kv_cache import KVCache, LayerShape

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
EVERYTHING = LayerOptions(0.1, 4096, 30.0, torch.zeros(32, dtype=BF16))
CASES = {
    "128": (32, LayerShape(8, 128, 128), BF16, LayerOptions(0.1)),
    "128 in 8 bits": (32, LayerShape(8, 128, 128), FP8, LayerOptions(0.1)),
    "256 with everything": (8, LayerShape(4, 256, 256), BF16, EVERYTHING),
    "512": (8, LayerShape(1, 512, 512), BF16, LayerOptions(0.1)),
}
SPANS = [
    Span(0, 1, 700, list(range(44))),
    Span(1, 1, 33, list(range(44, 47))),
    Span(2, 9, 25, list(range(47, 49))),
]
KERNELS = {"write_kernel": "write", "decode_kernel": "decode", "combine_kernel": "combine", "prompt_kernel": "prompt"}


class Elsewhere:
    """In place of Triton's driver: names the GPU that is compiled for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class CompiledOnly:
    """In place of a kernel: compiles it when it would be launched."""

    def __init__(self, kernel: Any, name: str, into: dict[str, Any]) -> None:
        self._kernel, self._name, self._into = kernel, name, into

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_(*arguments: Any, **constants: Any) -> None:
            self._into[self._name] = self._kernel.run(*arguments, grid=grid, warmup=True, **constants)

        return compile_


def compile_step(capability: int, case: str) -> dict[str, Any]:
    """The kernels of one layer's part of a step with decodes and a chunk."""
    num_heads, shape, cache_dtype, options = CASES[case]
    layout = CacheLayout(16, 60, torch.device("cpu"), BF16, cache_dtype)
    cache = KVCache({0: shape}, layout).layers[0]
    num_tokens = SPANS[-1].row + SPANS[-1].q_len
    sizes = ((num_heads, shape.key_size), (shape.num_kv_heads, shape.key_size), (shape.num_kv_heads, shape.value_size))
    q, k, v = (torch.zeros(num_tokens, heads * size, dtype=BF16).view(-1, heads, size) for heads, size in sizes)
    backend = TritonBackend(layout)
    backend.capability = capability
    made: dict[str, Any] = {}
    for attribute, name in KERNELS.items():
        kernel = getattr(backend_module, attribute)
        setattr(backend_module, attribute, CompiledOnly(getattr(kernel, "_kernel", kernel), name, made))
    backend.write(k, v, cache, torch.arange(num_tokens))
    backend.attend(q, k, v, cache, backend.plan(SPANS), options)
    return made


def look_at(kernel: Any, folder: Path) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])

    def dump(option: str) -> str:
        return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage")))
    found = re.findall(r"\b(HMMA|HGMMA|UTCHMMA|LDGSTS|STL|LDL)\b", dump("--dump-sass"))
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", kernel.asm["ptx"])
    return {
        **{key: int(value) for key, value in usage.items()},
        "shared": kernel.metadata.shared,
        "instructions": Counter(found),
        "copies": Counter(int(num_bytes, 0) for num_bytes in copies),
    }


def main() -> None:
    capability, folder = int(sys.argv[1]), Path(sys.argv[2])
    triton.runtime.driver.set_active(Elsewhere(capability))
    built = {
        f"{name} {case}": look_at(kernel, folder)
        for case in CASES
        for name, kernel in compile_step(capability, case).items()
    }
    print(json.dumps(built))  # noqa: T201


if __name__ == "__main__":
    main()
