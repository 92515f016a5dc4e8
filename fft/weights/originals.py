"""Checkpoints in the form of code that transformers does not have, as the models that they are.

Qwen (1) is a Qwen2, InternLM2 and Baichuan-7B are Llamas: under other names, and with some projections in one tensor.
InternVL's are those of :mod:`fft.weights.internvl`.
Here is how their configs and tensors read as those of the architecture; what is then written is of that architecture.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from fft.errors import UserError
from fft.weights import internvl
from fft.weights.names import StoredRows
from fft.weights.original_forms import Original, Spans, thirds, without_code

_QWEN_SETTINGS = {
    "layer_norm_epsilon": "rms_norm_eps",
    "rotary_emb_base": "rope_theta",
    "seq_length": "max_position_embeddings",
}
_QWEN_UNUSED = (
    *("bf16", "fp16", "fp32", "kv_channels", "no_bias", "rotary_pct", "scale_attn_weights", "softmax_in_fp32"),
    *("use_dynamic_ntk", "use_logn_attn", "use_flash_attn", "use_cache_quantization", "use_cache_kernel", "onnx_safe"),
)
_QWEN_FIXED = {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True}


def original_of(raw: dict) -> Original | None:
    """The family of a ``config.json``; None for those that transformers knows, or nobody does."""
    kind = raw.get("model_type")
    if kind != "baichuan":
        return _ORIGINALS.get(str(kind))
    return None if is_second(raw) or has_alibi(raw) else _ORIGINALS["baichuan"]


def as_architecture(raw: dict) -> dict:
    """A ``config.json`` as that of the architecture which its model is; itself where it is one of transformers'.

    Raises :class:`UserError` for a model of such a family that is no plain decoder, and for settings not known.
    """
    family = original_of(raw)
    if family is None:
        return raw
    other = [name for name in raw.get("architectures") or () if name not in family.classes]
    if other or raw.get("visual"):
        what = other[0] if other else "a model of images"
        raise UserError(f"a {raw['model_type']} is trained as {family.classes[0]} alone, and this is {what}.")
    return family.config(raw | {key: as_architecture(raw[key]) for _, _, key in family.members})


def is_second(raw: dict) -> bool:
    """Whether a config of Baichuan's is of the second generation, whose output head is normalized."""
    return raw.get("z_loss_weight") is not None or raw.get("vocab_size") == SECOND_VOCABULARY


def has_alibi(raw: dict) -> bool:
    """Whether a config of Baichuan's is that of a model with ALiBi: the class of the 7B is written with a capital C."""
    return raw.get("max_position_embeddings") is None and "BaiChuanForCausalLM" not in (raw.get("architectures") or ())


#: By this, too, Baichuan 2 is known.
SECOND_VOCABULARY = 125696


def generation_of(raw: dict, generation: dict) -> dict:
    """A ``generation_config.json`` beside the config ``raw``, with what the family's code did of its own accord.

    A chat of Qwen's ends where a turn does, which is the second token after that which ends a text.
    """
    end = generation.get("eos_token_id")
    if raw.get("model_type") == "qwen" and generation.get("chat_format") == "chatml" and isinstance(end, int):
        return {**generation, "eos_token_id": [end, end + 2]}
    return generation


def translate(raw: dict, names: Sequence[str]) -> dict[str, str | StoredRows]:
    """Tensors of a checkpoint by the names that the architecture has for them: stored names, or rows of those.

    What is not known keeps its name. ``raw`` is the checkpoint's ``config.json``, of any family. Raises
    :class:`UserError` for one of an :class:`Original` that lacks its sizes.
    """
    family = original_of(raw)
    if family is None:
        return {name: name for name in names}
    found: dict[str, str | StoredRows] = {}
    for stored, there, key in family.members:
        inside = [name.removeprefix(stored) for name in names if name.startswith(stored)]
        member = raw.get(key) or {}
        if not isinstance(member, dict):
            raise UserError(f"config.json has {key} = {member!r}, which describes no model: restore it.")
        for name, place in translate(member, inside).items():
            whole = f"{stored}{place}" if isinstance(place, str) else replace(place, name=f"{stored}{place.name}")
            found[f"{there}{name}"] = whole
        names = [name for name in names if not name.startswith(stored)]
    try:
        parts = family.parts(raw)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"the config.json of a {raw['model_type']} does not say of what sizes it is ({error!r}): restore it."
        ) from error
    for name in names:
        if re.search(family.ignored, name):
            continue
        layer, projection, kind = _split(name, family.joined)
        if projection:
            total = sum(b - a for spans in parts.values() for a, b in spans)
            shape = (total, raw["hidden_size"]) if kind == "weight" else (total,)
            prefix = _renamed(layer, family.names)
            found |= {f"{prefix}{part}.{kind}": StoredRows(name, shape, spans) for part, spans in parts.items()}
        else:
            found[_renamed(name, family.names)] = name
    return found


def _split(name: str, joined: str) -> tuple[str, str, str]:
    layer, projection, kind = name.rpartition(f".{joined}.")
    return (f"{layer}.", joined, kind) if projection else (name, "", "")


def _renamed(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def _groups(raw: dict) -> dict[str, Spans]:
    """For each key/value head: the query heads that share it, its key, its value."""
    heads = raw["num_attention_heads"]
    groups = raw.get("num_key_value_heads") or heads
    size = raw["hidden_size"] // heads
    queries = heads // groups
    step = (queries + 2) * size
    ends = {"q": (0, queries * size), "k": (queries * size, step - size), "v": (step - size, step)}
    return {
        f"self_attn.{part}_proj": tuple((group * step + a, group * step + b) for group in range(groups))
        for part, (a, b) in ends.items()
    }


def _qwen_config(raw: dict) -> dict:
    """Dynamic NTK and logn attention act in inference alone, and on texts beyond ``seq_length``."""
    heads, size = raw["num_attention_heads"], raw["hidden_size"]
    for key, value in {**_QWEN_FIXED, "kv_channels": size // heads}.items():
        if raw.get(key, value) != value:
            raise UserError(f"{key} is {raw[key]} in the config.json of a qwen: only {value} is known.")
    kept = {
        _QWEN_SETTINGS.get(key, key): v
        for key, v in raw.items()
        if key not in (*_QWEN_UNUSED, "max_position_embeddings")
    }
    if "seq_length" not in raw:
        kept["max_position_embeddings"] = raw.get("max_position_embeddings", 8192)
    dropout = {key: kept.pop(key) for key in ("emb_dropout_prob", "attn_dropout_prob") if key in kept}
    return without_code(
        {
            **kept,
            **{key: value for key, value in dropout.items() if value},
            "hidden_act": "silu",
            "intermediate_size": raw["intermediate_size"] // 2,
            "num_key_value_heads": heads,
            "use_sliding_window": False,
        },
        "qwen2",
    )


def _internlm2_config(raw: dict) -> dict:
    kept = {key: value for key, value in raw.items() if key != "bias"}
    return without_code({**kept, "attention_bias": bool(raw.get("bias", True))}, "llama")


def _baichuan_config(raw: dict) -> dict:
    return without_code({**raw, "max_position_embeddings": raw.get("max_position_embeddings") or 4096}, "llama")


_ORIGINALS = {
    "qwen": Original(
        ("QWenLMHeadModel",),
        _qwen_config,
        (
            (r"^transformer\.wte\.", "model.embed_tokens."),
            (r"^transformer\.ln_f\.", "model.norm."),
            (r"^transformer\.h\.", "model.layers."),
            (r"\.ln_1\.", ".input_layernorm."),
            (r"\.ln_2\.", ".post_attention_layernorm."),
            (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
            (r"\.mlp\.w2\.", ".mlp.gate_proj."),
            (r"\.mlp\.w1\.", ".mlp.up_proj."),
            (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
        ),
        "attn.c_attn",
        thirds,
    ),
    "internlm2": Original(
        ("InternLM2ForCausalLM",),
        _internlm2_config,
        (
            (r"^model\.tok_embeddings\.", "model.embed_tokens."),
            (r"^output\.", "lm_head."),
            (r"\.attention_norm\.", ".input_layernorm."),
            (r"\.ffn_norm\.", ".post_attention_layernorm."),
            (r"\.attention\.wo\.", ".self_attn.o_proj."),
            (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
            (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
            (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
        ),
        "attention.wqkv",
        _groups,
    ),
    internvl.KIND: internvl.CHAT,
    internvl.TOWER_KIND: internvl.TOWER,
    "baichuan": Original(
        ("BaiChuanForCausalLM", "BaichuanForCausalLM"), _baichuan_config, (), "self_attn.W_pack", thirds
    ),
}
