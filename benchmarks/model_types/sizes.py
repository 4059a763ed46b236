"""What each size in a configuration shrinks to, by its name; one width everywhere, so that parts fit each other.

Windows and chunks are shorter than the prompts of ``baseline``, so that prompts cross them.
"""

from __future__ import annotations

VOCABULARY = 160
SPECIAL_TOKENS = 24
"""Ids below are special ones; prompts keep off them."""
LAYERS = 4
TOWER_LAYERS = 2
"""Of the parts that read images or sounds."""
HEADS = 4
SPREAD = 0.15
"""Standard deviation of weights at birth: enough that every layer moves the logits."""

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_layers_per_stack", "layers")
"""How many layers a configuration has goes by one of these names."""
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads")
SPREADS = ("initializer_range", "init_std", "initializer_std", "embed_init_std", "embedding_initializer_range")

_TABLE: tuple[tuple[int, str], ...] = (
    (
        VOCABULARY,
        """vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size audio_vocab_size
        entity_vocab_size pronunciation_vocab_size shape_vocab_size vocab_offset encoder_hash_byte_group_vocab
        ngram_vocab_size_base""",
    ),
    (
        64,  # the width
        """hidden_size d_model n_embd dim emb_dim embed_dim embedding_size embedding_dim word_embed_proj_dim lru_width
        attention_hidden_size input_embedding_size output_embedding_size out_hidden_size projection_dim
        text_hidden_size vision_hidden_size projector_hidden_size hidden_size_global moe_hidden_size
        backbone_hidden_size adapter_out_dim adapter_in_dim adapter_input_size output_dim
        image_text_hidden_size encoder_hidden_size
        pooler_hidden_size entity_emb_size pronunciation_embed_dim shape_embed_dim prediction_head_size
        patch_embed_hidden_size projector_output_dim lm_head_hidden dim_model decoder_hidden_size
        projection_hidden_size projection_hidden_dim projector_input_dim image_token_embed_dim input_size
        ple_embed_dim output_channels d_latents post_conv_in_channels post_conv_mid_channels
        post_conv_out_channels num_centroids""",
    ),
    (
        96,  # inside a feed-forward
        """intermediate_size ffn_dim n_inner d_ff d_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size
        intermediate_size_mlp dense_intermediate_size hidden_dim dff dim_ff feed_forward_size mlp_dim
        projection_intermediate_size alignment_intermediate_size prompt_mid_dim""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads num_query_groups
        num_sliding_attention_heads swa_num_attention_heads linear_num_heads linear_num_value_heads
        resampler_heads resampler_n_heads conf_num_attention_heads num_self_attention_heads
        num_cross_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num
        pos_emb_height pos_emb_width posemb_grid_size""",
    ),
    (
        2,
        """linear_num_key_heads n_mamba_heads decoder_layers encoder_layers num_decoder_layers num_encoder_layers
        resampler_depth conf_num_hidden_layers num_feedforward_networks num_self_attends_per_block num_blocks
        heads_per_ngram num_global_layers aligner_num_add_layers n_layers_per_attn_res_block n_groups n_group
        num_quantizers num_codebooks num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k
        index_topk_blocks split_ngram_parts o_groups centroid_intermediate_top_k num_hash""",
    ),
    (
        16,  # of a head, and of what is compressed
        """head_dim qk_nope_head_dim v_head_dim d_kv d_head kv_channels attention_head_size attention_head_dim
        dim_head global_head_dim swa_head_dim query_pre_attn_scalar index_head_dim kv_lora_rank resampler_dim_head
        resampler_head_dim mamba_headdim mamba_d_head mamba_head_dim linear_head_dim linear_key_head_dim
        linear_value_head_dim router_hidden_size adapter_rank embedding_rank num_patches num_position_embeddings
        image_seq_length mm_tokens_per_image num_image_tokens vision_soft_tokens_per_image
        audio_soft_tokens_per_image index_n_heads""",
    ),
    (
        8,  # windows, chunks, states and low ranks
        """sliding_window sliding_window_size attention_chunk_size attention_window_size local_attention
        local_attention_window_len keep_window_size attention_window index_topk block_size chunk_size
        mamba_chunk_size index_block_size index_kpool segment_means_seq_len num_landmarks local_attn_chunk_length
        lsh_attn_chunk_length qk_rope_head_dim rotary_dim state_size ssm_state_size mamba_d_state mamba_dt_rank
        time_step_rank laurel_rank d_rel hidden_size_per_layer_input mamba_n_heads mamba_num_heads gated_norm_rank
        hc_lowrank resampler_n_latents resampler_num_latents num_query_tokens num_latents patch_size
        prompt_length latent_query_num floor_scale log_scaling_n_floor""",
    ),
    (24, "qk_head_dim"),  # the two parts above together
    (128, "mamba_d_ssm"),  # mamba_n_heads x mamba_d_head
    (
        32,
        """q_lora_rank moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
        shared_intermediate_size expert_ffn_hidden_size share_expert_dim shared_experts_intermediate_size o_lora_rank
        image_size true_hidden_size intra_bottleneck_size base_channels codebook_dim""",
    ),
    (
        1,
        """topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts num_kv_shared_layers
        first_k_dense_replace num_dense_layers num_random_blocks num_nextn_predict_layers""",
    ),
    (
        512,
        """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions
        context_length original_max_position_embeddings max_2d_position_embeddings rel_extent""",
    ),
)
SIZES: dict[str, int] = {name: size for size, names in _TABLE for name in names.split()}
