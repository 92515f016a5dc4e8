"""What a stranger may have made, to be changed for the worse: models, adapters, a run, tables, texts, a machine."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tokenizers
import torch
import yaml
from device.token_tables import write_table
from image_tables import GRID_RULES, document, rows_table, write_rows
from internvl_originals import write_chat_model
from originals import write_pieces, write_ranks
from pairs import random_pairs, write_pairs
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from vision_models import save_model

from fft.checkpoint import folder
from fft.checkpoint.adapter import PREFIX
from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest
from fft.data.pairs import Reference, keep_reference, reference_name, row_key
from fft.data.table import Table
from fft.plan.hardware import HARDWARE
from fft.train_arguments import TrainArguments

REFERENCE = reference_name("model", "table")

SIZES = {
    **{"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
}


def make_all(place: Path) -> None:
    """Folders in a place, called as what they are."""
    make_model(place / "model")
    make_adapter(place / "adapter")
    make_adapter(place / "dora", dora=True)
    save_model(place / "sees", "qwen2_vl")
    write_chat_model(place / "internvl", "qwen2")
    write_ranks(place / "ranks", 300)
    write_pieces(place / "pieces", "InternLM2Tokenizer", 450)
    make_run(place)
    make_tables(place)
    (place / "machine").mkdir()
    shutil.copyfile(HARDWARE / "8xh100-80g-sxm.yaml", place / "machine" / "machine.yaml")
    (place / "texts").mkdir()
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    (place / "texts" / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (place / "texts" / "prompts.jsonl").write_text('{"prompt": "a b"}\n' + json.dumps({"messages": turns[:1]}) + "\n")


def make_run(place: Path) -> None:
    """With a checkpoint, numbers and what else the page of a run reads."""
    make_model(place / "run" / "step-1")
    checkpoint = place / "run" / "step-1"
    (checkpoint / folder.TRAINING).mkdir()
    (checkpoint / folder.STATE).write_text(folder.to_json({"step": 1, "eval_loss": 0.5}))
    (place / "run" / folder.LATEST).write_text("step-1\n")
    names = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    sums = "".join(f"{folder.digest(checkpoint / name)}  {name}\n" for name in names)
    (checkpoint / folder.SUMS).write_text(sums)
    lines = [{"step": step, "loss": 2.0 / step, "rank_work": [0.5, 0.5], "eval/web/loss": 1.0} for step in (1, 2)]
    (place / "run" / folder.METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    told = {"arguments": asdict(TrainArguments(model="model", train_data="tables/web"))}
    told["data"] = {"train_data": {"tables": [{"table": "tables/web", "rows": 4, "tokens": 32}]}}
    told["environment"] = {"torch": "2.13.0", "ranks": {0: "a cpu"}}
    for name, content in told.items():
        (place / "run" / f"{name}.yaml").write_text(yaml.safe_dump(content))


def make_tables(place: Path) -> None:
    """Of rows, of preferences with what a model said of them, and with images."""
    write_table(place / "table", [np.arange(1, 9, dtype=np.int32)] * 4)
    parts = sorted((place / "table").glob("*.parquet"))
    commit(place / "table", Manifest(tuple(FileInfo(part.name, 2, 16, part.stat().st_size) for part in parts), 4, 32))
    pairs = Table.open(write_pairs(place / "pairs", random_pairs(4, 16)))
    keys = [int(row_key(group, row)) for group, it in enumerate(pairs.row_groups) for row in range(it.rows)]
    known = Reference(np.repeat(keys, 2), np.full(2 * len(keys), -1.0, np.float32))
    keep_reference(pairs.storage, REFERENCE, known)
    draw = np.random.default_rng(0)
    write_rows(place / "images", rows_table([[document(draw, GRID_RULES, row)] for row in range(4)]), GRID_RULES)


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


def make_adapter(directory: Path, dora: bool = False) -> None:
    """An adapter of it, as PEFT saves them."""
    directory.mkdir()
    name = f"{PREFIX}model.layers.0.self_attn.q_proj"
    matrices = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    if dora:
        matrices[f"{name}.lora_magnitude_vector"] = torch.ones(8)
    save_file(matrices, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    config |= {"use_dora": dora, "use_rslora": dora}
    (directory / "adapter_config.json").write_text(json.dumps(config))
