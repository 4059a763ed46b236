"""Any configuration of transformers, made small without knowing its type.

Sizes shrink by their names (``sizes``). Of the layers some are picked so that every kind stays; lists with an entry
for each layer, and lists and tables of layer numbers, follow the picked ones.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from benchmarks.model_types.patches import PATCHES
from benchmarks.model_types.sizes import (
    DEPTHS,
    HEADS,
    KEY_VALUE_HEADS,
    LAYERS,
    SIZES,
    SPECIAL_TOKENS,
    SPREAD,
    SPREADS,
    TOWER_LAYERS,
)

LAYER_NUMBERS = (
    "full_attn_idxs",
    "moe_layers",
    "rope_scaling_layers",
    "kv_source_layers",
    "hybrid_layer_ids",
    "mlp_only_layers",
    "cross_attention_layers",
    "deepstack_visual_indexes",
    "fullatt_block_indexes",
    "global_attn_indexes",
    "local_layer_ids",
    "ple_layer_ids",
)
"""Lists of numbers of layers."""
MROPE = [16, 24, 24]
"""Time, height and width, where a model's code has these as its default and its configuration says nothing."""


def shrink(config: PreTrainedConfig, layers: int = LAYERS) -> dict[str, Any]:
    """The arguments with which the configuration's class makes a small one of the same kind."""
    return _shrink(config, layers, {})


def _shrink(config: PreTrainedConfig, layers: int, tokens: dict[int, int]) -> dict[str, Any]:
    content = config.to_dict()
    small: dict[str, Any] = {}
    for name, value in content.items():
        part = getattr(config, name, None) if isinstance(value, dict) else None
        if isinstance(part, PreTrainedConfig):
            small[name] = _shrink_part(name, part, layers, tokens)
    flat = {name: value for name, value in content.items() if name not in small}
    for name, value in flat.items():
        shrunk = _shrink_value(name, value, flat)
        if shrunk is None:
            shrunk = _special_tokens(name, value, tokens)
        if shrunk is not None:
            small[name] = shrunk
    if flat.get("head_dim") and flat["head_dim"] == flat.get("qk_rope_head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]
    small.update(_shrink_layers(flat, layers))
    if isinstance(flat.get("rope_parameters"), dict):
        rope = flat["rope_parameters"]
        if "mrope_section" in getattr(type(config), "ignore_keys_at_rope_validation", ()) and "rope_type" in rope:
            rope = {"mrope_section": MROPE, **rope}
        small["rope_parameters"] = _shrink_rope(rope, flat, small)
    arguments = _arguments(config)
    asked = {name: value for name, value in small.items() if name in arguments}
    return {**asked, **PATCHES.get(config.model_type, {})}


def _arguments(config: PreTrainedConfig) -> set[str]:
    """What can be asked of the configuration's class; its other members follow from these."""
    fields = {*type(config).__dataclass_fields__, "per_layer_config"}
    kept_as = {new for old, new in type(config).attribute_map.items() if old in fields}
    return (fields | kept_as) - {"transformers_version", "architectures", "dtype"}


def _shrink_part(name: str, part: PreTrainedConfig, layers: int, tokens: dict[int, int]) -> PreTrainedConfig:
    """A configuration within another, with what its parent set in it."""
    text = any(word in name for word in ("text", "decoder", "thinker", "language", "vlm"))
    arguments = _arguments(part)
    own = {key: value for key, value in part.to_diff_dict().items() if key in arguments}
    return type(part)(**{**own, **_shrink(part, layers if text else min(layers, TOWER_LAYERS), tokens)})


def _shrink_value(name: str, value: Any, flat: dict[str, Any]) -> Any:
    """None where the value stays. What is off (None, 0, -1) stays off, and nothing grows."""
    if name in SPREADS and isinstance(value, int | float):
        return SPREAD
    if name in KEY_VALUE_HEADS and isinstance(value, int):
        heads = flat.get("num_attention_heads") or flat.get("n_heads") or flat.get("n_head")
        return HEADS if value == heads else min(value, HEADS // 2)
    size = SIZES.get(name)
    if size is None or isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return None
    return min(size, value)


def _special_tokens(name: str, value: Any, tokens: dict[int, int]) -> Any:
    """Small numbers for the tokens with a meaning, the same one wherever a token stands; None if it names none."""
    if not any(
        word in name for word in ("token_id", "token_index", "im_end_id", "im_start_id", "patch_id", "newline_id")
    ):
        return None
    if isinstance(value, list):
        return [_special_tokens(name, each, tokens) for each in value]
    if isinstance(value, bool) or not isinstance(value, int) or value < 3:
        return value
    return tokens.setdefault(value, 3 + len(tokens) % (SPECIAL_TOKENS - 3))


def _shrink_layers(flat: dict[str, Any], layers: int) -> dict[str, Any]:
    """How many layers there are, and everything that is said of each."""
    named = [name for name in DEPTHS if isinstance(flat.get(name), int)]
    lists = {name: value for name, value in flat.items() if isinstance(value, list) and name != "rope_parameters"}
    depth = flat[named[0]] if named else len(flat.get("layers_block_type") or ())
    if not depth:
        return {}
    each = {name: value for name, value in lists.items() if len(value) == depth and name not in LAYER_NUMBERS}
    numbers = {name: value for name, value in lists.items() if name in LAYER_NUMBERS and value}
    picked = pick_layers(depth, layers, [*each.values()], [*numbers.values()])
    small: dict[str, Any] = dict.fromkeys(named, len(picked))
    for name, value in each.items():
        size = SIZES.get(name)
        small[name] = [value[i] if size is None else min(size, value[i]) for i in picked]
    for name, value in numbers.items():
        small[name] = [new for new, old in enumerate(picked) if old in value]
    table = flat.get("per_layer_config")
    if isinstance(table, dict):
        small["per_layer_config"] = _shrink_table(table, picked, flat)
    return small


def pick_layers(depth: int, layers: int, lists: list[list[Any]], numbers: list[list[int]]) -> list[int]:
    """The numbers of the layers that stay, ascending: at least one of every kind, and of two kinds two each.

    Two layers are of one kind if no list with an entry for each layer and no list of layer numbers tells them apart.
    """
    kinds: dict[str, list[int]] = {}
    for i in range(depth):
        kinds.setdefault(repr(([each[i] for each in lists], [i in each for each in numbers])), []).append(i)
    picked: list[int] = []
    turn = 0
    while len(picked) < min(depth, max(layers, len(kinds))):
        picked.extend(members[turn] for members in kinds.values() if turn < len(members))
        turn += 1
    firsts = {members[0] for members in kinds.values()}
    while len(picked) > max(layers, len(kinds)):
        picked.remove(next(i for i in reversed(picked) if i not in firsts))
    return sorted(picked)


def _shrink_table(table: dict[Any, dict[str, Any]], picked: list[int], flat: dict[str, Any]) -> dict[int, Any]:
    """What is said of single layers; a head size there stays twice the others', as gemma4 has it."""
    by_number = {int(number): said for number, said in table.items()}
    small: dict[int, Any] = {}
    for new, old in enumerate(picked):
        said = by_number.get(old)
        if said is None:
            continue
        small[new] = {name: _shrink_value(name, value, flat) or value for name, value in said.items()}
        if isinstance(said.get("head_dim"), int) and said["head_dim"] > flat.get("head_dim", said["head_dim"]):
            small[new]["head_dim"] = 2 * SIZES["head_dim"]
    return small


def _shrink_rope(rope: dict[str, Any], flat: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """With sections of M-RoPE that fit the small heads, and its lengths within the small limit."""
    made: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            made[name] = _shrink_rope(value, flat, small)
        elif name == "mrope_section" and isinstance(value, list):
            head = small.get("head_dim") or small["hidden_size"] // small["num_attention_heads"]
            rotated = int(head * (rope.get("partial_rotary_factor") or flat.get("partial_rotary_factor") or 1))
            made[name] = _share_out(rotated // 2, value)
        elif name == "original_max_position_embeddings":
            made[name] = min(value, 64)
        else:
            made[name] = value
    return made


def _share_out(total: int, weights: list[int]) -> list[int]:
    """Whole numbers in about the ratio of the weights, with this sum."""
    ends = [round(total * sum(weights[: i + 1]) / sum(weights)) for i in range(len(weights))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
