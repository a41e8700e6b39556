"""Settings of tiny models of every type that is read head by head: what is its own."""

_LAYERS, _HEADS = 4, 4
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    # Neither the width of a query nor what `head_dim` says.
    "v_head_dim": 12,
    "num_key_value_heads": _HEADS,
    "head_dim": None,
    **_ROUTED,
}
_GROUPED = {**_LATENT, "n_group": 1, "topk_group": 1}
_MAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_d_conv": 3,
    "mamba_chunk_size": 8,
}
_SLIDING = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_SHARED = {**_MOE, **_LINEAR, "shared_expert_intermediate_size": 24}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8}

EVERY = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "ministral": ("MinistralConfig", _SLIDING),
    "ministral3": ("Ministral3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", _MOE),
    "qwen3_next": ("Qwen3NextConfig", _SHARED),
    "qwen3_5_text": ("Qwen3_5TextConfig", _LINEAR),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", _SHARED),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            **_SLIDING,
        },
    ),
    "gemma2": ("Gemma2Config", {**_SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3TextConfig", {**_SLIDING, "query_pre_attn_scalar": 8}),
    "gemma4_text": (
        "Gemma4TextConfig",
        {
            **_SLIDING,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 300,
            "num_kv_shared_layers": 0,
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", _SLIDING),
    "olmo_hybrid": ("OlmoHybridConfig", _LINEAR),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "glm4": ("Glm4Config", {"pad_token_id": 0}),
    "glm4_moe": ("Glm4MoeConfig", _ROUTED),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", _GROUPED),
    "deepseek_v2": ("DeepseekV2Config", _GROUPED),
    "deepseek_v3": ("DeepseekV3Config", _GROUPED),
    "minimax_m2": (
        "MiniMaxM2Config",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "smollm3": ("SmolLM3Config", {"pad_token_id": 0}),
    "seed_oss": ("SeedOssConfig", {}),
    "exaone4": ("Exaone4Config", _SLIDING),
    "granite": (
        "GraniteConfig",
        {
            "residual_multiplier": 0.22,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "logits_scaling": 4.0,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_MAMBA,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "residual_multiplier": 0.22,
            "position_embedding_type": "rope",
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "num_hidden_layers": None,
            "layers_block_type": ["mamba", "attention", "moe", "attention", "mlp"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "conv_kernel": 3,
            "chunk_size": 8,
            # Its scan and its single step differ by 1e-3 where weights are as large
            # as those of the others.
            "initializer_range": 0.1,
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        {
            **_MAMBA,
            "attention_out_multiplier": 0.7,
            "ssm_out_multiplier": 0.5,
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "mamba_d_ssm": 64,
        },
    ),
    "bamba": ("BambaConfig", {**_MAMBA, "attn_layer_indices": [1, 3]}),
    "jamba": (
        "JambaConfig",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_d_conv": 3,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
        },
    ),
    "lfm2": ("Lfm2Config", _CONVOLUTION),
    "lfm3": ("Lfm3Config", _CONVOLUTION),
    "kimi_linear": (
        "KimiLinearConfig",
        {
            **_LATENT,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_heads": 4,
            "linear_head_dim": 8,
            "linear_conv_kernel_dim": 3,
            "num_experts": 4,
        },
    ),
    "apertus": (
        "ApertusConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "ernie4_5": ("Ernie4_5Config", {}),
    "dots1": ("Dots1Config", {**_ROUTED, "n_group": 1, "topk_group": 1}),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {"pad_token_id": 0}),
}
_EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_PICTURE = {"image_token_id": 299, "boi_token_id": 297, "eoi_token_id": 298}
# By the type of the language model inside: class of the whole, and what is its own.
SEEING = {
    "gemma3_text": (
        "Gemma3Config",
        {
            "vision_config": {**_EYES, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "image_token_index": 299,
            "boi_token_index": 297,
            "eoi_token_index": 298,
        },
    ),
    "gemma4_text": (
        "Gemma4Config",
        {
            "vision_config": {
                **_EYES,
                "head_dim": 8,
                "global_head_dim": 8,
                "num_key_value_heads": 2,
            },
            "audio_config": None,
            **_PICTURE,
        },
    ),
    "qwen3_5_text": (
        "Qwen3_5Config",
        {
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "depth": 1,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 14,
                "num_position_embeddings": 16,
            },
            "image_token_id": 299,
            "video_token_id": 298,
            "vision_start_token_id": 297,
            "vision_end_token_id": 296,
        },
    ),
    "ministral3": (
        "Mistral3Config",
        {
            "vision_config": {
                **_EYES,
                "model_type": "pixtral",
                "head_dim": 8,
                "image_size": 28,
                "patch_size": 14,
            },
            "image_token_index": 299,
        },
    ),
}
