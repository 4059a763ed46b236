"""Multi-head latent attention over the compressed cache (MLA, DeepSeek-V2, arXiv:2405.04434, section 2.1).

Such a layer makes the keys and values of all heads from one short vector for each token, the latent. Stored expanded
they take dozens of times as much as the latent and the part of the key that is shared by all heads. What expands them
is linear, so it can be moved to the other side of the products: queries are brought into the latent's space, all heads
attend over the latents like those of one key-value head, and what comes out is brought back.

transformers' layers hand latents to a method of their own that expands them (``expand_kv``). While a lane serves, that
method gives them on as they are. The rest of the layer stays as it is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmserve.config import ModelConfig

METHOD = "expand_kv"
FLAG = "hands_latents_through"
NEEDED = ("kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")


def wants_latents(config: ModelConfig, device: torch.device) -> bool:
    """Whether they are to be kept: not where a native program runs the layers, nor where a product of few bits expands
    them."""
    has_program = device.type == "cpu" and config.attention_backend == "auto"
    return config.quantization == "none" and not has_program


def find_latents(model: nn.Module) -> list[nn.Module]:
    """The attention layers whose latents can be kept: what expands them is a plain product without bias."""
    return [module for module in model.modules() if callable(getattr(module, METHOD, None)) and _is_plain(module)]


def hand_through(layers: list[nn.Module]) -> None:
    """From now on these attend over latents: to be undone by ``expand_again``."""
    for layer in layers:
        setattr(layer, METHOD, _as_one_head)
        setattr(layer, FLAG, True)


def expand_again(layers: list[nn.Module]) -> None:
    """They do as they are written."""
    for layer in layers:
        layer.__dict__.pop(METHOD, None)
        layer.__dict__.pop(FLAG, None)


def hands_through(module: nn.Module) -> bool:
    """Whether the layer gives latents instead of keys and values."""
    return getattr(module, FLAG, False)


def absorb(module: Any, query: Tensor) -> Tensor:
    """(T, heads, nope + rotary size) -> (T, heads, latent + rotary size)."""
    size = module.qk_nope_head_dim
    nope, rotary = query[..., :size], query[..., size:]
    keys, _ = _of_heads(module, query.shape[1])
    return torch.cat([torch.einsum("thn,hnr->thr", nope, keys), rotary], -1)


def release(module: Any, out: Tensor) -> Tensor:
    """(T, heads, latent) -> (T, heads, value size)."""
    _, values = _of_heads(module, out.shape[1])
    return torch.einsum("thr,hvr->thv", out, values)


def _of_heads(module: Any, num_heads: int) -> tuple[Tensor, Tensor]:
    """What makes keys and values of a latent: (heads, nope or value size, latent), views of the weight."""
    weight = module.kv_b_proj.weight.view(num_heads, -1, module.kv_lora_rank)
    return weight[:, : module.qk_nope_head_dim], weight[:, module.qk_nope_head_dim :]


def _as_one_head(latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, 1, T, latent) and (batch, 1, T, rotary size): the key and the value of one head."""
    return torch.cat([latent, rotary], -1), latent


def _is_plain(module: Any) -> bool:
    if not all(hasattr(module, name) for name in NEEDED) or type(module.kv_b_proj) is not nn.Linear:
        return False
    product = module.kv_b_proj
    size = module.qk_nope_head_dim + module.v_head_dim
    fits = product.in_features == module.kv_lora_rank and product.out_features % size == 0
    return bool(fits and product.bias is None)
