"""Tiny random models of many families, and a padded batch, shared by the tests of what is done to a model."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {"num_local_experts": 3, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
# What is set here is what a wrong exit would trip over: caps, scales, windows shorter than the sequence, and
# lists of experts as long as the list of blocks.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 5.0,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
        "logits_scaling": 7.0,
    },
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "stablelm": {},
    "gpt2": {},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mixtral": MOE,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
    "mpt": {"max_seq_len": 64},
    "gpt_oss": MOE | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "nemotron": {},
    "starcoder2": {"sliding_window": 4},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 4},
}
# Only the tests of shortened models go through these.
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "topk_group": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= ROUTED | {"n_group": 2, "first_k_dense_replace": 2, "num_key_value_heads": 4}
ALTERNATING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MORE: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("apertus", "arcee", "biogpt", "ernie4_5", "gemma", "glm", "glm4", "gpt_bigcode")},
    **{name: {} for name in ("helium", "hunyuan_v1_dense", "ministral", "olmo", "phi", "phimoe", "seed_oss", "xglm")},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": LATENT | {"topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "exaone4": ALTERNATING,
    "glm4_moe": ROUTED | {"n_group": 1, "first_k_dense_replace": 1},
    "gptj": {"rotary_dim": 8},
    "granitemoe": MOE,
    "olmo3": ALTERNATING,
    "olmoe": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS,
    "smollm3": {"no_rope_layers": [1, 0, 1], "sliding_window": 4, "use_sliding_window": True},
}


def build(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = COMMON | {**MORE, **FAMILIES}.get(family, {}) | changes
    if family in ("falcon", "mpt"):  # theirs is not a setting
        del settings["head_dim"]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # norms that differ from 1, weights that matter
    return model.eval()


built = cache(build)  # shared: a test that changes the model for good builds its own


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = (torch.arange(11) < torch.tensor([11, 7, 9])[:, None]).long()
    return {"input_ids": torch.randint(3, 64, mask.shape) * mask, "attention_mask": mask}
