"""Small configs of model types, each with what makes it what it is: for comparisons that take no time."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VOCABULARY = 101
SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    **{"tie_word_embeddings": False, "initializer_range": 0.2},
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS: dict[str, object] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
#: As DeepSeek calls them; the first layer has none.
ROUTED: dict[str, object] = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1},
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True},
}
#: The first layer has no experts.
SPARSE: dict[str, object] = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
#: Layers of two types, which in some families have frequencies of their own.
MIXED: dict[str, object] = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
#: Latent attention: heads of 12 for keys, of which 4 turn, and of 6 for values.
LATENT: dict[str, object] = {
    **{"num_key_value_heads": 4, "head_dim": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
    **{"kv_lora_rank": 16, "q_lora_rank": 16},
}
#: Linear attention: two heads for keys, four for values, of 8. With larger weights rounding alone moves gradients by
#: 1e-4 in a few steps.
LINEAR: dict[str, object] = {
    **{"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "initializer_range": 0.1,
}
#: Factors outside of layers.
SCALED: dict[str, object] = {"embedding_multiplier": 6.0, "logits_scaling": 4.0}
#: Scores and logits that are capped.
CAPPED: dict[str, object] = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
#: What a family needs besides sizes; dropout that is on in its default config.
NEEDS: dict[str, dict] = {
    "axk1": ROUTED | SPARSE | LATENT,
    "deepseek_v2": ROUTED | LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": ROUTED | LATENT,
    "flint": EXPERTS | {"shared_expert_intermediate_size": 40, "router_aux_loss_coef": 0.5, **MIXED},
    "glm4_moe_lite": ROUTED | SPARSE | LATENT,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5, **MIXED},
    "granite_swa": {"embedding_multiplier": 6.0, "logits_scaling": 4.0, **MIXED},
    "mimo_v2_flash": ROUTED | SPARSE | MIXED | {"head_dim": 12, "v_head_dim": 8},
    "minicpm3": LATENT | {"scale_emb": 3.0, "dim_model_base": 8},
    "youtu": LATENT,
    "afmoe": EXPERTS | MIXED | {"num_shared_experts": 1, "num_dense_layers": 1, "mup_enabled": True},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2},
    "baichuan": {"num_key_value_heads": 4, "max_position_embeddings": None, "z_loss_weight": 0},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.25, **MIXED},
    "cohere2_moe": EXPERTS | SPARSE | MIXED | {"num_shared_experts": 1, "logit_scale": 0.25},
    "dots1": ROUTED | MIXED,
    "ernie4_5_moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
        **{"moe_layer_end_index": 2, "router_aux_loss_coef": 0.5},
    },
    "exaone_moe": EXPERTS | SPARSE | MIXED | {"n_group": 2, "topk_group": 1},
    "flex_olmo": EXPERTS | {"router_aux_loss_coef": 0.5},
    "gemma2": CAPPED,
    "gemma3_text": MIXED | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "glm4_moe": ROUTED,
    "gpt_neox": {"num_key_value_heads": 4, "rotary_pct": 0.5, "hidden_act": "gelu"},
    "granite": {
        **{"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.5},
        **{"attention_multiplier": 0.2},
    },
    "granitemoe": SCALED | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "granitemoe_swa": SCALED | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": SCALED | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "hy_v3": EXPERTS | SPARSE,
    "hyperclovax": {"embedding_multiplier": 6.0, "logits_scaling": 0.25, "residual_multiplier": 0.5},
    "kolibri1": {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, **MIXED},
    "laguna": EXPERTS | SPARSE | MIXED | {"router_aux_loss_coef": 0.5, "shared_expert_intermediate_size": 40},
    "mellum": EXPERTS | SPARSE | MIXED | {"num_local_experts": 4, "router_aux_loss_coef": 0.5},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "olmo3": MIXED,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 40, "router_aux_loss_coef": 0.5},
    "qwen3_5_moe_text": EXPERTS | LINEAR | {"shared_expert_intermediate_size": 40, "router_aux_loss_coef": 0.5},
    "qwen3_5_text": LINEAR,
    "qwen3_next": EXPERTS | LINEAR | {"shared_expert_intermediate_size": 40, "router_aux_loss_coef": 0.5},
    "olmo_hybrid": LINEAR | {"linear_num_key_heads": 4},
    "qwen3_moe": EXPERTS | {"router_aux_loss_coef": 0.5},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "solar_open": ROUTED,
    "vaultgemma": CAPPED,
}


def small_config(kind: str, **changes: object) -> "PretrainedConfig":
    """Three layers of 32, four heads of 8 on two keys, 101 tokens; ``changes`` are entries of a config.json.

    Raises whatever the config's class does where it takes no such sizes.
    """
    from transformers import AutoConfig  # sizes alone are to be had in no time

    return AutoConfig.for_model(kind, **(SIZES | TOKENS | {"head_dim": 8} | NEEDS.get(kind, {}) | changes))
