"""A model's layers through torch.compile: their many small operations become few.

Each layer is compiled by itself, and all of a kind share one program: compiling takes as long for forty layers as for
one. Everything is compiled at load, for any number of rows, and tried there; a model that torch cannot compile as a
whole layer at a time runs as it is written. Afterwards nothing is compiled any more: a call that no program fits, which
is not known to happen, runs as it is written, too, instead of keeping everybody waiting.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._pytree import tree_leaves

from lmserve.config import cache_folder
from lmserve.runtime.attention_op import has_handle
from lmserve.runtime.packed_lane import PackedLane

LEARNT_ROWS = (61, 7)
"""Numbers of rows that the layers are compiled from: sizes that nothing else in a model has."""
TRIED_ROWS = 23
"""One more, for which nothing must be left to compile."""
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Where torch and Triton look for what they have compiled before, and what we call the folders."""

Backend = str | Callable[..., Any]
"""As torch.compile takes it."""


def keep_compiled_code(environ: MutableMapping[str, str] = os.environ) -> None:
    """Has torch and Triton keep what they compile under our cache folder, if nobody has named another place.

    To be called before either has compiled anything.
    """
    # torch's own choice, a temporary folder, stands there as soon as a part of it has been imported.
    unnamed = {None, os.path.abspath(default_cache_dir())}
    for variable, folder in CACHES.items():
        if environ.get(variable) in unnamed:
            environ[variable] = str(cache_folder(environ) / folder)


@torch.inference_mode()
def compile_layers(lane: PackedLane, *, most_rows: int = 0, backend: Backend = "inductor") -> str:
    """Compiles the lane's model layer by layer, and tries it in the cache's first blocks, which are overwritten.

    The lane is attached. The device's settings (number of threads, precision of products) and the number formats are
    to be as they will be in serving: a program fits no others.

    Args:
        most_rows: of a step. It is tried with so many, too, as far as the cache has room.

    Returns:
        Why the model runs as it is written, for the start-up message; nothing if it is compiled.
    """
    layers = find_layers(lane.model)
    if not layers:
        return "its layers are not compiled: they stand in no list"
    parts = CompiledLayers(layers, backend)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about what it meets in transformers
            _learn(lane, parts, most_rows)
    except torch.AcceleratorError:  # the device has failed, not the compiler
        raise
    except Exception as error:  # whatever the tracer, the compiler, or the compiler's compiler raises
        parts.remove()
        return f"its layers are not compiled: {_first_words(error)}"
    finally:
        if backend == "inductor":  # processes that have compiled beside this one; nothing is left for them to do
            import_module("torch._inductor.async_compile").shutdown_compile_workers()
    parts.serve()
    lane.compiled = parts
    return ""


def _learn(lane: PackedLane, parts: CompiledLayers, most_rows: int) -> None:
    grids = (1, 4) if hasattr(lane.model.base_model, "get_rope_index") else (1,)
    for num_rows in LEARNT_ROWS:
        with parts.learning(num_rows):
            for num_position_rows in grids:
                lane.rehearse(num_rows, num_position_rows)
    with parts.learnt():
        for num_rows in (TRIED_ROWS, max(TRIED_ROWS, most_rows)):
            for num_position_rows in grids:
                lane.rehearse(num_rows, num_position_rows)


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The members of the list in which most of the attention layers stand that a lane has probed."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    best = max(lists, key=_num_with_attention, default=None)  # the outermost, if several are alike
    return [] if best is None or _num_with_attention(best) == 0 else list(best)


def _num_with_attention(layers: nn.ModuleList) -> int:
    return sum(any(has_handle(module) for module in layer.modules()) for layer in layers)


class CompiledLayers:
    """Owns how a model's layers are called: compiled, or as they are written.

    Implements ``lmserve.runtime.packed_lane.CompiledParts``.
    """

    def __init__(self, layers: list[nn.Module], backend: Backend) -> None:
        self._layers: list[Any] = layers
        self._compiled: list[Callable[..., Any]] = [
            torch.compile(layer._call_impl, fullgraph=True, backend=backend) for layer in layers
        ]
        # Never compiles: it runs a program that fits, or the layer itself.
        self._ready: list[Callable[..., Any]] = [torch._dynamo.run(layer._call_impl) for layer in layers]

    @contextmanager
    def learning(self, num_rows: int) -> Iterator[None]:
        """While it lasts, calls with so many rows are compiled where they have to be, for any number of rows."""
        self._use([_marked(call, num_rows) for call in self._compiled])
        try:
            yield
        finally:
            self.remove()

    @contextmanager
    def learnt(self) -> Iterator[None]:
        """While it lasts, a call that would have to be compiled is an error."""
        self._use(self._compiled)
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                yield
        except RuntimeError as error:
            if "fail_on_recompile" in str(error):
                raise RuntimeError("each number of rows would have to be compiled for") from error
            raise
        finally:
            self.remove()

    def serve(self) -> None:
        """From now on what was learnt is used."""
        self._use(self._ready)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """As the protocol says."""
        self.remove()
        try:
            yield
        finally:
            self.serve()

    def remove(self) -> None:
        """The layers are called as they are written."""
        self._use([None] * len(self._layers))

    def _use(self, calls: Any) -> None:
        for layer, call in zip(self._layers, calls, strict=True):
            layer._compiled_call_impl = call  # what nn.Module.compile sets


def _marked(call: Callable[..., Any], num_rows: int) -> Callable[..., Any]:
    """The call, its tensors marked where a size is the number of rows: only that one will vary."""

    def marked(*args: Any, **kwargs: Any) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                for dim, size in enumerate(tensor.shape):
                    if size == num_rows:
                        torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return call(*args, **kwargs)

    return marked


def _first_words(error: BaseException) -> str:
    """What it says up to the details, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    words = lines[0] if not lines[0].endswith(":") else " ".join(lines[:2])
    return words[:200]
