"""Small models in the files of the promised families, and what they compute, written in float64 from descriptions.

Nothing here is the trainer's or transformers': weights are drawn under the names that published files have, and
:func:`logits` is each family's formula over those very tensors.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

H, HEADS, LAYERS, V = 64, 4, 2, 160
#: Key/value heads, where they are fewer.
_K = 2
SIZE = H // HEADS
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """``config`` is a ``config.json``, ``shapes`` the tensors in files, ``forward`` their logits for ids [tokens]."""

    config: dict
    shapes: dict[str, tuple[int, ...]]
    forward: Callable[[Tensors, Tensor, dict], Tensor]
    #: Tensors that older files have, and that are computed.
    computed: dict[str, tuple[int, ...]] = field(default_factory=dict)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def embed(weight: Tensor, ids: Tensor, config: dict) -> Tensor:
    """The row of the padding token learns nothing."""
    return F.embedding(ids, weight, config["pad_token_id"])


def turn(x: Tensor, base: float) -> Tensor:
    """Rotary embedding by halves of [heads, tokens, size]: x cos + (-x2, x1) sin, of frequency base^(-2i / size)."""
    size = x.shape[-1]
    angles = torch.outer(torch.arange(x.shape[1]).double(), base ** (-torch.arange(0, size, 2).double() / size))
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, slopes: list[float] | None = None) -> Tensor:
    """Causal attention of [heads, tokens, size]; heads of keys are repeated for those of queries that share them."""
    k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    at = torch.arange(q.shape[1])
    if slopes is not None:
        scores = scores + torch.tensor(slopes).double()[:, None, None] * (at - at[:, None])
    weights = scores.masked_fill(at > at[:, None], -math.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def heads(x: Tensor) -> Tensor:
    """[tokens, heads * size] -> [heads, tokens, size]."""
    return x.unflatten(-1, (-1, SIZE)).transpose(0, 1)


def qwen(w: Tensors, ids: Tensor, config: dict) -> Tensor:
    x, eps = w["transformer.wte.weight"][ids], config["layer_norm_epsilon"]
    for i in range(LAYERS):
        at = f"transformer.h.{i}."
        y = norm(x, w[at + "ln_1.weight"], eps)
        y = y @ w[at + "attn.c_attn.weight"].T + w[at + "attn.c_attn.bias"]
        q, k, v = (heads(part) for part in y.split(H, dim=-1))
        q, k = (turn(part, config["rotary_emb_base"]) for part in (q, k))
        x = x + attend(q, k, v) @ w[at + "attn.c_proj.weight"].T
        y = norm(x, w[at + "ln_2.weight"], eps)
        y = (y @ w[at + "mlp.w1.weight"].T) * F.silu(y @ w[at + "mlp.w2.weight"].T)
        x = x + y @ w[at + "mlp.c_proj.weight"].T
    return norm(x, w["transformer.ln_f.weight"], eps) @ w["lm_head.weight"].T


def internlm2(w: Tensors, ids: Tensor, config: dict) -> Tensor:
    x, eps, groups = embed(w["model.tok_embeddings.weight"], ids, config), config["rms_norm_eps"], _K
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        y = norm(x, w[at + "attention_norm.weight"], eps) @ w[at + "attention.wqkv.weight"].T
        y = y + w.get(at + "attention.wqkv.bias", 0)
        y = y.view(len(ids), groups, HEADS // groups + 2, SIZE)
        q, k, v = y[:, :, :-2].flatten(1, 2).transpose(0, 1), y[:, :, -2].transpose(0, 1), y[:, :, -1].transpose(0, 1)
        q, k = (turn(part, config["rope_theta"]) for part in (q, k))
        x = x + attend(q, k, v) @ w[at + "attention.wo.weight"].T + w.get(at + "attention.wo.bias", 0)
        y = norm(x, w[at + "ffn_norm.weight"], eps)
        y = F.silu(y @ w[at + "feed_forward.w1.weight"].T) * (y @ w[at + "feed_forward.w3.weight"].T)
        x = x + y @ w[at + "feed_forward.w2.weight"].T
    return norm(x, w["model.norm.weight"], eps) @ w["output.weight"].T


def baichuan(w: Tensors, ids: Tensor, config: dict) -> Tensor:
    x, eps = embed(w["model.embed_tokens.weight"], ids, config), config["rms_norm_eps"]
    alibi = "max_position_embeddings" not in config
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        y = norm(x, w[at + "input_layernorm.weight"], eps) @ w[at + "self_attn.W_pack.weight"].T
        q, k, v = (heads(part) for part in y.unflatten(-1, (3, H)).unbind(1))
        if not alibi:
            q, k = turn(q, 10000), turn(k, 10000)
        x = x + attend(q, k, v, SLOPES if alibi else None) @ w[at + "self_attn.o_proj.weight"].T
        y = norm(x, w[at + "post_attention_layernorm.weight"], eps)
        y = F.silu(y @ w[at + "mlp.gate_proj.weight"].T) * (y @ w[at + "mlp.up_proj.weight"].T)
        x = x + y @ w[at + "mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    if "z_loss_weight" in config:
        head = head / head.pow(2).sum(-1, keepdim=True).sqrt()
    return norm(x, w["model.norm.weight"], eps) @ head.T


#: Of four heads: 2^-2, 2^-4, 2^-6, 2^-8.
SLOPES = [0.25, 0.0625, 0.015625, 0.00390625]


def _layered(path: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{path}.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}


_I = 96
_QWEN = {
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
    "bf16": True,
    "fp16": False,
    "fp32": False,
    "hidden_size": H,
    "intermediate_size": 2 * _I,
    "initializer_range": 0.02,
    "kv_channels": SIZE,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "no_bias": True,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": V,
}
_QWEN_SHAPES = {
    "transformer.wte.weight": (V, H),
    "transformer.ln_f.weight": (H,),
    "lm_head.weight": (V, H),
    **_layered(
        "transformer.h",
        {
            "ln_1.weight": (H,),
            "ln_2.weight": (H,),
            "attn.c_attn.weight": (3 * H, H),
            "attn.c_attn.bias": (3 * H,),
            "attn.c_proj.weight": (H, H),
            "mlp.w1.weight": (_I, H),
            "mlp.w2.weight": (_I, H),
            "mlp.c_proj.weight": (H, _I),
        },
    ),
}
_INTERNLM2 = {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": H,
    "initializer_range": 0.02,
    "intermediate_size": _I,
    "max_position_embeddings": 32768,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": _K,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": V,
}
_INTERNLM2_SHAPES = {
    "model.tok_embeddings.weight": (V, H),
    "model.norm.weight": (H,),
    "output.weight": (V, H),
    **_layered(
        "model.layers",
        {
            "attention_norm.weight": (H,),
            "ffn_norm.weight": (H,),
            "attention.wqkv.weight": ((HEADS + 2 * _K) * SIZE, H),
            "attention.wo.weight": (H, H),
            "feed_forward.w1.weight": (_I, H),
            "feed_forward.w3.weight": (_I, H),
            "feed_forward.w2.weight": (H, _I),
        },
    ),
}
_INTERNLM2_BIASES = _layered(
    "model.layers", {"attention.wqkv.bias": ((HEADS + 2 * _K) * SIZE,), "attention.wo.bias": (H,)}
)
_BAICHUAN = {
    "model_type": "baichuan",
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": H,
    "initializer_range": 0.02,
    "intermediate_size": _I,
    "model_max_length": 4096,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": V,
}
_BAICHUAN_SHAPES = {
    "model.embed_tokens.weight": (V, H),
    "model.norm.weight": (H,),
    "lm_head.weight": (V, H),
    **_layered(
        "model.layers",
        {
            "input_layernorm.weight": (H,),
            "post_attention_layernorm.weight": (H,),
            "self_attn.W_pack.weight": (3 * H, H),
            "self_attn.o_proj.weight": (H, H),
            "mlp.gate_proj.weight": (_I, H),
            "mlp.up_proj.weight": (_I, H),
            "mlp.down_proj.weight": (H, _I),
        },
    ),
}
_FREQUENCIES = _layered("model.layers", {"self_attn.rotary_emb.inv_freq": (SIZE // 2,)})
_ROTARY, _SECOND = {"max_position_embeddings": 4096}, {"z_loss_weight": 0}
FAMILIES = {
    "qwen": Family(_QWEN, _QWEN_SHAPES, qwen, {"transformer.rotary_emb.inv_freq": (SIZE // 2,)}),
    "internlm2": Family(_INTERNLM2, _INTERNLM2_SHAPES, internlm2),
    "internlm2-bias": Family(_INTERNLM2 | {"bias": True}, _INTERNLM2_SHAPES | _INTERNLM2_BIASES, internlm2),
    "baichuan-7b": Family(
        _BAICHUAN | _ROTARY | {"architectures": ["BaiChuanForCausalLM"]}, _BAICHUAN_SHAPES, baichuan, _FREQUENCIES
    ),
    "baichuan2-7b": Family(_BAICHUAN | _ROTARY | _SECOND, _BAICHUAN_SHAPES, baichuan, _FREQUENCIES),
    "baichuan-13b": Family(_BAICHUAN, _BAICHUAN_SHAPES, baichuan),
    "baichuan2-13b": Family(_BAICHUAN | _SECOND, _BAICHUAN_SHAPES, baichuan),
}


def draw(family: Family, seed: int = 0) -> Tensors:
    """Random weights that float32 has, in float64."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in family.shapes.items():
        value = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith(".weight")
        found[name] = (1 + 0.1 * value if is_norm else 0.15 * value).double()
    return found


def write_original(folder: Path, family: Family, binary: bool = False, vocabulary: int = V) -> Tensors:
    """A model directory as published, with safetensors in two files or one ``.bin``; returns its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: (vocabulary, *shape[1:]) if shape[0] == V else shape for name, shape in family.shapes.items()}
    weights = draw(Family(family.config, shapes, family.forward))
    stored = {name: value.float() for name, value in weights.items()}
    stored |= {name: torch.ones(shape) for name, shape in family.computed.items()}
    (folder / "config.json").write_text(json.dumps(family.config | {"vocab_size": vocabulary}), encoding="utf-8")
    if binary:
        torch.save(stored, folder / "pytorch_model.bin")
        return weights
    names = list(stored)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, its in parts.items():
        save_file({name: stored[name] for name in its}, folder / file, {"format": "pt"})
    places = {name: file for file, its in parts.items() for name in its}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return weights
