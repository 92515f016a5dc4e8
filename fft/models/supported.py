"""Which models are trained, and by name, which are not: whatever their layers do that ours would get wrong."""

import re

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from fft.errors import UserError
from fft.models.outside import check_outside
from fft.models.recurrent import KIND
from fft.models.vision import DECODERS, PARTS
from fft.ops.alibi import LONGEST
from fft.parallel.tensor_plan import heads_of

#: What ``base_model_pp_plan`` must name for a model to be cut the way we cut it: embedding, layers and norm; there is
#: no dropout, so that one after the embedding does nothing.
_PLANS = (
    {"embed_tokens", "layers", "norm"},
    {"embed_tokens", "embed_dropout", "layers", "final_layernorm"},
    {"embed_in", "emb_dropout", "layers", "final_layer_norm"},
)


#: Model types that publish no plan, whose modules are called as Llama's.
_UNPUBLISHED = (
    *("diffllama", "granitemoe", "granitemoe_swa", "granitemoeshared", "hunyuan_v1_dense", "hunyuan_v1_moe", "olmoe"),
)

#: Mixtures of experts among them.
EXPERTS = (
    *("afmoe", "aria_text", "cohere2_moe", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "hy_v3"),
    *("axk1", "deepseek_v2", "deepseek_v3", "flint", "glm4_moe_lite", "gpt_oss", "kolibri1", "laguna", "mellum"),
    *("mimo_v2_flash", "minimax_m2", "mixtral", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe"),
    *("qwen3_next", "solar_open"),
)

#: Rotary embeddings, scaled or not, as ``rope_type`` names them.
_ROTARY = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

#: Those whose attention scores are capped by ``attn_logit_softcapping``.
_CAPPED = ("gemma2", "vaultgemma")

#: Settings of chances with which values are dropped, but for those of heads that a language model has not.
_DROPOUT = re.compile(r"(?<!classifier_)(?<!summary_first_)(dropout(_prob)?|pdrop|layerdrop|jitter_noise)$")

#: What features of a tower are: those of its last layer, without the class token.
_FEATURES = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}

#: Model types that are trained: all that transformers does between their layers is known here, and the tests compare
#: each with transformers.
FAMILIES = (
    *("apertus", "arcee", "baichuan", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2"),
    *("gemma3_text", "glm", "glm4", "gpt_neox", "granite", "granite_swa", "helium", "hyperclovax", "internlm3"),
    *("iquestcoder", "jais2", "llama", "minicpm3", "ministral", "ministral3", "mistral", "olmo", "olmo2", "olmo3"),
    *("olmo_hybrid", "phi", "phi3", "qwen2", "qwen3", "qwen3_5_text", "seed_oss", "smollm3", "starcoder2"),
    *("vaultgemma", "youtu", *_UNPUBLISHED, *EXPERTS),
)


def check_supported(config: PretrainedConfig, seq_len: int) -> None:
    """Refuse by name models whose layers we would get wrong. Raises :class:`UserError`."""
    if config.model_type in PARTS:
        check_tower(config)
        config = config.get_text_config()
    name = config.model_type
    plan = set(getattr(config, "base_model_pp_plan", None) or ())
    if plan not in _PLANS and (plan or name not in (*_UNPUBLISHED, *DECODERS)):
        raise UserError(
            f"model type {name!r} publishes no pipeline plan of embed_tokens, layers and norm: choose one of "
            f"{', '.join((*FAMILIES, *PARTS))}."
        )
    _check_scores(config)
    if name not in (*FAMILIES, *DECODERS):
        raise UserError(
            f"model type {name!r} does between its layers, or within them, what is not known here: choose one of "
            f"{', '.join((*FAMILIES, *PARTS))}."
        )
    _check_sizes(config)
    _check_rotary(config, seq_len)
    key = "hidden_act" if hasattr(config, "hidden_act") else "hidden_activation"
    if (activation := getattr(config, key, None)) not in ACT2FN:
        raise UserError(f"{key} {activation!r} in the model's config.json is none that transformers knows.")
    kinds = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None)
    if window is not None and not isinstance(window, int):
        raise UserError(f"sliding_window {window!r} in the model's config.json must be a number of tokens, or null.")
    windowed = "sliding_attention" in kinds if kinds else window is not None  # 0 is one, too
    if windowed and (type(window) is not int or window < 1):
        raise UserError(
            f"model type {name!r} attends within a sliding window (sliding_window {window} in its config.json), which "
            "must be of 1 token or more."
        )
    if any(kind not in ("full_attention", "sliding_attention", KIND) for kind in kinds):
        raise UserError(
            f"model type {name!r} mixes layer types {sorted(set(kinds))}, which this release does not train."
        )
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
        raise UserError(
            f"model type {name!r} attends to what follows, too (is_causal or use_bidirectional_attention in its "
            "config.json): only causal models are trained."
        )
    _check_dropout(config)


def check_tower(config: PretrainedConfig) -> None:
    """Refuse vision towers whose layers we would get wrong. Raises :class:`UserError`."""
    vision = config.vision_config
    _check_dropout(vision)
    kind = vision.hidden_act
    if kind not in ACT2FN:
        raise UserError(f"hidden_act {kind!r} in vision_config of the model's config.json is none that is known.")
    for key, only in _FEATURES.items():
        if (value := getattr(config, key, only)) != only:
            raise UserError(f"{key} {value!r} in the model's config.json: only {only!r} is trained; use another model.")


def _check_dropout(config: PretrainedConfig) -> None:
    dropout = [key for key, value in config.to_dict().items() if _DROPOUT.search(key) and value]
    if dropout:
        raise UserError(f"{dropout[0]} is not supported with packed documents: set it to 0 in config.json.")


def _check_sizes(config: PretrainedConfig) -> None:
    """Raise :class:`UserError` for sizes of which no model can be made."""
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size"):
        if key == "num_key_value_heads" and not hasattr(config, key):
            continue  # as many as attention heads
        if not isinstance(size := getattr(config, key, None), int) or size < 1:
            raise UserError(f"{key} is {size} in the model's config.json: it must be 1 or more.")
    heads, kv_heads = heads_of(config)
    if heads % kv_heads:
        raise UserError(
            f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads} in the model's config.json."
        )
    pad = config.pad_token_id
    if pad is not None and not -config.vocab_size <= pad < config.vocab_size:
        raise UserError(
            f"pad_token_id {pad} in the model's config.json is outside its vocabulary of {config.vocab_size}: correct "
            "it, or set it to null."
        )


def _check_scores(config: PretrainedConfig) -> None:
    """Raise :class:`UserError` for what a model does to scores, embeddings or logits, and we would leave out."""
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None and config.model_type not in _CAPPED:
        raise UserError(
            f"attn_logit_softcapping {cap} in the model's config.json means nothing to model type "
            f"{config.model_type!r} in transformers: set it to null."
        )
    if cap is not None and not (isinstance(cap, int | float) and cap > 0):
        raise UserError(f"attn_logit_softcapping {cap!r} in the model's config.json must be more than 0, or null.")
    if getattr(config, "z_loss_weight", None):
        raise UserError(f"z_loss_weight {config.z_loss_weight} is not trained with: set it to 0 in config.json.")
    check_outside(config)


def _check_rotary(config: PretrainedConfig, seq_len: int) -> None:
    """Raise :class:`UserError` for unknown frequencies, and where a document's depend on its neighbours' length."""
    if getattr(config, "alibi", False):  # and nothing is turned
        if seq_len > LONGEST:
            raise UserError(f"ALiBi counts up to {LONGEST} tokens exactly: use --seq_len {LONGEST} or less.")
        return
    settings = getattr(config, "rope_parameters", None) or {}
    if not settings and config.model_type == "olmo_hybrid":  # which then has no positions
        return
    kinds = set(getattr(config, "layer_types", None) or ())
    by_type = kinds and kinds <= settings.keys()
    for rotary in [settings[kind] for kind in sorted(kinds)] if by_type else [settings]:
        _check_frequencies(config, rotary, seq_len)


def _check_frequencies(config: PretrainedConfig, rotary: dict, seq_len: int) -> None:
    """:func:`_check_rotary` for all layers, or for those of one type."""
    kind = rotary.get("rope_type")
    if kind not in _ROTARY:
        raise UserError(
            f"rope_type {kind!r} in the model's config.json is none of {', '.join(_ROTARY)}, which are known here."
        )
    theta = rotary.get("rope_theta")
    if not isinstance(theta, int | float) or theta <= 0:
        raise UserError(f"rope_theta {theta!r} in the model's config.json must be more than 0.")
    limits = {"dynamic": config.max_position_embeddings, "longrope": rotary.get("original_max_position_embeddings")}
    limit = limits.get(kind)
    if kind not in limits:
        return
    if not isinstance(limit, int):
        raise UserError(
            f"rotary scaling of type {kind!r} needs original_max_position_embeddings in rope_parameters of the model's "
            "config.json: add it."
        )
    if seq_len > limit:
        raise UserError(
            f"model type {config.model_type!r} has rotary scaling of type {kind!r}, whose frequencies change with the "
            f"longest document beyond {limit} tokens: use --seq_len {limit} or less, or yarn, llama3 or linear scaling."
        )
