"""FlashAttention 3 for prompts' chunks, on Hopper, for those who have its package; the Triton kernels for the rest.

torch calls it through its attention over sequences of unequal lengths, which reads a paged cache from torch 2.12 on.
Only FlashAttention 3 may do that: torch's own FlashAttention 2 gives wrong results over pages once it splits a context
(pytorch issue 194167). Which of the two torch calls is a setting of the whole process, so it is looked at before each
call. Contexts are not split here either, because torch would decide on that by a row's company.

Decodes are the Triton kernels', also in captured steps: they are as fast as memory there already, and how they cut a
context does not depend on the other sequences. So are layers with what torch does not pass on (a softcap, sinks, keys
and values of unequal sizes, 8 bits) and steps with images.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.attention.base import CacheLayout, LayerCache, LayerOptions, Span
from lmserve.runtime.attention.triton import Prompts, TritonBackend, TritonPlan
from lmserve.runtime.transfer import send

IMPLEMENTATION = "FA3"
PAGED = frozenset({"enable_gqa", "seqused_k", "block_table", "num_splits"})
"""What torch's function has to take."""
MOST_HEAD_SIZE, HEAD_SIZE_STEP = 256, 8
HOPPER_MAJOR = 9


@dataclass(frozen=True, slots=True)
class Packed:
    """Chunks whose rows lie side by side in the packed step."""

    rows: slice
    starts: Tensor
    """(chunks + 1,) int32: where each begins among these rows, and where the last ends."""
    longest: int
    longest_context: int


@dataclass(frozen=True, slots=True)
class Fa3Plan(TritonPlan):
    """One step, with what torch wants to know of its prompts; None where the Triton kernels do them."""

    packed: Packed | None = None


class Fa3Backend(TritonBackend):
    """See the module."""

    name: ClassVar[str] = "fa3"
    runs_on_cpu: ClassVar[bool] = False

    def __init__(self, layout: CacheLayout) -> None:
        """Raises ModelLoadFailed with a sentence about what is missing."""
        why_not = lacking(frozenset(inspect.signature(varlen_attn).parameters), _major(layout.device)) or _activate()
        if why_not:
            raise ModelLoadFailed(f"the attention backend fa3 cannot be had: {why_not}")
        super().__init__(layout)

    def plan(self, spans: list[Span]) -> Fa3Plan:
        plan = super().plan(spans)
        return Fa3Plan(plan.decodes, plan.prompts, plan.num_rows, pack(spans, self.layout.device))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, plan: TritonPlan, options: LayerOptions
    ) -> Tensor:
        packed = plan.packed if isinstance(plan, Fa3Plan) else None
        prompts = plan.prompts
        if packed is None or prompts is None or not takes(q, cache, options) or not _is_active():
            return super().attend(q, k, v, cache, plan, options)
        rest = TritonPlan(plan.decodes, None, plan.num_rows - packed.rows.stop + packed.rows.start)
        out = super().attend(q, k, v, cache, rest, options)
        attended: Any = varlen_attn(**arguments(q, cache, prompts, packed, options, self.layout.block_size))
        out[packed.rows] = attended
        return out


def lacking(parameters: frozenset[str], major: int) -> str:
    """Why this torch and this device will not do; nothing if they will.

    Args:
        parameters: of torch's function.
        major: the first number of the device's capability; 0 for what is no CUDA device.
    """
    if not parameters >= PAGED:
        return f"torch {torch.__version__} does not read a paged cache through it; 2.12 does"
    if major != HOPPER_MAJOR:
        return "it is for Hopper GPUs (capability 9.0)"
    return ""


def pack(spans: list[Span], device: torch.device) -> Packed | None:
    """The chunks of several tokens among the spans; None if there are none, if others stand between them or if there
    are images, whose tokens see what comes behind them."""
    chunks = [span for span in spans if span.q_len > 1]
    follow_each_other = all(a.row + a.q_len == b.row for a, b in zip(chunks, chunks[1:], strict=False))
    if not chunks or not follow_each_other or any(span.has_image_rows for span in spans):
        return None
    lengths = [span.q_len for span in chunks]
    return Packed(
        slice(chunks[0].row, chunks[-1].row + chunks[-1].q_len),
        send(np.cumsum([0, *lengths], dtype=np.int32), device),
        max(lengths),
        max(span.kv_len for span in chunks),
    )


def takes(q: Tensor, cache: LayerCache, options: LayerOptions) -> bool:
    """Whether torch's function can do this layer."""
    key_size, value_size = cache.k.shape[2], cache.v.shape[2]
    in_16_bits = q.dtype in (torch.bfloat16, torch.float16)
    fits = key_size == value_size <= MOST_HEAD_SIZE and key_size % HEAD_SIZE_STEP == 0
    return fits and in_16_bits and cache.k.dtype == q.dtype and not options.needs_dense


def arguments(
    q: Tensor, cache: LayerCache, prompts: Prompts, packed: Packed, options: LayerOptions, block_size: int
) -> dict[str, Any]:
    """Of torch's function, for a step's chunks."""
    key_pages, value_pages = (pool.view(-1, block_size, *pool.shape[1:]) for pool in (cache.k, cache.v))
    return {
        "query": q[packed.rows],
        "key": key_pages,
        "value": value_pages,
        "cu_seq_q": packed.starts,
        "cu_seq_k": None,
        "max_q": packed.longest,
        "max_k": packed.longest_context,
        "scale": options.scaling,
        "window_size": (-1 if options.window is None else options.window - 1, 0),
        "enable_gqa": True,
        "seqused_k": prompts.kv_lens,
        "block_table": prompts.tables,
        "num_splits": 1,
    }


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _activate() -> str:
    """Has torch call FlashAttention 3, in this process and from now on. What stands against it; nothing if it does."""
    if _is_active():
        return ""
    try:
        activate_flash_attention_impl(IMPLEMENTATION)
    except (ImportError, RuntimeError, ValueError) as error:
        return f"FlashAttention 3 (the package flash-attn-3) cannot be loaded: {error}"
    return "" if _is_active() else "torch does not say that it calls FlashAttention 3"


def _is_active() -> bool:
    return current_flash_attention_impl() == IMPLEMENTATION
