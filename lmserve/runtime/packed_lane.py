"""The packed lane: a stock transformers model, run over a ragged batch in one row of tokens.

transformers lets a function be named as a model's attention. Ours gets the new tokens' queries, keys and values of all
sequences side by side, (1, heads, T, D), positional encoding already in them; it writes keys and values into the paged
cache and lets the backend attend over each sequence's blocks. The name is not registered with transformers' masks, so
that no mask is built. Layers are told apart by the attention module itself and their shapes are learnt from one probe
forward, so there is no per-model code. It was found to give the stock logits in about half of all causal model types;
``self_check.py`` says whether a given model is one of them.

Where torch compiles the model, and on CUDA, all of it that touches the cache is one operation (``attention_op.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lmserve.runtime.attention.base import AttentionBackend, LayerCache, LayerOptions, Span
from lmserve.runtime.attention_op import attending, give_handle, paged_attention
from lmserve.runtime.interface import NewSequence, StateSave
from lmserve.runtime.kv_cache import KVCache, LayerShape
from lmserve.runtime.latent import absorb, expand_again, find_latents, hand_through, hands_through, release
from lmserve.runtime.transfer import send_list
from lmserve.runtime.vision.layout import ImageRows

KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention", "sparse", "dense", "mlp"})
"""Kinds of layers, by transformers' names for them, whose attention is what it is called with. Others (in chunks,
indexed, compressed) may look like these as long as prompts are short."""
MIN_ROWS = 4
"""From four rows on torch's CPU products give a row the same bits whatever their number; below, other kernels run."""


class UnsupportedModel(Exception):
    """The model cannot ride this lane; the message says why."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One packed forward: T tokens of several sequences side by side, T padded rows included."""

    input_ids: Tensor
    """(T,) int64"""
    positions: Tensor
    """(T,) int64; (4, T) for models with M-RoPE: the index, then time, height and width"""
    slot_mapping: Tensor
    """(T,) int64: the cache row that each token's key and value go to."""
    logits_rows: Tensor
    """(R,) int64: the rows whose logits are wanted."""
    spans: list[Span]
    images: ImageRows | None = None
    """The rows that are no text."""
    slots: Sequence[int] = ()
    """Of the spans' sequences, for lanes that remember more of them than lies in the cache."""
    saves: Sequence[tuple[StateSave, ...]] = ()
    """Of the spans' chunks."""
    wanted: Sequence[int] = ()
    """``logits_rows``, on the host."""


class StepProgram(Protocol):
    """Another way to run the lane's model: the whole step at once (``lmserve.runtime.native``)."""

    def takes(self, num_tokens: int, num_kept: int, num_position_rows: int) -> bool: ...

    def run(self, ids: Tensor, positions: Tensor, slots: Tensor, kept: Tensor, spans: Sequence[Span]) -> Tensor: ...


class CompiledParts(Protocol):
    """Parts of the lane's model that run compiled for its own attention (``lmserve.runtime.compiled``)."""

    def paused(self) -> AbstractContextManager[None]:
        """While it lasts, the model runs as it is written."""
        ...

    def remove(self) -> None:
        """From now on it does."""
        ...


Watcher = Callable[[nn.Module, Tensor, Tensor, Tensor, float, int | None, float | None, Tensor | None], Tensor]
"""Takes the attention's module, query, key, value, scaling, window, softcap and sinks."""


class PackedLane:
    """Owns the plug between a model and the paged cache. One model, one lane, one step at a time."""

    name = "packed"
    known_layers = KNOWN_LAYERS

    def __init__(self, model: nn.Module, *, keeps_latents: bool = False) -> None:
        """``keeps_latents``: of layers that have them, instead of keys and values (``latent.py``)."""
        self.model: Any = model
        self._latent_layers = find_latents(model) if keeps_latents else []
        self.program: StepProgram | None = None
        """Runs the steps that it takes, all but those with images."""
        self.compiled: CompiledParts | None = None
        self.shapes: dict[int, LayerShape] = {}
        """By the id of the attention module, in the order of their first call."""
        self._layers: dict[int, int] = {}
        """By the same: the place in that order, which is the module's handle."""
        self._caches: list[LayerCache] = []
        """In that order."""
        self._num_windows = 0
        """Layers that were called with one."""
        self._cache: KVCache | None = None
        self._backend: AttentionBackend | None = None
        self._plan: Any = None
        self._slot_mapping: Tensor | None = None
        self._deep: dict[str, Any] = {}
        self._watcher: Watcher | None = None
        self._parameters = frozenset(inspect.signature(self.model.forward).parameters)
        # transformers reads meaning from names: "flash", "sdpa" and a slash must not be in it.
        self._name = f"lmserve_packed_{id(self):x}"
        AttentionInterface.register(self._name, self._attention)
        self._stock = self._current_implementation()
        self._per_layer_embedding = self._find_per_layer_embedding()
        self._check_forward()
        self._pass_deep_features()

    def _check_forward(self) -> None:
        if not {"input_ids", "position_ids"} <= self._parameters:
            raise UnsupportedModel("its forward takes no position_ids, so packed sequences cannot be told apart")

    def begin(self, new_sequences: Sequence[NewSequence]) -> None:
        """A step follows in which these take their slots. What a sequence has in the cache is all there is to it."""

    @contextmanager
    def stock_attention(self) -> Iterator[None]:
        """The model as transformers made it, for comparison."""
        self._set_implementation(self._stock)
        try:
            with self._as_written():
                yield
        finally:
            self._set_implementation(self._name)

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """The model with somebody else's attention, who wants to see what it is called with."""
        self._set_implementation(self._name)
        self._watcher = watcher
        try:
            with self._as_written():
                yield
        finally:
            self._watcher = None

    @property
    def has_windows(self) -> bool:
        """Whether any layer was called with one, so far."""
        return self._num_windows > 0

    @property
    def min_rows(self) -> int:
        """Rows that a step has at least, so that a row's bits do not depend on how many there are."""
        return MIN_ROWS if self.program is None else 1

    def probe(self) -> dict[int, LayerShape]:
        """Learns each attention layer's shape from a forward of a few tokens that attends to nothing."""
        self._set_implementation(self._name)
        device = self.model.device
        tokens = torch.arange(4, device=device)
        self._forward({"input_ids": tokens[None]}, tokens[None], tokens[-1:])
        if not self.shapes:
            raise UnsupportedModel("its attention does not go through transformers' attention interface")
        self._check_layers()
        return self.shapes

    def _check_layers(self) -> None:
        """What no comparison of short prompts would show. Raises UnsupportedModel."""
        kinds = list(getattr(self.model.config.get_text_config(), "layer_types", None) or ())
        unknown = sorted(set(kinds) - self.known_layers)
        if unknown:
            raise UnsupportedModel(f"it has layers of the kind {unknown[0]}")
        num_windows = sum("sliding" in kind for kind in kinds)
        if self._num_windows < num_windows:
            raise UnsupportedModel(f"{num_windows} of its layers have a window, and only {self._num_windows} say so")

    @property
    def num_slots(self) -> int:
        """Tokens that the attached cache has room for."""
        assert self._backend is not None, "attach comes first"
        return self._backend.layout.num_blocks * self._backend.layout.block_size

    def run_as_written(self) -> None:
        """Gives up what runs the model in another way than its own code says."""
        self.program = None
        if self.compiled is not None:
            self.compiled.remove()
            self.compiled = None

    def get_ready(self, num_used: int) -> bool:
        """See ``KVCache.get_ready``."""
        return self._cache is not None and self._cache.get_ready(num_used)

    def attach(self, cache: KVCache, backend: AttentionBackend) -> None:
        """Gives the lane its memory and its kernels; ``forward`` works from here on."""
        self._cache, self._backend = cache, backend
        self._caches = [cache.layers[layer] for layer in self.shapes]

    def detach(self) -> None:
        """Gives its memory back, and the model its own attention."""
        self.run_as_written()
        self._cache = self._backend = None
        self._caches = []
        self._set_implementation(self._stock)

    def forward(self, batch: PackedBatch) -> Tensor:
        """(R, vocab) logits in the model's dtype, valid until the next call."""
        assert self._backend is not None, "attach comes first"
        num_position_rows = 1 if batch.positions.dim() == 1 else len(batch.positions)
        program = self.program if batch.images is None else None
        if program is not None and program.takes(len(batch.input_ids), len(batch.logits_rows), num_position_rows):
            return program.run(batch.input_ids, batch.positions, batch.slot_mapping, batch.logits_rows, batch.spans)
        plan, inputs = self._backend.plan(batch.spans), self._inputs(batch)
        return self._forward_planned(inputs, batch.positions, batch.slot_mapping, batch.logits_rows, plan)

    def forward_planned(
        self, input_ids: Tensor, positions: Tensor, slot_mapping: Tensor, logits_rows: Tensor, plan: Any
    ) -> Tensor:
        """``forward`` of text, by the model itself, with the backend's plan. The tensors are as in ``PackedBatch``."""
        return self._forward_planned({"input_ids": input_ids[None]}, positions, slot_mapping, logits_rows, plan)

    def rehearse(self, num_tokens: int, num_position_rows: int = 1) -> None:
        """A forward of one prompt by the model itself, in the cache's first blocks, which are overwritten; of fewer
        tokens if the cache has no room for so many."""
        assert self._backend is not None, "attach comes first"
        layout = self._backend.layout
        num_tokens = min(num_tokens, layout.num_blocks * layout.block_size)
        where = torch.arange(num_tokens, device=layout.device)
        table = list(range(-(-num_tokens // layout.block_size)))
        plan = self._backend.plan([Span(0, num_tokens, num_tokens, table)])
        positions = where if num_position_rows == 1 else where.repeat(num_position_rows, 1)
        self.forward_planned(torch.zeros_like(where), positions, where, where[-MIN_ROWS:], plan)

    def _forward_planned(
        self, inputs: dict[str, Tensor], positions: Tensor, slot_mapping: Tensor, logits_rows: Tensor, plan: Any
    ) -> Tensor:
        with self._planned(plan, slot_mapping):
            positions = positions[None] if positions.dim() == 1 else positions[:, None]
            return self._forward(inputs, positions, logits_rows)

    @contextmanager
    def _planned(self, plan: Any, slot_mapping: Tensor) -> Iterator[None]:
        """While it lasts, the layers attend as this step wants."""
        self._plan, self._slot_mapping = plan, slot_mapping
        try:
            with attending(self):
                yield
        finally:
            self._plan = self._slot_mapping = None
            self._deep = {}

    def _inputs(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Token ids; with images in it the embeddings, for their rows are no token's."""
        if batch.images is None:
            return {"input_ids": batch.input_ids[None]}
        rows = torch.tensor(batch.images.rows, device=batch.input_ids.device)
        # A placeholder's id may lie outside of the embeddings.
        embeddings = self.model.get_input_embeddings()(batch.input_ids.index_fill(0, rows, 0))
        embeddings = embeddings.index_copy(0, rows, batch.images.values().to(embeddings.dtype))
        deep = batch.images.deep()
        if deep:
            mask = torch.zeros(1, len(batch.input_ids), dtype=torch.bool, device=rows.device)
            self._deep = {"visual_pos_masks": mask.index_fill(1, rows, True), "deepstack_visual_embeds": deep}
        inputs = {"inputs_embeds": embeddings[None]}
        if self._per_layer_embedding is not None:
            padding = self.model.config.get_text_config().pad_token_id or 0
            as_padding = batch.input_ids.index_fill(0, rows, padding)
            inputs["per_layer_inputs"] = self._per_layer_embedding(as_padding[None], None)
        return inputs

    def _find_per_layer_embedding(self) -> Callable[..., Tensor] | None:
        """Of models that add something of each token to every layer (Gemma 4), and cannot know it from embeddings."""
        if "per_layer_inputs" not in self._parameters:
            return None
        if not getattr(self.model.config.get_text_config(), "hidden_size_per_layer_input", 0):
            return None
        found: Iterator[Any] = (getattr(each, "get_per_layer_inputs", None) for each in self.model.modules())
        embedding: Callable[..., Tensor] = next(each for each in found if each is not None)
        return embedding

    def _pass_deep_features(self) -> None:
        """The model's forward makes its deepstack features itself: they are handed to the layers behind its back."""

        def add(module: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**arguments, **self._deep}

        for module in self.model.modules():
            if "deepstack_visual_embeds" in inspect.signature(module.forward).parameters:
                module.register_forward_pre_hook(add, with_kwargs=True)

    def _forward(self, inputs: dict[str, Tensor], positions: Tensor, logits_rows: Tensor) -> Tensor:
        keep = {"logits_to_keep": logits_rows} if "logits_to_keep" in self._parameters else {}
        output = self.model(**inputs, position_ids=positions, use_cache=False, **keep)
        logits: Tensor = output.logits[0]
        return logits if keep else logits.index_select(0, logits_rows)

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        """query (1, heads, T, Dk), key and value (1, kv heads, T, D) -> ((1, T, heads, Dv), None): their contract.
        Or, of decodes, (T, heads, 1, Dk) and so on.
        """
        self._refuse_unknown(attention_mask, arguments)
        # Rows are side by side; in the state lane's decodes they are a batch.
        is_batch = query.shape[0] > 1
        q, k, v = (x[:, :, 0] if is_batch else x[0].transpose(0, 1) for x in (query, key, value))
        scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        options = LayerOptions(scaling, sliding_window, softcap, s_aux)
        if hands_through(module):
            out = release(module, self._attend(module, absorb(module, q), k, v, options))
        elif torch.compiler.is_dynamo_compiling() or self._watcher is None:
            out = self._attend(module, q, k, v, options)
        else:
            return self._watcher(module, query, key, value, scaling, sliding_window, softcap, s_aux), None
        return _as_called(out, is_batch), None

    def _attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: LayerOptions) -> Tensor:
        """(T, heads, D) each -> (T, heads, Dv); while nothing is attached, only looks at them."""
        if torch.compiler.is_dynamo_compiling() or (q.is_cuda and self._cache is not None):
            return paged_attention(module, q, k, v, options)
        if self._cache is None:
            give_handle(module, self._layers.setdefault(id(module), len(self._layers)))
            self._num_windows += id(module) not in self.shapes and options.window is not None
            self.shapes[id(module)] = LayerShape(k.shape[1], k.shape[2], v.shape[2])
            return q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
        return self.attend_layer(self._layers[id(module)], q, k, v, options)

    def attend_layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: LayerOptions) -> Tensor:
        """See ``attention_op.PagedStep``."""
        assert self._backend is not None
        assert self._slot_mapping is not None
        cache = self._caches[layer]
        self._backend.write(k, v, cache, self._slot_mapping)
        return self._backend.attend(q, k, v, cache, self._plan, options)

    def _as_written(self) -> AbstractContextManager[None]:
        return nullcontext() if self.compiled is None else self.compiled.paused()

    @staticmethod
    def _refuse_unknown(attention_mask: Tensor | None, arguments: dict[str, Any]) -> None:
        """An argument that changes the result and is not honoured would be a silent error."""
        if attention_mask is not None:
            raise UnsupportedModel("its layers bring an attention mask of their own")
        if arguments.get("is_causal") is False:
            raise UnsupportedModel("its attention is not causal")
        if arguments.get("position_bias") is not None:
            raise UnsupportedModel("its attention adds a position bias")

    def _current_implementation(self) -> str:
        return str(self.model.config.get_text_config()._attn_implementation)

    def _set_implementation(self, name: str) -> None:
        if name == self._name:
            hand_through(self._latent_layers)
        else:
            expand_again(self._latent_layers)
        config = self.model.config
        text_config = config.get_text_config()
        if text_config is config:
            self.model.set_attn_implementation(name)
            return
        (key,) = (k for k in config.sub_configs if getattr(config, k, None) is text_config)
        self.model.set_attn_implementation({key: name})


def in_order(parts: list[Tensor], places: list[int]) -> Tensor:
    """Rows that were computed piece by piece, row ``i`` of them all at ``places[i]``."""
    back = sorted(range(len(places)), key=places.__getitem__)
    rows = torch.cat(parts)
    return rows.index_select(0, send_list(back, torch.int64, rows.device))


def _as_called(rows: Tensor, is_batch: bool) -> Tensor:
    return rows[:, None] if is_batch else rows[None]
