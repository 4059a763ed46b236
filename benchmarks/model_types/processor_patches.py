"""What is to be known of processors of images by their model's type, where no name tells it."""

from __future__ import annotations

from typing import Any

PROCESSOR_CLASSES: dict[str, str] = {
    "cosmos3_omni": "Qwen3VLProcessor",
    "glm_ocr": "Glm46VProcessor",
    "glmga": "Glm46VProcessor",
    "qwen2_5_omni_thinker": "Qwen2_5OmniProcessor",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeProcessor",
}
"""Of types that transformers' own mapping does not have."""
IMAGE_PROCESSOR_CLASSES: dict[str, str] = {
    "glm4v_moe": "glm4v",
    "glm_ocr": "glm46v",
    "qwen2_5_omni_thinker": "qwen2_vl",
    "qwen3_omni_moe_thinker": "qwen2_vl",
    "qwen3_vl_moe": "qwen3_vl",
}
"""Types whose image processor is that of another type."""
_TOKENS = "the tokens that it makes of a picture need a larger vocabulary than the tiny model's"
NO_PROCESSOR: dict[str, str] = {
    "chameleon": _TOKENS,
    "emu3": _TOKENS,
    "hunyuan_vl": "its processor takes no image without the tokens around it, which at load means text only",
}
"""Why none is made."""
IMAGE_SETTINGS: dict[str, dict[str, Any]] = {
    "cohere2_vision": {"patch_size": 2},  # of the tokens of a tile
    "deepseek_vl_hybrid": {"high_res_size": {"height": 32, "width": 32}},
    "molmo2": {"size": {"height": 32, "width": 32}, "overlap_margins": [1, 1], "max_crops": 2},
    "kimi_k25": {"max_patches": 40},
    "lfm2_vl": {"encoder_patch_size": 8, "max_num_patches": 64, "min_image_tokens": 4, "max_image_tokens": 16},
    "muse_glimmer": {"max_image_tokens": 16},
    "muse_spark": {"max_image_tokens": 16},
}
"""Of image processors."""
_CLASS_TOKEN = {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
SETTINGS: dict[str, dict[str, Any]] = {
    "aria": {"size_conversion": {980: 4}},
    "deepseek_vl": {"num_image_tokens": 16},
    "deepseek_vl_hybrid": {"num_image_tokens": 16},
    "granite4_vision": _CLASS_TOKEN,
    "granite_docling": {"image_seq_len": 1},
    "idefics2": {"image_seq_len": 8},
    "idefics3": {"image_seq_len": 4},
    "llava": _CLASS_TOKEN,
    "llava_next": _CLASS_TOKEN,
    "llava_next_video": _CLASS_TOKEN,
    "llava_onevision": {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    "ovis2": {"image_seq_length": 16},
    "smolvlm": {"image_seq_len": 4},
    "vipllava": _CLASS_TOKEN,
}
"""Of processors."""
