"""What shrinking by names cannot know, by the type of the configuration (also within a composite one).

Sizes that hang together in ways no name tells; layers that a type's published models have and its default
configuration has not, above all hybrids whose default is of one kind; and types that no causal model can be made of.
"""

from __future__ import annotations

from typing import Any

_AS_DECODER = {"is_decoder": True}
_HALF_SLIDING = ["sliding_attention", "full_attention"] * 2
_ROPE_FOR_EACH = {
    kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
}
_WINDOWED_LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 24,
    "v_head_dim": 16,
}
_SHARED_KEYS = {
    "layer_types": _HALF_SLIDING,
    "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
    "num_kv_shared_layers": 2,
}

_PINPOINTS = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}

PATCHES: dict[str, dict[str, Any]] = {
    "aria": {
        "projector_patch_to_query_dict": {49: 4},
        "vision_config": {
            "model_type": "idefics3_vision",
            "image_size": 980,
            "patch_size": 140,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGAZ": 6}},
    "cohere_compass_text": {"layer_types": _HALF_SLIDING, "rope_parameters": _ROPE_FOR_EACH},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "doge": {"keep_window_size": 64},  # a repeated token scores the same: which one a smaller top-k keeps is luck
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "max_window_layers": 2,
        "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
    },
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "per_layer_config": {1: _WINDOWED_LATENT, 3: _WINDOWED_LATENT},
    },
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    "esm": {"vocab_size": 160, "pad_token_id": 1, "mask_token_id": 3, "token_dropout": True},
    "esmc": {"vocab_size": 160},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "funnel": {"block_sizes": [2, 2], "block_repeats": [1, 1], "num_decoder_layers": 2},
    "gemma4_unified_vision": {"mm_embed_dim": 64, "output_proj_dims": 64},
    "gemma3": {"mm_tokens_per_image": 4},  # fewer than the window, as in all that are published
    "gemma4_text": _SHARED_KEYS,
    "gpt_neo": {
        "attention_types": [[["global", "local"], 2]],
        "window_size": 8,
    },
    "got_ocr2_vision": {"image_size": 512},  # whose processor always writes 256 tokens
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
        **_PINPOINTS,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},  # 2 x 2 high cycles x (1 + 3 low ones)
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "inkling_vision": {"patch_size": 8, "n_layers": 2},
    "internvl": {"image_seq_length": 4},
    "internvl_vision": {"image_size": [32, 32], "patch_size": [8, 8]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "laguna": {"layer_types": _HALF_SLIDING},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llava_next": _PINPOINTS,
    "llava_next_video": _PINPOINTS,
    "llava_onevision": _PINPOINTS,
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mellum": {"layer_types": _HALF_SLIDING},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "ministral": {"head_dim": 16, "layer_types": _HALF_SLIDING},
    "mistral4": {"qk_nope_head_dim": 8},  # half of a head is rotated
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2_vit": {"image_size": [32, 32], "num_position_embeddings": 16},
    "muse_glimmer": {"out_hidden_size": 256},  # of four patches side by side
    "muse_spark": {"out_hidden_size": 256},
    "muse_spark_audio": {"hidden_sizes": [16, 16, 32, 64], "depths": [1, 1, 1, 1]},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    },
    "qianfan_ocr": {"image_seq_length": 4},
    "qianfan_ocr_vision": {"image_size": [32, 32], "patch_size": [8, 8]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 20},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 20},  # it reads it, and its configuration has no default
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "eos_token_id": 2,
    },
    "reformer": {
        "is_decoder": True,
        "hash_seed": 1,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 48],
    },
    "step3p5": {"sliding_window": 8, "layer_types": _HALF_SLIDING},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 16},  # its widths are multiples of 64
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"n_mamba_heads": 8},
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ),
        _AS_DECODER,
    ),
}
"""Arguments that overrule the shrunken ones."""

STARTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gemma4", "gemma4_unified"), {"vision_config": {}}),
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "nemotron_h_omni"), {"image_token_id": 9}),
}
"""What a default configuration is begun with: one without these parts or tokens would read no images."""

_DRAFTS = "drafts for another model, whose hidden states and keys it needs"
_SOUND = "makes codes of sound, several at a time, not text"
NOT_BUILT: dict[tuple[str, str], str] = {
    ("causal", "gemma4_assistant"): _DRAFTS,
    ("causal", "gemma4_unified_assistant"): _DRAFTS,
    ("causal", "musicgen"): _SOUND,
    ("causal", "musicgen_melody"): _SOUND,
    ("image-text", "diffusion_gemma"): "fills blocks of text by diffusion, not one token after the other",
    ("image-text", "evolla"): "reads proteins, and transformers' class for images and text does not take it",
    ("image-text", "florence2"): "an encoder-decoder",
    ("image-text", "shieldgemma2"): "judges images with a head of its own, and continues no text",
    ("encoder", "mra"): "its attention is a CUDA kernel; without it, it is zero",
    ("encoder", "perceiver"): "reads what a preprocessor has embedded, not tokens",
}
"""Why no tiny model is made, by the mapping's kind and the type."""

_IMAGE = "it reads no text without an image"
_MASKLESS = "its mixing of tokens leaves out the mask of padding"
WHY: dict[tuple[str, str], str] = {
    ("causal", "cpmant"): "it reads its prompt in both directions",
    ("causal", "moshi"): "its cache forgets what its window has passed, and its uncached forward has no window",
    ("causal", "reformer"): "the chunks and buckets that tokens fall into depend on the text's length",
    ("causal", "xlm"): "generate puts a mask token behind the text",
    ("causal", "xlnet"): "generate puts a token to predict behind the text, with a mapping",
    ("causal", "zamba2"): "a cached step leaves out time_step_min, which the uncached forward keeps to",
    ("image-text", "blip"): _IMAGE,
    ("image-text", "blip-2"): _IMAGE,
    ("image-text", "idefics"): _IMAGE,
    ("image-text", "instructblip"): _IMAGE,
    ("image-text", "instructblipvideo"): _IMAGE,
    ("image-text", "kosmos-2"): _IMAGE,
    ("image-text", "paligemma"): "it reads its prompt in both directions, and only generate tells where that ends",
    ("image-text", "unlimited_ocr"): "its window always keeps the prompt, and only generate tells where that ends",
    ("encoder", "convbert"): _MASKLESS,
    ("encoder", "fnet"): _MASKLESS,
    ("encoder", "nystromformer"): "its landmarks are means over the padding, too",
    ("encoder", "reformer"): "the chunks and buckets that tokens fall into depend on the text's length",
    ("encoder", "yoso"): "it expects -10000 where padding is, and transformers gives it the lowest number there is",
}
"""Why a type does not agree with itself, where reading its code told more than the numbers do."""

EMBEDDED_NOTES: dict[str, str] = {
    **dict.fromkeys(("bart", "mbart", "mvp"), "pooled are its decoder's states, which are what its class gives"),
    "big_bird": "takes texts to whose every token it attends (in its base size 704 tokens); after one of them "
    "transformers' class attends so to longer ones, too",
}
"""What more is to be known of an embedding type."""
