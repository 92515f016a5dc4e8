"""Which models are trained, and by name, which are not: whatever their layers do that ours would get wrong."""

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from fft.errors import UserError

#: Modules that ``base_model_pp_plan`` must name for a model to be cut the way we cut it.
_PLAN = {"embed_tokens", "layers", "norm"}


#: Mixtures of experts whose routers and stored weights we know.
_EXPERTS = ("qwen2_moe", "qwen3_moe")

#: Model types that are trained: all that transformers does between their layers is known here, and the tests compare
#: each with transformers.
FAMILIES = (
    *("apertus", "arcee", "cwm", "ernie4_5", "exaone4", "gemma", "glm", "glm4", "granite", "helium", "hyperclovax"),
    *("internlm3", "iquestcoder", "jais2", "llama", "ministral", "ministral3", "mistral", "olmo", "olmo2", "phi3"),
    *("qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2", *_EXPERTS),
)


def check_supported(config: PretrainedConfig, seq_len: int) -> None:
    """Refuse by name models whose layers we would get wrong. Raises :class:`UserError`."""
    name = config.model_type
    if set(getattr(config, "base_model_pp_plan", None) or ()) != _PLAN:
        raise UserError(
            f"model type {name!r} publishes no pipeline plan of embed_tokens, layers and norm: "
            "use a Llama, Qwen2, Qwen3 or Mistral class model, or a Qwen mixture of experts."
        )
    if name not in _EXPERTS and (getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)):
        raise UserError(
            f"model type {name!r} is a mixture of experts of another kind than {' and '.join(_EXPERTS)}, which this "
            "release does not train."
        )
    if config.num_hidden_layers < 1:
        raise UserError(
            f"num_hidden_layers is {config.num_hidden_layers} in the model's config.json: it must be 1 or more."
        )
    _check_scores(config)
    _check_rotary(config, seq_len)
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"num_key_value_heads {config.num_key_value_heads} does not divide num_attention_heads "
            f"{config.num_attention_heads} in the model's config.json."
        )
    activation = getattr(config, "hidden_act", None)
    if activation not in ACT2FN:
        raise UserError(f"hidden_act {activation!r} in the model's config.json is none that transformers knows.")
    kinds = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in kinds if kinds else bool(window)
    if windowed and (window or 0) < seq_len:
        raise UserError(
            f"model type {name!r} attends within a sliding window of {window} tokens: use --seq_len {window} or less."
        )
    if any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise UserError(
            f"model type {name!r} mixes layer types {sorted(set(kinds))}, which this release does not train."
        )
    if getattr(config, "attention_dropout", 0.0):
        raise UserError("attention_dropout is not supported with packed documents: set it to 0 in config.json.")


def _check_scores(config: PretrainedConfig) -> None:
    """Raise :class:`UserError` for what a model does to scores, embeddings or logits, and we would leave out."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None):
            raise UserError(
                f"model type {config.model_type!r} caps scores ({key} {getattr(config, key)} in its config.json), "
                "which this release does not: use another model."
            )
    for key in ("embedding_multiplier", "logits_scaling", "logit_scale"):
        if getattr(config, key, None) not in (None, 1):
            raise UserError(
                f"model type {config.model_type!r} scales outside its layers ({key} {getattr(config, key)} in its "
                "config.json), which this release does not: use another model."
            )


def _check_rotary(config: PretrainedConfig, seq_len: int) -> None:
    """Raise :class:`UserError` where a document's frequencies would depend on its neighbours' length."""
    rotary = getattr(config, "rope_parameters", None) or {}
    kind = rotary.get("rope_type")
    if kind == "dynamic":
        limit = config.max_position_embeddings
    elif kind == "longrope":
        limit = rotary["original_max_position_embeddings"]
    else:
        return
    if seq_len > limit:
        raise UserError(
            f"model type {config.model_type!r} has rotary scaling of type {kind!r}, whose frequencies change with the "
            f"longest document beyond {limit} tokens: use --seq_len {limit} or less, or yarn, llama3 or linear scaling."
        )
