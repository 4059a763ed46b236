"""The native sources as shared objects: compiled by the system's compiler at first use, kept, loaded with ctypes.

A shared object is kept under the hash of everything that decides what is in it: the text, the headers, the flags, the
compiler and the processor. It is linked against the OpenMP library that torch brings, so that one team of threads
serves both: two teams on the same processors would wait for each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from lmserve.config import cache_folder

HEADERS = Path(__file__).parent / "src"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
)
COMPILERS = ("c++", "g++", "clang++")
COMPILE_SECONDS = 300.0
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16")


class NativeUnavailable(Exception):
    """There can be no native code here; the message says why, as a clause."""


def build_source(source: str, name: str) -> ctypes.CDLL:
    """Compiles (unless it was done before) and loads a translation unit that may include the headers beside this file.

    Raises:
        NativeUnavailable: no compiler, no processor for it, or the compiler refuses the text.
    """
    target = compiled(source, name)
    try:
        return ctypes.CDLL(str(target), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError as error:
        raise NativeUnavailable(f"its native code cannot be loaded: {error}") from error


def compiled(source: str, name: str) -> Path:
    """The shared object of a text, made if it is not there yet. Raises as ``build_source`` does."""
    compiler = find_compiler()
    headers = [path.read_bytes() for path in sorted(HEADERS.glob("*.h"))]
    facts = [source.encode(), *headers, *map(str.encode, FLAGS), compiler_version(compiler), processor_flags().encode()]
    digest = hashlib.sha256(b"\0".join(facts)).hexdigest()[:24]
    target = cache_folder() / "native" / f"{name}-{digest}.so"
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, source, name, target)
    except OSError as error:
        raise NativeUnavailable(f"its native code cannot be kept: {error}") from error
    return target


def check_available() -> None:
    """Raises NativeUnavailable where native code cannot run, whatever the model."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise NativeUnavailable("there is native code for Linux on x86-64 only")
    lacking = [flag for flag in NEEDED if flag not in processor_flags().split()]
    if lacking:
        raise NativeUnavailable(f"the processor lacks {lacking[0]}")
    find_compiler()


def find_compiler() -> str:
    """Raises NativeUnavailable: there is none."""
    for name in filter(None, (os.environ.get("CXX"), *COMPILERS)):
        found = shutil.which(name)
        if found:
            return found
    raise NativeUnavailable("there is no C++ compiler")


@functools.cache
def compiler_version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout


@functools.cache
def processor_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")


def _compile(compiler: str, source: str, name: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        text, made = Path(folder) / f"{name}.cpp", Path(folder) / f"{name}.so"
        text.write_text(source)
        command = [compiler, *FLAGS, f"-I{HEADERS}", str(text), "-o", str(made), *_openmp()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeUnavailable(f"the compiler does not run: {error}") from error
        if done.returncode != 0:
            raise NativeUnavailable(f"the compiler refuses {name}: {_first_error(done.stderr)}")
        made.replace(target)


def _openmp() -> list[str]:
    """torch's own OpenMP library where it brings one; else the compiler's, which is then torch's, too."""
    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]]


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line]
    return (lines or text.splitlines() or ["?"])[0][:300]
