"""The architectures that tests try: how small ones of them are configured, and random models of these.

`CHECKPOINTS` are written to disk with a tokenizer (the fixture `base_of`); those of `ARCHITECTURES` and
`PECULIAR` live in memory alone (`small_model`).
"""

from __future__ import annotations

from typing import Any

COMMON = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADED = {**COMMON, "head_dim": 16}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GPT2 = {"vocab_size": 600, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}

ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED_EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen3": ("Qwen3Config", HEADED),
    "gemma2": ("Gemma2Config", HEADED),
    "gemma3_text": ("Gemma3TextConfig", HEADED),
    "gemma3": ("Gemma3Config", {"text_config": HEADED, "vision_config": VISION, "mm_tokens_per_image": 4}),
    "mistral": ("MistralConfig", COMMON),
    "mixtral": ("MixtralConfig", {**COMMON, "num_local_experts": 4}),
    "gpt2": ("GPT2Config", {**GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt2_bare": ("GPT2Config", {**GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": (
        "GPTNeoXConfig",
        {key: value for key, value in COMMON.items() if key != "num_key_value_heads"},
    ),
    "phi": ("PhiConfig", COMMON),
    "phi3": ("Phi3Config", COMMON),
    "olmo2": ("Olmo2Config", COMMON),
    "qwen2_moe": ("Qwen2MoeConfig", {**COMMON, **ROUTED, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {**HEADED, **ROUTED}),
    "olmoe": ("OlmoeConfig", {**COMMON, **ROUTED}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **COMMON,
            "num_key_value_heads": 4,
            **ROUTED,
            **GROUPED_EXPERTS,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "glm4_moe": ("Glm4MoeConfig", {**HEADED, **ROUTED, **GROUPED_EXPERTS}),
    # These two hold all experts of a layer as one tensor in their files, too.
    "gpt_oss": ("GptOssConfig", {**HEADED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4_text": (
        "Llama4TextConfig",
        {**HEADED, "intermediate_size_mlp": 48, "num_local_experts": 4, "moe_layers": [0, 1]},
    ),
    # In its files q, k, v and gate are one matrix, in the model four.
    "hrm_text": ("HrmTextConfig", COMMON),
}


def model_class(config, bare: bool):
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    if bare:
        return AutoModel
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
# Model type, and what its configuration needs besides SMALL (or in its place).
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3": HEADS,
    "qwen3_moe": {**HEADS, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    "gemma": HEADS,
    "gemma2": {**HEADS, "sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {**HEADS, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {
        "logit_scale": 0.5,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
    "nemotron": {},
    "smollm3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_neox": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
}
# Models with a peculiarity that some tests are about.
PECULIAR = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {
        **HEADS,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "attention_chunk_size": 8,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "moe_layers": [0, 1],
    },
    "modernbert-decoder": {"local_attention": 16},
    "mamba": {"state_size": 4, "time_step_rank": 3},
    "phimoe": {"num_local_experts": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64, "rescale_every": 1},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_d_state": 4,
        "mamba_dt_rank": 3,
        "n_mamba_heads": 2,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "use_mamba_kernels": False,
    },
}


def random_model(kind: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = (ARCHITECTURES | PECULIAR)[kind]
    names = set(AutoConfig.for_model(kind).to_dict()) | set(fields)
    known = {
        name: value
        for name, value in {**SMALL, **fields}.items()
        if name in names or name == "num_key_value_heads"
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **known), dtype=torch.float32)
    return model.eval().requires_grad_(False)
