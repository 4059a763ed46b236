"""Vision-language model folders as they come from the hub, tiny and built offline: weights, processor, chat template.

The model classes and the image processors are the real ones, in transformers' backend for PIL; the files have the names
that the hub's folders have. Weights are large, so that a picture turns the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, PreTrainedTokenizerFast

from lmserve.images.processor import still_class
from tests.images import templates
from tests.runtime.tiny_models import BASE

PAD, START, END = "<pad>", "<|im_start|>", "<|im_end|>"
TEXT: dict[str, Any] = {**BASE, "max_position_embeddings": 4096}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
# 8 by 8 pixels a token: 4 to 40 tokens a picture
QWEN_PICTURES: dict[str, Any] = {"patch_size": 4, "size": {"shortest_edge": 256, "longest_edge": 2560}}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
INTERLEAVED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True}


@dataclass(frozen=True)
class Family:
    """What a family's folder is made of, besides bytes and weights."""

    config: str
    text: dict[str, Any]
    vision: dict[str, Any]
    processor: str
    image_processor: str
    template: str
    pictures: dict[str, Any]
    """What the image processor is built with."""
    named: dict[str, str]
    """Special tokens by the attribute that the family's tokenizer has them under."""
    unnamed: tuple[str, ...] = ()
    """Special tokens without one."""
    token_fields: dict[str, str] = field(default_factory=dict)
    """Fields of the configuration that hold a token's id: the token."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of the whole model's configuration."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What the processor's own file says."""


def _qwen(name: str, text: dict[str, Any], vision: dict[str, Any], processor: str, template: str) -> Family:
    return Family(
        config=f"{name}Config",
        text={**TEXT, **text},
        vision={**QWEN_TOWER, **vision},
        processor=processor,
        image_processor="Qwen2VLImageProcessorPil",
        template=template,
        pictures=QWEN_PICTURES,
        named={},
        unnamed=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        token_fields={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
    )


def _idefics(name: str) -> Family:
    return Family(
        config=f"{name}Config",
        text={**TEXT, "model_type": "llama"},
        vision={**TOWER, "image_size": 16},
        processor=f"{name}Processor",
        image_processor=f"{name}ImageProcessorPil",
        template=templates.IDEFICS,
        # squares of 16 pixels, 4 tokens each: at most three by three and one of the whole picture
        pictures={"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}, "do_image_splitting": True},
        named={"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
        | {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"},
        unnamed=tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
        token_fields={"image_token_id": "<image>"},
        model={"scale_factor": 2},
        arguments={"image_seq_len": 4},
    )


def _pixtral(config: str, model: dict[str, Any], merge: int) -> Family:
    return Family(
        config=config,
        text={**TEXT, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
        vision={**TOWER, "model_type": "pixtral", "image_size": 48, "head_dim": 16},
        processor="PixtralProcessor",
        image_processor="PixtralImageProcessorPil",
        template=templates.MISTRAL,
        pictures={"size": {"longest_edge": 24 * merge}, "patch_size": {"height": 4 * merge, "width": 4 * merge}},
        named={"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
        unnamed=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        token_fields={"image_token_index": "[IMG]"},
        model=model,
        arguments={"patch_size": 4, "spatial_merge_size": merge},
    )


def _gemma4(use_bidirectional_attention: str | None) -> Family:
    """The smaller ones have an embedding for each layer, in the larger ones an image's tokens see each other where
    layers have a window."""
    return Family(
        config="Gemma4Config",
        text={
            **TEXT,
            "head_dim": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 512,
            "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
            "num_kv_shared_layers": 2,
            "use_bidirectional_attention": use_bidirectional_attention,
        },
        vision={
            **TOWER,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "position_embedding_size": 128,
            "pooling_kernel_size": 3,
        },
        processor="Gemma4Processor",
        image_processor="Gemma4ImageProcessorPil",
        template=templates.GEMMA4,
        pictures={"patch_size": 4, "pooling_kernel_size": 3, "max_soft_tokens": 70},
        named={"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
        | {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"},
        unnamed=("<|video|>", "<|turn>", "<turn|>"),
        token_fields={
            "image_token_id": "<|image|>",
            "boi_token_id": "<|image>",
            "eoi_token_id": "<image|>",
            "video_token_id": "<|video|>",
            "audio_token_id": "<|audio|>",
        },
        arguments={"image_seq_length": 70},
    )


_FAMILIES: Mapping[str, Family] = {
    "qwen2-vl": _qwen(
        "Qwen2VL",
        {"rope_parameters": MROPE},
        {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2},
        "Qwen2VLProcessor",
        templates.QWEN2,
    ),
    "qwen2.5-vl": _qwen(
        "Qwen2_5_VL",
        {"rope_parameters": MROPE},
        {"hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 64}
        | {"fullatt_block_indexes": [1], "window_size": 16},
        "Qwen2_5_VLProcessor",
        templates.QWEN2,
    ),
    "qwen3-vl": _qwen(
        "Qwen3VL",
        {"rope_parameters": INTERLEAVED, "head_dim": 16},
        {"depth": 3, "hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 64}
        | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        "Qwen3VLProcessor",
        templates.QWEN3,
    ),
    "qwen3.5": _qwen(
        "Qwen3_5",
        {
            "rope_parameters": INTERLEAVED,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        },
        {"hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 64, "num_position_embeddings": 64},
        "Qwen3VLProcessor",
        templates.QWEN3,
    ),
    "llava": Family(
        config="LlavaConfig",
        text={**TEXT, "model_type": "llama"},
        vision={**TOWER, "model_type": "clip_vision_model", "image_size": 24},
        processor="LlavaProcessor",
        image_processor="CLIPImageProcessorPil",
        template=templates.LLAVA,
        pictures={"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
        named={"image_token": "<image>"},
        token_fields={"image_token_index": "<image>"},
        model={"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
        arguments={"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "gemma3": Family(
        config="Gemma3Config",
        text={**TEXT, "head_dim": 16, "sliding_window": 10, "query_pre_attn_scalar": 16}
        | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
        vision={**TOWER, "image_size": 24},
        processor="Gemma3Processor",
        image_processor="Gemma3ImageProcessorPil",
        template=templates.GEMMA,
        pictures={"size": {"height": 24, "width": 24}},
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        unnamed=("<start_of_turn>", "<end_of_turn>"),
        token_fields={
            "image_token_id": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        model={"mm_tokens_per_image": 9},
        arguments={"image_seq_length": 9},
    ),
    "gemma4": _gemma4(None),
    "gemma4-large": _gemma4("vision"),
    "smolvlm": _idefics("SmolVLM"),
    "idefics3": _idefics("Idefics3"),
    "internvl": Family(
        config="InternVLConfig",
        text={**TEXT, "model_type": "qwen2"},
        vision={**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        processor="InternVLProcessor",
        image_processor="GotOcr2ImageProcessorPil",
        template=templates.INTERNVL,
        # squares of 16 pixels, 4 tokens each: at most six and one of the whole picture
        pictures={"size": {"height": 16, "width": 16}, "crop_to_patches": True, "max_patches": 6},
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        token_fields={"image_token_id": "<IMG_CONTEXT>"},
        arguments={"image_seq_length": 4},
    ),
    "mistral3": _pixtral("Mistral3Config", {"spatial_merge_size": 2, "vision_feature_layer": -1}, 2),
    "llava-pixtral": _pixtral("LlavaConfig", {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, 1),
}
FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def _tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """One token for each byte, the special ones first."""
    special = [PAD, START, END, *family.named.values(), *family.unnamed]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    make: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END, extra_special_tokens=family.named
    )
    return fast


def _randomize(model: PreTrainedModel) -> None:
    """Weights that are large and none of them zero, the same every time: a test would not see what a zero forgets."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0.0, 0.5)  # the last token counts: smaller, and answers run into one token for ever
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
            else:
                parameter.uniform_(0.5, 1.5)


def write_tiny_vlm(folder: Path, family: str, **overrides: Any) -> Path:
    """The family's tiny model and processor in ``folder``; ``overrides`` are fields of the text configuration."""
    parts = _FAMILIES[family]
    tokenizer = _tokenizer(parts)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in parts.token_fields.items()}
    text = {**parts.text, "vocab_size": len(tokenizer), **overrides}
    make: Any = getattr(transformers, parts.config)
    config = make(text_config=text, vision_config=parts.vision, tie_word_embeddings=False, **ids, **parts.model)
    build: Any = AutoModelForImageTextToText.from_config
    model: PreTrainedModel = build(config, dtype=torch.float32)
    _randomize(model)
    generation: Any = model.generation_config
    generation.bos_token_id, generation.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    getattr(transformers, parts.image_processor)(**parts.pictures).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": parts.processor, **parts.arguments}))
    (folder / "chat_template.jinja").write_text(parts.template)
    return folder


def load_processor(folder: Path) -> Any:
    """The folder's processor, complete where its libraries are there, else the one for pictures alone.

    Raises ImportError for a family that ``needs_torchvision`` where there is none.
    """
    load: Any = AutoProcessor.from_pretrained
    try:
        return load(folder)
    except (ImportError, ValueError):
        name = json.loads((folder / "processor_config.json").read_text())["processor_class"]
        return still_class(name).from_pretrained(folder)


def load_model(folder: Path) -> PreTrainedModel:
    """The folder's model in float32, ready to answer."""
    load: Any = AutoModelForImageTextToText.from_pretrained
    model: PreTrainedModel = load(folder, dtype=torch.float32)
    model.train(False)
    return model


def model_inputs(processor: Any, messages: Sequence[Mapping[str, Any]]) -> Any:
    """What stock transformers gives the model for messages whose image parts hold PIL images."""
    return processor.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )


def reference_answer(
    model: PreTrainedModel, processor: Any, messages: Sequence[Mapping[str, Any]], max_new_tokens: int
) -> list[int]:
    """The token ids that stock transformers answers with, the likeliest one each time; the end, if reached, is one."""
    inputs = model_inputs(processor, messages)
    generate: Any = model.generate
    with torch.inference_mode():
        output = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answer: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return answer


def user(*parts: str | Image.Image) -> dict[str, Any]:
    """A user's message of texts and pictures, in this order."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, Any]:
    """An earlier answer, as a list of parts: some families' templates read nothing else."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def pictures() -> dict[str, Image.Image]:
    """Small pictures by name, unlike in size, shape and content, the same every time."""
    red = Image.new("RGB", (32, 32), (200, 30, 30))
    stripes = Image.new("RGB", (60, 24), (255, 255, 255))
    disc = Image.new("RGB", (28, 56), (10, 20, 60))
    grey = Image.new("L", (40, 40))
    clear = Image.new("RGBA", (21, 17), (0, 120, 0, 90))
    ImageDraw.Draw(clear).line((0, 0, 20, 16), fill=(250, 250, 250, 255), width=4)
    for x in range(0, 60, 8):
        ImageDraw.Draw(stripes).rectangle((x, 0, x + 3, 23), fill=(0, 40, 160))
    ImageDraw.Draw(disc).ellipse((4, 10, 24, 40), fill=(240, 220, 40))
    grey.putdata([(x * y) % 256 for y in range(40) for x in range(40)])
    return {"red": red, "stripes": stripes, "disc": disc, "grey": grey, "clear": clear}
