"""A model's directory before it has weights: config, tokenizer with a chat template, and what it makes of images."""

import json
from collections.abc import Iterable
from pathlib import Path

from fft.data.owner import atomic_folder
from fft.files import copy_file, write_file
from fft.quickstart.tokenizer import train_tokenizer

#: The first ids, as the config names them.
SPECIAL = ("<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}{{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- else %}{{- part['text'] }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def write_directory(config: Path, texts: Iterable[str], output: Path) -> int:
    """Make the directory of the Qwen2-VL model of a ``config``, with a tokenizer that ``texts`` train; returns how many
    entries that has. ``output`` appears whole or not at all."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    vision, text = settings["vision_config"], settings["text_config"]
    tokenizer = train_tokenizer(texts, text["vocab_size"], SPECIAL)
    tokenizer.chat_template = _TEMPLATE
    token = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": 2,
        "size": {"shortest_edge": token, "longest_edge": 64 * token},
    }
    with atomic_folder(output) as staging:
        tokenizer.save_pretrained(str(staging))
        copy_file(config, staging / "config.json")
        write_file(staging / "preprocessor_config.json", json.dumps(processor, indent=1))
    return len(tokenizer)
