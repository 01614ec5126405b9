"""A tiny random model of every family of decoder-only models that transformers has and people use."""

from collections.abc import Mapping
from typing import Any

from tiny import N_LAYERS, VOCABULARY, random_model
from transformers import AutoConfig

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.35,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_WINDOW = {"sliding_window": 8}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SHARED = {"shared_expert_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 1}
_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_MLA = {**_EXPERTS, **_SHARED, **_GROUPS, **_LATENT, "num_key_value_heads": 4}
_LINEAR = {
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA = {"mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_GPT2 = {
    "n_positions": 256,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": N_LAYERS,
    "n_head": 4,
    "activation_function": "gelu",
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **_WINDOW}
_HYBRID = ["linear_attention", "full_attention"] * (N_LAYERS // 2)

FAMILIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "Llama 2, 3": ("llama", {}),
    "Llama 4": (
        "llama4_text",
        {**_EXPERTS, "intermediate_size_mlp": 48, "head_dim": 8, "interleave_moe_layer_step": 2},
    ),
    "Mistral": ("mistral", _WINDOW),
    "Ministral": ("ministral", {**_WINDOW, "head_dim": 8}),
    "Ministral 3": ("ministral3", {"head_dim": 8}),
    "Mixtral": ("mixtral", _EXPERTS),
    "Qwen2": ("qwen2", {}),
    "Qwen2 MoE": ("qwen2_moe", {**_EXPERTS, **_SHARED}),
    "Qwen3": ("qwen3", {"head_dim": 8}),
    "Qwen3 MoE": ("qwen3_moe", {**_EXPERTS, "head_dim": 8}),
    "Qwen3-Next": ("qwen3_next", {**_EXPERTS, **_SHARED, **_LINEAR}),
    "Qwen3-Next, dense": ("qwen3_next", {**_LINEAR, "num_experts": 0, "mlp_only_layers": list(range(N_LAYERS))}),
    "Qwen3.5": ("qwen3_5_text", _LINEAR),
    "Qwen3.5 MoE": ("qwen3_5_moe_text", {**_EXPERTS, **_SHARED, **_LINEAR}),
    "Gemma": ("gemma", {"head_dim": 8}),
    "Gemma 2": ("gemma2", _GEMMA),
    "Gemma 3": ("gemma3_text", _GEMMA),
    "Gemma 3n": (
        "gemma3n_text",
        {
            **_GEMMA,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
        },
    ),
    "Gemma 4": (
        "gemma4_text",
        {**_GEMMA, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 8, "hidden_size_per_layer_input": 8},
    ),
    "Phi 1, 1.5, 2": ("phi", {"num_key_value_heads": 4}),
    "Phi 3, 4": ("phi3", {}),
    "Phi 4 multimodal": ("phi4_multimodal", {}),
    "Phi 3.5 MoE": ("phimoe", _EXPERTS),
    "GPT-2": ("gpt2", _GPT2),
    "GPT BigCode": ("gpt_bigcode", _GPT2),
    "GPT-J": ("gptj", {**_GPT2, "rotary_dim": 4}),
    "CodeGen": ("codegen", {**_GPT2, "rotary_dim": 4}),
    "GPT-Neo": ("gpt_neo", {"num_layers": N_LAYERS, "num_heads": 4, "attention_types": [[["global", "local"], 2]]}),
    "GPT-NeoX, Pythia": ("gpt_neox", {}),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": N_LAYERS}),
    "Falcon 1, rotary": ("falcon", {"multi_query": True, "alibi": False, "ffn_hidden_size": 48}),
    "Falcon 1, ALiBi": ("falcon", {"multi_query": False, "parallel_attn": False, "alibi": True, "ffn_hidden_size": 48}),
    "Falcon 2, 40B": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48}),
    "Falcon H1": ("falcon_h1", {**_MAMBA, "mamba_d_ssm": 64, "head_dim": 8}),
    "Falcon Mamba": ("falcon_mamba", {"state_size": 8, "expand": 2}),
    "BLOOM": ("bloom", {"n_layer": N_LAYERS, "n_head": 4}),
    "MPT": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": N_LAYERS, "expansion_ratio": 2, "max_seq_len": 256}),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", _WINDOW),
    "OLMoE": ("olmoe", _EXPERTS),
    "Cohere": ("cohere", {}),
    "Cohere 2": ("cohere2", {**_WINDOW, "head_dim": 8}),
    "Granite": ("granite", {}),
    "Granite MoE": ("granitemoe", _EXPERTS),
    "Granite hybrid": (
        "granitemoehybrid",
        {**_EXPERTS, **_MAMBA, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"] * (N_LAYERS // 2)},
    ),
    "GLM": ("glm", {"head_dim": 8}),
    "GLM-4": ("glm4", {"head_dim": 8}),
    "GLM-4.5": ("glm4_moe", {**_MLA, "head_dim": 8}),
    "SmolLM3": ("smollm3", {}),
    "StableLM": ("stablelm", {}),
    "StarCoder2": ("starcoder2", {}),
    "DeepSeek V2": ("deepseek_v2", {**_MLA, "topk_method": "greedy"}),
    "DeepSeek V3": ("deepseek_v3", _MLA),
    "gpt-oss": ("gpt_oss", {**_EXPERTS, **_WINDOW, "head_dim": 8}),
    "Nemotron": ("nemotron", {"head_dim": 8}),
    "Nemotron-H": (
        "nemotron_h",
        {
            "layer_types": ["mamba", "moe", "attention", "moe"],
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "mamba_head_dim": 8,
            "mamba_num_heads": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "head_dim": 8,
            **_EXPERTS,
            **_SHARED,
            "moe_shared_expert_intermediate_size": 24,
            "moe_latent_size": None,
        },
    ),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"] * (N_LAYERS // 2)}),
    "LFM2 MoE": (
        "lfm2_moe",
        {**_EXPERTS, "layer_types": ["conv", "full_attention"] * (N_LAYERS // 2), "num_dense_layers": 1},
    ),
    "EXAONE 4": ("exaone4", _WINDOW),
    "ERNIE 4.5": ("ernie4_5", {"head_dim": 8}),
    "ERNIE 4.5 MoE": ("ernie4_5_moe", {**_EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}),
    "Mamba": ("mamba", {"state_size": 8, "expand": 2}),
    "Mamba 2": ("mamba2", {"state_size": 8, "expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1}),
    "Jamba": (
        "jamba",
        {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "Bamba": ("bamba", {**_MAMBA, "attn_layer_indices": [1, 3]}),
    "RecurrentGemma": ("recurrent_gemma", {"head_dim": 8, "lru_width": 32, "attention_window_size": 8}),
    "Zamba 2": (
        "zamba2",
        {
            **_MAMBA,
            "layer_types": ["mamba", "hybrid"] * (N_LAYERS // 2),
            "n_mamba_heads": 8,
            "hybrid_layer_ids": [1, 3],
            "mamba_ngroups": 1,
            "mamba_headdim": 8,
        },
    ),
    "Apertus": ("apertus", {}),
    "Arcee": ("arcee", {}),
    "BitNet": ("bitnet", {}),
    "Helium": ("helium", {"head_dim": 8}),
    "Hunyuan": ("hunyuan_v1_dense", {"head_dim": 8}),
    "Hunyuan MoE": ("hunyuan_v1_moe", {**_EXPERTS, "head_dim": 8, "moe_topk": 2}),
    "InternLM 3": ("internlm3", {"head_dim": 8}),
    "MiniCPM 3": ("minicpm3", {**_LATENT, "num_key_value_heads": 4}),
    "MiniMax": ("minimax", {**_EXPERTS, "head_dim": 8, "layer_types": _HYBRID}),
    "nanochat": ("nanochat", {}),
    "Persimmon": ("persimmon", {}),
    "Seed-OSS": ("seed_oss", {"head_dim": 8}),
    "RWKV": ("rwkv", {"attention_hidden_size": 32, "context_length": 256}),
    "VaultGemma": ("vaultgemma", _GEMMA),
}


def family_config(family: str) -> Any:
    kind, changes = FAMILIES[family]
    return AutoConfig.for_model(kind, **{**_COMMON, **changes})


def family_model(family: str) -> Any:
    return random_model(family_config(family))
