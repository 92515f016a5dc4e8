"""InternVL 2, 2.5, 3 and 3.5 as published with code of their own (InternVLChatModel), as transformers' internvl.

The tower keeps queries, keys and values in one tensor; the language model is a Qwen, or an InternLM2, which is one of
:mod:`fft.weights.originals`, too. Nothing is computed: names, and rows of tensors. Stochastic depth of the original
training (``drop_path_rate``) does not take place.
"""

import json
from pathlib import Path

from fft.errors import UserError, one_line
from fft.files import write_file
from fft.json_text import json_value
from fft.weights.original_forms import Original, thirds, without_code

#: The type that configs name, and the token that stands for an image's; its id is said by tokenizers alone.
KIND, IMAGE_TOKEN = "internvl_chat", "<IMG_CONTEXT>"
_IMAGE_ID = "image_token_id"
#: Types of towers: in these configs, where the 300M, too, is named after the 6B, and as transformers has it.
TOWER_KIND, _TOWER = "intern_vit_6b", "internvl_vision"
#: Language models that are known, as architectures.
_DECODERS = ("qwen2", "qwen3", "llama")
#: Settings, and the one value of each that is computed here, which is also the code's own where nothing is said.
_FIXED = {"select_layer": -1, "pad2square": False, "use_thumbnail": True, "dynamic_image_size": True}
#: Where nothing is said, it is the first version.
_SHUFFLE = "v2"
_KEPT = ("torch_dtype", "dtype")
_SETTINGS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("norm_type", "image_size", "patch_size", "num_channels", "initializer_range", "attention_dropout"),
)
_EPSILON = 1e-6
#: Of pictures on ImageNet.
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
#: Tokens that transformers' processor asks a tokenizer for by these names, the first that is there. It has none for
#: films that all tokenizers know, but refuses to do without.
_ROLES = {
    "start_image_token": ("<img>",),
    "end_image_token": ("</img>",),
    "context_image_token": (IMAGE_TOKEN,),
    "video_token": ("<video>", "<|video_pad|>", "<quad>"),
}
_TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}\
{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def with_image_token(raw: dict, folder: Path) -> dict:
    """A ``config.json`` of a ``folder`` with the id of the image token; itself where it is there, or none is needed."""
    if raw.get("model_type") != KIND or _IMAGE_ID in raw:
        return raw
    found = _token_ids(folder).get(IMAGE_TOKEN)
    return raw if found is None else {**raw, _IMAGE_ID: found}


def _token_ids(folder: Path) -> dict[str, int]:
    """Ids of added tokens, by all files that say some."""
    found: dict[str, int] = {}
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        file = folder / name
        try:
            content = json_value(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if name == "added_tokens.json":
                found |= {token: int(i) for token, i in content.items()}
            elif name == "tokenizer.json":
                found |= {token["content"]: int(token["id"]) for token in content.get("added_tokens", ())}
            else:
                told = content.get("added_tokens_decoder") or {}
                found |= {token["content"]: int(i) for i, token in told.items()}
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(f"{file} cannot be read ({one_line(error)}): restore it.") from error
    return found


def _config(raw: dict) -> dict:
    """A chat model's, whose members' configs are mapped already."""
    text, vision = raw["llm_config"], raw["vision_config"]
    if vision.get("model_type") != _TOWER:
        raise UserError(
            f"an {KIND} with a tower of type {vision.get('model_type')!r} is not read: only {TOWER_KIND} is known."
        )
    if text.get("model_type") not in _DECODERS:
        raise UserError(
            f"an {KIND} with a language model of type {text.get('model_type')!r} is not read: only qwen2, qwen3, llama "
            "and internlm2 are known."
        )
    for name, only in {**_FIXED, "ps_version": _SHUFFLE}.items():
        value = raw.get(name, "v1" if name == "ps_version" else only)
        if value != only:
            raise UserError(f"{name} is {value} in the config.json of an {KIND}: only {only} is known.")
    tile, ratio = vision["image_size"], raw.get("downsample_ratio", 0.5)
    if raw.get("force_image_size") not in (None, tile):
        raise UserError(
            f"force_image_size is {raw['force_image_size']} in the config.json of an {KIND}, and the image_size of its "
            f"tower {tile}: only the same is known."
        )
    if not isinstance(raw.get(_IMAGE_ID), int):
        raise UserError(
            f"the files of an {KIND}'s tokenizer have no token {IMAGE_TOKEN}: give the whole directory of the model."
        )
    return {
        "model_type": "internvl",
        "text_config": without_code(text, text["model_type"]),
        "vision_config": vision,
        _IMAGE_ID: raw[_IMAGE_ID],
        "image_seq_length": int((tile // vision["patch_size"] * ratio) ** 2),
        "downsample_ratio": ratio,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        **{key: raw[key] for key in _KEPT if key in raw},
    }


def _tower_config(raw: dict) -> dict:
    normalized = bool(raw.get("qk_normalization"))
    if normalized and raw.get("layer_norm_eps", _EPSILON) != _EPSILON:
        raise UserError(f"layer_norm_eps is {raw['layer_norm_eps']} in a tower's config: only {_EPSILON} is known.")
    return {
        "model_type": _TOWER,
        **{key: raw[key] for key in _SETTINGS if key in raw},
        "attention_bias": bool(raw.get("qkv_bias", True)),
        "use_qk_norm": normalized,
        "projection_dropout": raw.get("dropout", 0.0),
        "layer_scale_init_value": raw.get("initializer_factor", 0.1),
        "use_mean_pooling": True,
    }


TOWER = Original(
    ("InternVisionModel",),
    _tower_config,
    (
        (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
        (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
        (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
        (r"^encoder\.layers\.", "encoder.layer."),
        (r"\.attn\.proj\.", ".attention.projection_layer."),
        (r"\.attn\.([qk]_norm)\.", r".attention.\1."),
        (r"\.ls([12])$", r".lambda_\1"),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
    ),
    "attn.qkv",
    lambda raw: thirds(raw, "attention"),
)
CHAT = Original(
    ("InternVLChatModel",),
    _config,
    (
        (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
        (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
        (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
    ),
    "",
    lambda raw: {},
    members=(
        ("vision_model.", "vision_tower.", "vision_config"),
        ("language_model.", "language_model.", "llm_config"),
    ),
)


def complete_native(folder: Path, raw: dict) -> None:
    """Have the folder of a native model, written from an original whose ``config.json`` this is, say what that one's
    code knew: how images are cut into tiles, which tokens are around one, and how chats are written, by a template.

    Does nothing for another model. Raises :class:`UserError` for files that cannot be read.
    """
    if raw.get("model_type") != KIND:
        return
    vision, tokenizer = raw["vision_config"], folder / "tokenizer_config.json"
    side = vision["image_size"]
    images = {
        **{"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": side, "width": side}},
        **{"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True},
        **{"rescale_factor": 1 / 255, "resample": 3, "image_mean": _MEAN, "image_std": _STD},
        "min_patches": raw.get("min_dynamic_patch", 1),
        "max_patches": raw.get("max_dynamic_patch", 6),
        "processor_class": "InternVLProcessor",
    }
    tokens = (vision["image_size"] // vision["patch_size"] * raw.get("downsample_ratio", 0.5)) ** 2
    _write(folder / "preprocessor_config.json", images)
    _write(folder / "processor_config.json", {"processor_class": "InternVLProcessor", "image_seq_length": int(tokens)})
    begin = "{{ bos_token }}" if raw["llm_config"]["model_type"] == "internlm2" else ""  # as its own template begins
    write_file(folder / "chat_template.jinja", begin + _TEMPLATE)
    if tokenizer.is_file():
        known = _token_ids(folder)
        names = {name: next((token for token in tokens if token in known), None) for name, tokens in _ROLES.items()}
        roles = {name: token for name, token in names.items() if token is not None}
        settings = json_value(tokenizer.read_text(encoding="utf-8"))
        settings.pop("chat_template", None)
        _write(tokenizer, settings | roles)


def _write(file: Path, content: dict) -> None:
    write_file(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
