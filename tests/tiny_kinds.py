"""Settings of tiny models of every type that is read: what is its own of each."""

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
    "llama4_text": (
        "Llama4TextConfig",
        {
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
    ),
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
    "gemma": ("GemmaConfig", {}),
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
_QWEN_SEES = {
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
}
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
    "qwen3_5_text": ("Qwen3_5Config", _QWEN_SEES),
    "qwen3_5_moe_text": ("Qwen3_5MoeConfig", _QWEN_SEES),
    "llama4_text": (
        "Llama4Config",
        {
            "vision_config": {
                **_EYES,
                "image_size": 28,
                "patch_size": 14,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "vision_output_dim": 16,
            },
            "image_token_index": 299,
            "boi_token_index": 297,
            "eoi_token_index": 298,
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
# Types that some use and that are not read head by head, all or most of them.
FURTHER = {
    "bloom": ("BloomConfig", {"num_key_value_heads": None}),
    "cohere": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", _SLIDING),
    "falcon": ("FalconConfig", {"head_dim": None}),
    "gemma3n_text": (
        "Gemma3nTextConfig",
        {
            **_SLIDING,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 300,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * _LAYERS,
        },
    ),
    "gpt2": ("GPT2Config", {"n_positions": 512, "head_dim": None}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "mamba2": (
        "Mamba2Config",
        {
            "state_size": 8,
            "conv_kernel": 3,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "nanochat": ("NanoChatConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 6}),
    "zamba2": (
        "Zamba2Config",
        {
            "mamba_d_state": 8,
            "mamba_d_conv": 3,
            "mamba_expand": 2,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            # As that of Nemotron-H.
            "initializer_range": 0.1,
        },
    ),
}
# Settings that grow with the width of a model.
WIDTHS = {
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "global_head_dim",
    "moe_intermediate_size",
    "shared_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "intermediate_size_mlp",
    "ffn_dim",
    "word_embed_proj_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_head_dim",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "query_pre_attn_scalar",
    "mamba_d_head",
    "mamba_head_dim",
    "mamba_d_ssm",
    "mamba_dt_rank",
    "hidden_size_per_layer_input",
    "laurel_rank",
    "adapter_rank",
}
