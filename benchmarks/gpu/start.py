"""How long a start takes with and without compiling: with nothing compiled before (cold), and once more (warm).

Each is a process of its own, as a worker is. Those with and those without have a folder for compiled code each, which
is empty before the cold ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from benchmarks.gpu.environment import ROOT
from benchmarks.gpu.models import serve
from benchmarks.gpu.results import Row, Skipped
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.streams import prompts, whole

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
PROMPT = 64


@dataclass(frozen=True, slots=True)
class Start:
    """What one took."""

    seconds: float
    """From weights on the device to a model that could serve."""
    first_token: float
    """Seconds from there to the first token."""
    said: str
    """What a person would have been told of it."""


def run(setting: Setting) -> Iterator[Row]:
    if not setting.is_cuda:
        raise Skipped("needs CUDA: layers are compiled nowhere else")
    with (
        tempfile.TemporaryDirectory(prefix="lmserve-eager-") as for_eager,
        tempfile.TemporaryDirectory(prefix="lmserve-compiled-") as for_compiled,
    ):
        for name in ("cold", "warm"):  # attention's kernels are compiled in any case
            eager, compiled = _begin(setting, for_eager, compiled=False), _begin(setting, for_compiled, compiled=True)
            yield _row(f"eager, {name}", eager)
            yield _row(f"compiled, {name}", compiled)
            yield Row(f"more than eager, {name}", compiled.seconds - eager.seconds, "s")


def _row(name: str, found: Start) -> Row:
    note = f"first token {found.first_token:.1f} s later; {found.said or 'nothing was said'}"
    return Row(name, found.seconds, "s", note=note)


def _begin(setting: Setting, folder: str, *, compiled: bool) -> Start:
    """What a process that starts a model has to say. Raises RuntimeError with the last words of one that fails."""
    environ = {**os.environ, **{name: os.path.join(folder, name.lower()) for name in CACHES}}
    command = [sys.executable, "-m", "benchmarks.gpu.start", setting.to_json(), "compiled" if compiled else "eager"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"a start failed: {done.stderr.strip()[-300:]}")
    return Start(**json.loads(done.stdout.strip().split("\n")[-1]))


def main() -> None:
    """One start, in this process: prints what it took as a line of JSON."""
    setting, compiled = Setting.from_json(sys.argv[1]), sys.argv[2] == "compiled"
    served = serve(setting, compile=compiled)
    began = time.perf_counter()
    whole(served.engine(), prompts(1, PROMPT, served.runner.info.vocab_size, 1), 1)
    first_token = time.perf_counter() - began
    said = "; ".join(sentence for sentence in served.said if ":" in sentence)
    print(json.dumps(asdict(Start(served.seconds, first_token, said))))


if __name__ == "__main__":
    main()
