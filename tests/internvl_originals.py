"""Small InternVL directories as published (InternVLChatModel), and what they compute, in float64 from descriptions."""

import json
import math
from pathlib import Path

import torch
from original_models import FAMILIES, draw
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from vision_models import save_model

from fft.text.encoder import load_tokenizer

D, DEPTH, HEADS, TILE, PATCH, H, V = 32, 3, 2, 28, 7, 64, 330
#: What old versions of transformers wrote of every model, and means nothing.
_OLD = {
    **{"_name_or_path": "x", "add_cross_attention": False, "bad_words_ids": None, "chunk_size_feed_forward": 0},
    **{"diversity_penalty": 0.0, "do_sample": False, "id2label": {"0": "LABEL_0"}, "is_decoder": False, "top_k": 50},
    **{"pruned_heads": {}, "return_dict": True, "temperature": 1.0, "tf_legacy_loss": False, "torchscript": False},
    **{"typical_p": 1.0, "use_bfloat16": True, "transformers_version": "4.37.2", "torch_dtype": "bfloat16"},
    **{"output_attentions": False, "problem_type": None, "suppress_tokens": None, "num_beams": 1, "max_length": 20},
}
_TOWER = {
    **{"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_act": "gelu", "dropout": 0.0},
    **{"attention_dropout": 0.0, "drop_path_rate": 0.1, "hidden_size": D, "image_size": TILE, "patch_size": PATCH},
    **{"initializer_factor": 0.1, "initializer_range": 0.02, "intermediate_size": 48, "layer_norm_eps": 1e-6},
    **{"norm_type": "layer_norm", "num_attention_heads": HEADS, "num_channels": 3, "num_hidden_layers": DEPTH},
    **{"qk_normalization": False, "qkv_bias": True, "use_flash_attn": True},
}
_QWEN2 = {
    **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": H, "intermediate_size": 96},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
    **{"max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu"},
    **{"bos_token_id": None, "eos_token_id": 1, "sliding_window": None, "use_sliding_window": False},
}
_QWEN3 = _QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
_CHAT = {
    **{"architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "downsample_ratio": 0.5},
    **{"auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}, "dynamic_image_size": True},
    **{"force_image_size": TILE, "max_dynamic_patch": 6, "min_dynamic_patch": 1, "pad2square": False},
    **{"ps_version": "v2", "select_layer": -1, "template": "internvl2_5", "use_thumbnail": True},
    **{"torch_dtype": "bfloat16", "use_backbone_lora": 0, "use_llm_lora": 0},
}
KINDS = ("qwen2", "internlm2", "6b", "qwen3")


def chat_config(kind: str) -> dict:
    text = FAMILIES["internlm2"].config if kind == "internlm2" else _QWEN3 if kind == "qwen3" else _QWEN2
    big = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False} if kind == "6b" else {}
    members = {"llm_config": _OLD | text | {"vocab_size": V}, "vision_config": _OLD | _TOWER | big}
    return _CHAT | members


def _shapes(kind: str) -> dict[str, tuple[int, ...]]:
    layer: dict[str, tuple[int, ...]] = {
        **{"attn.qkv.weight": (3 * D, D), "attn.proj.weight": (D, D), "attn.proj.bias": (D,), "ls1": (D,), "ls2": (D,)},
        **{"norm1.weight": (D,), "norm2.weight": (D,), "mlp.fc1.weight": (48, D), "mlp.fc1.bias": (48,)},
        **{"mlp.fc2.weight": (D, 48), "mlp.fc2.bias": (D,)},
    }
    if kind == "6b":
        layer |= {"attn.q_norm.weight": (D,), "attn.k_norm.weight": (D,)}
    else:
        layer |= {"attn.qkv.bias": (3 * D,), "norm1.bias": (D,), "norm2.bias": (D,)}
    found: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, D),
        "vision_model.embeddings.position_embedding": (1, (TILE // PATCH) ** 2 + 1, D),
        "vision_model.embeddings.patch_embedding.weight": (D, 3, PATCH, PATCH),
        "vision_model.embeddings.patch_embedding.bias": (D,),
        **{"mlp1.0.weight": (4 * D,), "mlp1.0.bias": (4 * D,), "mlp1.1.weight": (H, 4 * D), "mlp1.1.bias": (H,)},
        **{"mlp1.3.weight": (H, H), "mlp1.3.bias": (H,)},
    }
    for i in range(DEPTH):
        found |= {f"vision_model.encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found


def _texts(kind: str) -> dict[str, Tensor]:
    if kind == "internlm2":
        family = FAMILIES["internlm2"]
        shapes = {name: (V, *shape[1:]) if shape[0] == 160 else shape for name, shape in family.shapes.items()}
        return draw(type(family)(family.config, shapes, family.forward))
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    given = _QWEN3 if kind == "qwen3" else _QWEN2
    config = AutoConfig.for_model(**{k: v for k, v in given.items() if k != "architectures"}, vocab_size=V)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return {name: value.double() for name, value in model.state_dict().items()}


def write_chat_model(folder: Path, kind: str) -> dict[str, Tensor]:
    """A directory as published, in two files of weights; returns these in float64."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, "internvl")
    for file in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    # What published directories have, which says nothing of tiles.
    clip = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": TILE, "do_center_crop": True, "size": TILE}
    (folder / "preprocessor_config.json").write_text(json.dumps(clip))
    (folder / "modeling_internvl_chat.py").write_text("# code\n")
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in _shapes(kind).items():
        value = torch.randn(shape, generator=generator)
        norm = name.endswith(("norm1.weight", "norm2.weight", "_norm.weight", "mlp1.0.weight"))
        weights[name] = (1 + 0.1 * value if norm else 0.2 * value).double()
    weights |= {f"language_model.{name}": value for name, value in _texts(kind).items()}
    (folder / "config.json").write_text(json.dumps(chat_config(kind)))
    names = list(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, its in parts.items():
        save_file({name: weights[name].float().contiguous() for name in its}, folder / file, {"format": "pt"})
    places = {name: file for file, its in parts.items() for name in its}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return weights


def features(weights: dict[str, Tensor], tiles: Tensor, kind: str) -> Tensor:
    """Tokens [tiles, tokens, H] of float64 tiles [tiles, 3, TILE, TILE]: the tower, the shuffle and the projector."""
    w = {name.removeprefix("vision_model."): value for name, value in weights.items()}
    big = kind == "6b"

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def norm(x: Tensor, at: str) -> Tensor:
        if big:
            return rms(x, w[f"{at}.weight"])
        return F.layer_norm(x, (D,), w[f"{at}.weight"], w[f"{at}.bias"], 1e-6)

    x = F.conv2d(tiles, w["embeddings.patch_embedding.weight"], w["embeddings.patch_embedding.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w["embeddings.class_embedding"].expand(len(x), 1, D), x], 1) + w["embeddings.position_embedding"]
    for i in range(DEPTH):
        at = f"encoder.layers.{i}."
        qkv = norm(x, at + "norm1") @ w[at + "attn.qkv.weight"].T + w.get(at + "attn.qkv.bias", 0)
        q, k, v = qkv.unflatten(-1, (3, D)).unbind(2)
        if big:
            q, k = rms(q, w[at + "attn.q_norm.weight"]), rms(k, w[at + "attn.k_norm.weight"])
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
        y = ((q @ k.transpose(2, 3)) / math.sqrt(D // HEADS)).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2) @ w[at + "attn.proj.weight"].T + w[at + "attn.proj.bias"]
        x = x + w[at + "ls1"] * y
        y = F.gelu(norm(x, at + "norm2") @ w[at + "mlp.fc1.weight"].T + w[at + "mlp.fc1.bias"])
        x = x + w[at + "ls2"] * (y @ w[at + "mlp.fc2.weight"].T + w[at + "mlp.fc2.bias"])
    x = x[:, 1:]
    # Version 2 of the shuffle: the four patches of a token, those of a row beside each other.
    side = TILE // PATCH
    x = x.view(len(x), side, side // 2, 2 * D).permute(0, 2, 1, 3).reshape(len(x), side // 2, side // 2, 4 * D)
    x = x.permute(0, 2, 1, 3).flatten(1, 2)
    x = F.layer_norm(x, (4 * D,), w["mlp1.0.weight"], w["mlp1.0.bias"], 1e-5)
    x = F.gelu(x @ w["mlp1.1.weight"].T + w["mlp1.1.bias"])
    return x @ w["mlp1.3.weight"].T + w["mlp1.3.bias"]


def image_token(folder: Path) -> int:
    return load_tokenizer(folder).convert_tokens_to_ids("<IMG_CONTEXT>")
