"""Greedy choices in native code."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from lmserve.runtime.native.compiler import build_source, check_available


@functools.cache
def _library() -> ctypes.CDLL:
    check_available()
    library = build_source((Path(__file__).parent / "src" / "sampling.cpp").read_text(), "sampling")
    library.lm_first_largest.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
    ]
    return library


def first_largest(logits: Tensor) -> Tensor:
    """(rows, vocab) float32 or bfloat16 on the CPU -> (rows,) int64: the lowest id with the row's largest logit.

    -1 where a logit is not a number, or none is above minus infinity. Raises NativeUnavailable.
    """
    assert logits.stride(1) == 1
    rows, vocab = logits.shape
    result = torch.empty(rows, dtype=torch.int64)
    _library().lm_first_largest(
        logits.data_ptr(),
        logits.dtype == torch.bfloat16,
        logits.stride(0),
        rows,
        vocab,
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result
