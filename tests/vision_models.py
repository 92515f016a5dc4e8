"""Small directories of vision-language models, chats with images in every form, and what transformers makes of them."""

import base64
import io
import json
from types import SimpleNamespace

import numpy as np
from PIL import Image

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
_QWEN = """\
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}{{- message['content'] }}
    {%- else %}
        {%- for content in message['content'] %}
            {%- if content['type'] == 'image' or 'image' in content %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in content %}{{- content['text'] }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
_INTERNVL = _QWEN.replace("'<|vision_start|><|image_pad|><|vision_end|>'", "'<IMG_CONTEXT>\\n'").replace(
    "{%- if loop.first and", "{%- if false and"
)
#: Trims the text of a string, but not the parts of a list.
TRIMMING = _QWEN.replace("{{- message['content'] }}", "{{- message['content'] | trim }}")
_TEXTS = ["a cat sits on a mat", "what is on these pictures?", "user assistant system, 1 2 3\n", "héllo wörld 你好"]


def save_model(folder, family, template=None):
    """A directory with tokenizer, chat template, config.json and preprocessor_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    marks = ["<img>", "</img>", "<IMG_CONTEXT>"] if family == "internvl" else marks
    special = ["<|im_start|>", "<|im_end|>", *marks]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=special
    )
    fast.chat_template = template or (_INTERNVL if family == "internvl" else _QWEN)
    fast.save_pretrained(folder)
    start, end, pad = (fast.convert_tokens_to_ids(mark) for mark in marks)
    if family == "internvl":
        config = {"vision_config": {"image_size": [28, 28], "patch_size": [7, 7]}, "downsample_ratio": 0.5}
        processor = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=6)
        config["image_seq_length"] = 4
    else:
        patch = 8 if family.startswith("qwen3_vl") else 7
        config = {"vision_config": {"patch_size": patch, "spatial_merge_size": 2}}
        size = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 40 * (2 * patch) ** 2}
        processor = Qwen2VLImageProcessorPil(patch_size=patch, size=size)
        config |= {"vision_start_token_id": start, "vision_end_token_id": end}
    processor.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": family, "image_token_id": pad}))
    return folder


def picture(rng, kind=None):
    """The bytes of a small random picture of any kind."""
    width, height = rng.integers(1, 120, 2).tolist()
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    image, stream = Image.fromarray(pixels), io.BytesIO()
    kind = kind or rng.choice(["jpeg", "png", "turned", "palette", "cmyk", "alpha", "grey", "animated"])
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(2, 9))
        image.save(stream, "JPEG", exif=exif)
    elif kind == "palette":
        image.quantize(16).save(stream, "PNG")
    elif kind == "cmyk":
        image.convert("CMYK").save(stream, "JPEG")
    elif kind == "alpha":
        image.putalpha(Image.fromarray(pixels[:, :, 0]))
        image.save(stream, "PNG")
    elif kind == "grey":
        image.convert("L").save(stream, "PNG")
    elif kind == "animated":
        image.save(stream, "GIF", save_all=True, append_images=[image.rotate(180)])
    else:
        image.save(stream, kind.upper())
    return stream.getvalue()


def chat_of(rng, folder, number):
    """A random chat with 0 to 3 images, in one of the forms; and as messages of parts with the images in order."""
    form, counts = int(rng.integers(0, 4)), rng.integers(0, 3, int(rng.integers(1, 3)))
    turns, messages, images, beside = [], [], [], []
    for turn, count in enumerate(counts.tolist()):
        parts, text, own = [], "", []
        for i in range(count):
            words = str(rng.choice(_TEXTS)).strip() + " "
            data = picture(rng)
            name = f"{number}-{turn}-{i}.bin"
            (folder / name).write_bytes(data)
            parts += [{"type": "text", "text": words}, {"type": "image"}]
            text += words + "<image>"
            own.append((name, data))
        end = f" {rng.choice(_TEXTS)}{number}"
        parts.append({"type": "text", "text": end})
        text += end
        url = ["data:image/png;base64," + base64.b64encode(data).decode() for _, data in own]
        if not own:
            content = text
        elif form == 0:
            content = [text, *(name for name, _ in own)]
        elif form == 1:
            urls = iter(url)
            content = [
                {"type": "image_url", "image_url": {"url": next(urls)}} if p["type"] == "image" else p for p in parts
            ]
        elif form == 2:
            names = iter(own)
            content = [{"type": "image", "image": next(names)[0]} if p["type"] == "image" else p for p in parts]
        else:
            content = text
            beside += [name for name, _ in own]
        answer = str(rng.choice(_TEXTS))
        turns += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        images += [data for _, data in own]
    record = {"id": f"chat {number}", "messages": turns} | ({"images": beside} if form == 3 and beside else {})
    return record, messages, images


def theirs(folder, messages, images, processors={}):  # noqa: B006 - kept between calls
    """(ids, stretches of the ids that are images', grids or tiles, pixels) by transformers' tokenizer, PIL image
    processor and expansion of placeholders."""
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.image_utils import load_image
    from transformers.models.internvl.processing_internvl import InternVLProcessor
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

    if folder not in processors:
        processors[folder] = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    tokenizer, processor = processors[folder]
    config = json.loads((folder / "config.json").read_text())
    token = tokenizer.convert_ids_to_tokens(config["image_token_id"])
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    values = {}
    if images:
        loaded = [load_image("data:image/x," + base64.b64encode(image).decode()) for image in images]
        crop = {"crop_to_patches": True} if config["model_type"] == "internvl" else {}
        values = processor(images=loaded, return_tensors="np", **crop)
    own = SimpleNamespace(
        image_processor=processor, image_token=token, start_image_token="<img>", end_image_token="</img>"
    )
    own.image_seq_length = config.get("image_seq_length")
    expand = InternVLProcessor if config["model_type"] == "internvl" else Qwen2VLProcessor
    pieces = text.split(token)
    assert len(pieces) == len(images) + 1
    for i in range(len(images)):
        pieces[i] += expand.replace_image_token(own, values, i)
    return tokenizer("".join(pieces), add_special_tokens=False)["input_ids"], values


def small_config(family, vocabulary=160, layers=3):
    """A config of a model of ``family`` that is small, its image token 151 between 152 and 153."""
    from transformers import AutoConfig

    text = {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    text |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    ids = {"image_token_id": 151, "tie_word_embeddings": False}
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    if family == "internvl":
        vision = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "attention_bias": True}
        vision |= {"hidden_size": 32, "image_size": 16, "patch_size": 4}
        text |= {"model_type": "qwen2"}
        return AutoConfig.for_model(
            family, text_config=text, vision_config=vision, image_seq_length=4, downsample_ratio=0.5, **ids
        )
    vision = {"depth": 4, "num_heads": 2, "patch_size": 4}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1, 3]}
    if family.startswith("qwen3"):
        vision |= {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]}
        text |= {"head_dim": 16}
        if family == "qwen3_vl_moe":
            text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        rotary |= {"mrope_interleaved": True}
    ids |= {"video_token_id": 154, "vision_start_token_id": 152, "vision_end_token_id": 153}
    return AutoConfig.for_model(family, text_config=text | {"rope_parameters": rotary}, vision_config=vision, **ids)
