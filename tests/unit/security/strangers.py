"""What a stranger may have made: a small model, an adapter, a run and a table, to be changed for the worse."""

import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
from device.token_tables import write_table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from fft.checkpoint import folder
from fft.checkpoint.adapter import PREFIX
from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest

SIZES = {
    **{"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
}


def make_all(place: Path) -> None:
    """Folders ``model``, ``adapter``, ``run`` and ``table`` in a place."""
    make_model(place / "model")
    make_adapter(place / "adapter")
    make_model(place / "run" / "step-1")
    checkpoint = place / "run" / "step-1"
    (checkpoint / folder.TRAINING).mkdir()
    (checkpoint / folder.STATE).write_text(folder.to_json({"step": 1, "eval_loss": 0.5}))
    (place / "run" / folder.LATEST).write_text("step-1\n")
    names = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    sums = "".join(f"{folder.digest(checkpoint / name)}  {name}\n" for name in names)
    (checkpoint / folder.SUMS).write_text(sums)
    write_table(place / "table", [np.arange(1, 9, dtype=np.int32)] * 4)
    parts = sorted((place / "table").glob("*.parquet"))
    commit(place / "table", Manifest(tuple(FileInfo(part.name, 2, 16, part.stat().st_size) for part in parts), 4, 32))


def make_model(directory: Path) -> None:
    """A Llama in two shards, with its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), trust_remote_code=False)
    model.save_pretrained(directory, max_shard_size="2KB")
    words = {word: i for i, word in enumerate(("<unk>", "<s>", "</s>", *"abcdefghijklm"))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)


def make_adapter(directory: Path) -> None:
    """An adapter of it, as PEFT saves them."""
    directory.mkdir()
    name = f"{PREFIX}model.layers.0.self_attn.q_proj"
    matrices = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    save_file(matrices, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
