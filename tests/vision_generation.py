"""Tiny vision-language models with random weights, prompts with images in every form, and what transformers answers."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from vision_models import save_model

from fft.models.stored import stored_names
from fft.weights.hf import write_shard

#: Of a text model of any family; heads of 32, the smallest that vLLM takes.
_TEXT = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 1024, "initializer_range": 0.3, "head_dim": 32},
    **{"tie_word_embeddings": False, "bos_token_id": None, "pad_token_id": None},
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_TOWERS = {
    "qwen2_vl": {"embed_dim": 64, "hidden_size": 64, "num_heads": 2, "depth": 2, "mlp_ratio": 2},
    "qwen2_5_vl": {
        **{"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "depth": 2},
        **{"window_size": 28, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        **{"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "depth": 2},
        **{"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    },
    "qwen3_vl_moe": {
        **{"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "depth": 2},
        **{"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    },
    "internvl": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def make_vision_model(folder: Path, family: str, seed: int = 0) -> Path:
    """A whole directory: tokenizer, template, processor files, config, weights under the names of the Hub."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, family)
    known = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<video>" if family == "internvl" else "<|video_pad|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    text = _TEXT | {"vocab_size": len(tokenizer) + 4, "eos_token_id": tokenizer.eos_token_id}
    tower = _TOWERS[family] | known["vision_config"] | {"initializer_range": 0.3}
    given = {name: value for name, value in known.items() if name not in ("model_type", "vision_config")}
    if family == "internvl":
        text["model_type"] = "qwen2"
        names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        names["video_token"] = "<video>"
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps(settings | names | {"extra_special_tokens": names}))
    else:
        rope = _ROPE | ({"mrope_interleaved": True} if family.startswith("qwen3_vl") else {})
        if family == "qwen3_vl_moe":
            text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
        text["rope_parameters"], given["video_token_id"] = rope, len(tokenizer) - 1
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](text_config=text, vision_config=tower, tie_word_embeddings=False, **given)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    if family == "qwen3_vl_moe":  # which transformers does not write as it is on the Hub
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "experts" in name or "mlp.gate" in name:
                    weight.normal_(std=0.3)
        write_shard(folder, stored_names(model).to_stored(model.state_dict()), 0, 1)
    return folder


def pictures(count: int, seed: int = 0) -> list[bytes]:
    """Pictures of many shapes."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        width, height = rng.integers(9, 90, 2).tolist()
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(
            stream, "PNG" if number % 2 else "JPEG"
        )
        made.append(stream.getvalue())
    return made


def prompts_of(images: list[bytes]) -> tuple[list[object], list[tuple[list[dict], list[bytes]]]]:
    """Prompts in all forms, of images 0 to 5 as files `0.png` and so on; and the messages of parts that they mean."""

    def user(*parts: str) -> list[dict]:
        parts_of = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
        return [{"role": "user", "content": parts_of}]

    def url(image: bytes) -> dict:
        data = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        return {"type": "image_url", "image_url": {"url": data}}

    system = {"role": "system", "content": "user assistant"}
    forms: list[object] = [
        {"messages": [{"user": ["a cat <image> on <image> a mat", "0.png", "1.png"]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is "}, url(images[2])]}]},
        {"messages": [system, {"user": "<image>these <image>"}], "images": ["3.png", "4.png"]},
        {"prompt": "on <image>?", "images": [{"bytes": base64.b64encode(images[5]).decode()}]},
        {"prompt": "a cat sits"},
        {"messages": [{"user": ["<image>a", "1.png"]}, {"assistant": "1 2"}, {"user": "what"}]},
        {"messages": [{"user": ["a <image>", "0.png"]}, {"assistant": "mat "}]},
    ]
    meant = [
        (user("a cat ", "<image>", " on ", "<image>", " a mat"), images[:2]),
        (user("what is ", "<image>"), images[2:3]),
        ([system, *user("<image>", "these ", "<image>")], images[3:5]),
        (user("on ", "<image>", "?"), images[5:6]),
        ([{"role": "user", "content": "a cat sits"}], []),
        (
            [*user("<image>", "a"), {"role": "assistant", "content": "1 2"}, {"role": "user", "content": "what"}],
            images[1:2],
        ),
        ([*user("a ", "<image>"), {"role": "assistant", "content": "mat "}], images[:1]),
    ]
    return forms, meant


def answers_of_transformers(folder: Path, meant: list[tuple[list[dict], list[bytes]]], tokens: int = 12) -> list[str]:
    """What transformers' own processors and ``generate`` make of each prompt alone, greedily, in fp32."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.internvl.processing_internvl import InternVLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

    config = json.loads((folder / "config.json").read_text())
    tiles = config["model_type"] == "internvl"
    processor = (GotOcr2ImageProcessorPil if tiles else Qwen2VLImageProcessorPil).from_pretrained(folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    token = tokenizer.convert_ids_to_tokens(config["image_token_id"])
    own = type("Processor", (), {})()
    own.image_processor, own.image_token, own.image_seq_length = processor, token, config.get("image_seq_length")
    own.start_image_token, own.end_image_token = "<img>", "</img>"
    found = []
    for messages, images in meant:
        last = messages[-1]["role"] == "assistant"
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not last, continue_final_message=last
        )
        values = {}
        if images:
            loaded = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
            values = processor(images=loaded, return_tensors="pt", **({"crop_to_patches": True} if tiles else {}))
        pieces = text.split(token)
        for i in range(len(images)):
            pieces[i] += (InternVLProcessor if tiles else Qwen2VLProcessor).replace_image_token(own, values, i)
        ids = tokenizer("".join(pieces), add_special_tokens=False, return_tensors="pt")["input_ids"]
        given = {"pixel_values": values["pixel_values"]} if images else {}
        if images and not tiles:
            given["image_grid_thw"] = values["image_grid_thw"]
            given["mm_token_type_ids"] = (ids == config["image_token_id"]).int()
        new = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            **given,
        )[0, ids.shape[1] :].tolist()
        found.append(tokenizer.decode(new, skip_special_tokens=True))
    return found
