"""A folder in which the commands of the pages find what they name, each small: models, texts, tables, pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from conftest import ROOT, VOCAB
from device.token_tables import write_table
from generation import TEMPLATE, make_model, write_lines
from internvl_originals import write_chat_model
from originals import write_ranks
from safetensors.torch import load_file, save_file
from vision_models import picture, save_model

#: Where the pages have models that read texts and chats, or tokenizers alone.
MODELS = ("path/to/hf-model", "path/to/hf-tokenizer", "path/to/chat-model", "path/to/base", "Qwen3-8B")
MODELS += ("lake/tokenizer", "runs/tokenizer")
WORDS = ("row", "table", "token", "order", "seed", "model", "reads", "writes", "lake", "part", "many", "few", "of")


def text(name: str, number: int, words: int = 60) -> str:
    """Words from nothing but a name and a number."""
    return " ".join(f"{name} {number}" if i % 9 == 0 else WORDS[(number * 7 + i * i) % 13] for i in range(words))


def prepare(folder: Path) -> None:
    """All that pages take for granted; what they say how to make is not there yet."""
    for name in ("fft", "spark_jobs", "bundle"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("conf", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    layout = {"pipe_parallel_size": 2, "seq_len": 256, "model": "path/to/hf-model", "train_data": "runs/packed/train"}
    for name in ("mine.yaml", "32b-h100-80g.yaml"):
        (folder / "conf" / name).write_text(yaml.safe_dump(layout))
    _write_models(folder)
    _write_texts(folder)
    _write_chats(folder)
    rng = np.random.default_rng(0)
    for name in ("web", "books"):
        rows = [rng.integers(0, VOCAB, rng.integers(1, 90)).astype(np.int32) for _ in range(30)]
        write_table(folder / "runs" / "datasets" / name, rows)


def _write_models(folder: Path) -> None:
    made = make_model(folder / MODELS[0], template=TEMPLATE, max_position_embeddings=8192)
    for name in MODELS[1:]:
        shutil.copytree(made, folder / name)
    (folder / "Qwen2-VL-7B").mkdir()
    save_model(folder / "Qwen2-VL-7B", "qwen2_vl")
    (folder / "InternVL2_5-8B").mkdir()
    write_chat_model(folder / "InternVL2_5-8B", "qwen2")
    (folder / "Qwen-7B-Chat").mkdir()
    write_ranks(folder / "Qwen-7B-Chat")
    adapter = folder / "runs" / "adapter"
    adapter.mkdir(parents=True)
    matrices = {}
    for name, weight in load_file(made / "model.safetensors").items():
        if name.endswith("q_proj.weight"):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            matrices[f"{stem}.lora_A.weight"] = torch.ones(4, weight.shape[1])
            matrices[f"{stem}.lora_B.weight"] = torch.ones(weight.shape[0], 4)
    save_file(matrices, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    shutil.copytree(adapter, folder / "runs" / "sft")


def _write_texts(folder: Path) -> None:
    def documents(name: str, count: int) -> list[dict]:
        return [{"id": f"{name}/{number}", "text": text(name, number)} for number in range(count)]

    write_lines(folder / "corpus.jsonl", documents("wiki", 400))
    (folder / "books").mkdir()
    (folder / "books" / "one.txt").write_text("\n\n".join(text("book", number) for number in range(20)))
    for name in ("wiki", "books", "code"):
        write_lines(folder / "lake" / name / "part.jsonl", documents(name, 60))
    write_lines(folder / "prompts.jsonl", [{"prompt": "a row of"}, {"prompt": "many"}])
    write_lines(folder / "lake" / "questions" / "part.jsonl", [{"question": "few or many?"}])


def _write_chats(folder: Path) -> None:
    chats = []
    for number in range(120):
        turns = [("user", text("ask", number, 8)), ("assistant", text("tell", number, 30))]
        messages = [{"role": role, "content": said} for role, said in turns]
        chats.append({"id": f"chats/{number}", "messages": messages})
    write_lines(folder / "chats.jsonl", chats)
    pairs = [
        {"prompt": text("ask", n, 6), "chosen": text("tell", n, 9), "rejected": text("no", n, 7)} for n in range(40)
    ]
    write_lines(folder / "pairs.jsonl", pairs)
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    seen = []
    for number in range(6):
        (folder / "images" / f"{number}.png").write_bytes(picture(rng, "png"))
        seen.append({"messages": [{"user": ["What is on <image>?", f"{number}.png"]}, {"assistant": "a cat"}]})
    write_lines(folder / "dataset_vl.jsonl", seen)
