"""Weights of architectures whose GGUF files transformers maps and cannot read: gpt-oss and Gemma 4, for whose experts,
sinks and scales it has no place. As llama.cpp's converters write them (``conversion/gpt_oss.py``, ``…/gemma.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmserve.runtime.gguf.file import GGUFFile


class Place(NamedTuple):
    """Where a weight of a layer comes from: the file's tensors of the same layer, and what is made of them."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _in_out(tensor: Tensor) -> Tensor:
    """(experts, out, in) -> (experts, in, out)."""
    return tensor.transpose(1, 2)


def _by_turns(gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up in turn along the outputs: (experts, out) each."""
    return torch.stack([gate, up], -1).flatten(1)


def _in_out_by_turns(gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up in turn along the outputs: (experts, out, in) each -> (experts, in, 2 x out)."""
    return torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2)


PLACES: Mapping[str, Mapping[str, Place]] = {
    "gpt-oss": {
        "self_attn.sinks": Place(("attn_sinks.weight",), _as_it_is),
        "mlp.experts.gate_up_proj": Place(("ffn_gate_exps.weight", "ffn_up_exps.weight"), _in_out_by_turns),
        "mlp.experts.gate_up_proj_bias": Place(("ffn_gate_exps.bias", "ffn_up_exps.bias"), _by_turns),
        "mlp.experts.down_proj": Place(("ffn_down_exps.weight",), _in_out),
        "mlp.experts.down_proj_bias": Place(("ffn_down_exps.bias",), _as_it_is),
    },
    "gemma4": {
        "layer_scalar": Place(("layer_output_scale.weight",), _as_it_is),
        "experts.gate_up_proj": Place(("ffn_gate_up_exps.weight",), _as_it_is),
        "experts.down_proj": Place(("ffn_down_exps.weight",), _as_it_is),
        "router.proj.weight": Place(("ffn_gate_inp.weight",), _as_it_is),
        "router.scale": Place(("ffn_gate_inp.scale",), _as_it_is),
        "router.per_expert_scale": Place(("ffn_down_exps.scale",), _as_it_is),
    },
}
"""By architecture: what a weight is called behind its layer's number. For the others the gguf package has names."""


def reads_here(file: GGUFFile) -> bool:
    """Whether the weights of this architecture are read here, not by transformers."""
    return file.family in PLACES


def read_weights(file: GGUFFile, hollow: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights by the names that ``hollow``, the model without memory, has for them; those that the file lacks are
    left out."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.family)
    names = gguf.get_tensor_name_map(number, hollow.config.num_hidden_layers)
    weights: dict[str, Tensor] = {}
    for name, target in hollow.state_dict().items():
        layer, _, rest = name.partition("layers.")[2].partition(".")
        owner, _, kind = name.rpartition(".")
        place = PLACES[file.family].get(rest, Place((f"{names.get_name(owner)}.{kind}",), _as_it_is))
        sources = [f"blk.{layer}.{source}" if rest in PLACES[file.family] else source for source in place.sources]
        if all(source in file.tensors for source in sources):
            made = place.make(*(file.read(source) for source in sources))
            weights[name] = made.reshape(target.shape).to(dtype).contiguous()
    return weights


@contextmanager
def quick_names() -> Iterator[None]:
    """transformers asks the gguf package for its table of names at each module of a model, and it is made anew each
    time: minutes for a model of 60 layers. Here it is made once."""
    made_anew = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(made_anew)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = made_anew
