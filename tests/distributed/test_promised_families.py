"""Whole directories of Qwen, InternLM2 and Baichuan, as published but small, through all that is done with a model:
tokenizer converted, trained in one rank and in two, saved, loaded by transformers, converted, adapted, and asked."""

import json
import shutil

import numpy as np
import pytest
import torch
from forked import run_ranks
from original_models import FAMILIES, Family, write_original
from originals import WORDS, strings, write_pieces, write_ranks
from safetensors.torch import load_file
from test_parity import read_metrics
from test_runs import SEQ_LEN, loss_of
from thorough import thorough
from transformers import AutoTokenizer

from fft.checkpoint import convert
from fft.serve import batch_infer
from fft.text import convert_tokenizer
from fft.weights.hf import WeightReader

pytestmark = pytest.mark.slow
VOCABULARY = 1024
#: Of each the two ranks that it is trained with, besides one alone.
LAYOUTS = {
    "qwen": "--model_parallel_size 2",
    "internlm2": "--model_parallel_size 2",
    "baichuan-7b": "--pipe_parallel_size 2",
    "baichuan2-7b": "--model_parallel_size 2",
    "baichuan-13b": "--sequence_parallel_size 2 --ulysses_degree 2",
    "baichuan2-13b": "--sequence_parallel_size 2",
}
RENAMED = {"3": {"content": "<|im_start|>", "special": True}, "4": {"content": "<|im_end|>", "special": True}}
RESERVED = [f"<reserved_{i}>" for i in range(3)]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Folders of tokenizers as published, by the first word of a family's name, and the same converted."""
    folder = tmp_path_factory.mktemp("tokenizers")
    pieces = {"size": 900, "add_dummy_prefix": False, "user_defined_symbols": RESERVED}
    write_ranks(folder / "qwen", 700)
    write_pieces(folder / "internlm2", "InternLM2Tokenizer", config={"added_tokens_decoder": RENAMED}, **pieces)
    write_pieces(folder / "baichuan", "BaichuanTokenizer", **pieces)
    ends = {"eos_token_id": 700, "chat_format": "chatml"}
    (folder / "qwen" / "generation_config.json").write_text(json.dumps(ends))
    roles = {"user_token_id": 4, "assistant_token_id": 5, "eos_token_id": 2}
    (folder / "baichuan" / "generation_config.json").write_text(json.dumps(roles))
    for name in ("qwen", "internlm2", "baichuan"):
        convert_tokenizer.main([str(folder / name), str(folder / f"{name}-converted")])
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts to train on, a record a line."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [text for text in strings(60, 7, WORDS) if text.strip()]
    file.write_text("\n".join(json.dumps({"text": text}) for text in lines), encoding="utf-8")
    return file


def published(folder, name: str, tokenizers):
    """A directory with a model's config, weights, code and tokenizer."""
    family: Family = FAMILIES[name]
    write_original(folder, family, binary=name != "qwen", vocabulary=VOCABULARY)
    (folder / "modeling_original.py").write_text("raise RuntimeError('code that comes with a model was run')\n")
    for file in (tokenizers / name.partition("2-")[0].partition("-")[0]).iterdir() if name != "internlm2" else ():
        shutil.copy(file, folder)
    for file in (tokenizers / "internlm2").iterdir() if name == "internlm2" else ():
        shutil.copy(file, folder)
    return folder


def trained(ranks: int, folder, original, tokenizer, data, *flags: str):
    """Three steps in so many ranks; returns losses before and after, and the model's directory."""
    given = f"--seq_len {SEQ_LEN} --max_steps 3 --save_steps 3 --dtype fp32 --learning_rate 1e-2 --adam_epsilon 1e-4"
    paths = ["--model", original, "--train_data", data, "--eval_data", data, "--checkpoint", folder / "run"]
    paths += ["--output_dir", folder / "model", "--tokenizer", tokenizer]
    done = run_ranks(ranks, *paths, *given.split(), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(folder / "run")[1], folder / "model"


def weights_of(folder) -> dict[str, torch.Tensor]:
    reader = WeightReader(folder)
    return {name: reader.tensor(name) for name in reader.names}


def table_in(folder):
    """The table that a run made of its texts."""
    (manifest,) = (folder / "run").rglob("_fft_manifest.json")
    return manifest.parent


@pytest.mark.parametrize(
    "name", [name if name in ("qwen", "internlm2", "baichuan2-13b") else thorough(name) for name in LAYOUTS]
)
def test_a_published_directory_goes_all_the_way(tmp_path, tokenizers, texts, name):
    original = published(tmp_path / "published", name, tokenizers)
    tokenizer = tokenizers / f"{'internlm2' if name == 'internlm2' else name.split('-')[0].rstrip('2')}-converted"
    (before, after), model = trained(1, tmp_path / "one", original, tokenizer, texts)
    (_, two), model_of_two = trained(2, tmp_path / "two", original, tokenizer, texts, *LAYOUTS[name].split())
    assert before != after
    np.testing.assert_allclose(two, after, rtol=1e-5)
    ours, theirs = weights_of(model), weights_of(model_of_two)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-4, atol=1e-4, msg=key)
    # Saved, and loaded by transformers: what it computes is what the run reported.
    np.testing.assert_allclose(loss_of(model, table_in(tmp_path / "one")), after, rtol=1e-5)
    config = json.loads((model / "config.json").read_text())
    kept = {"qwen": "qwen2", "internlm2": "llama", "baichuan-7b": "llama"}.get(name, "baichuan")
    assert config["model_type"] == kept
    assert ("auto_map" in config) == (kept == "baichuan") == (model / "modeling_original.py").is_file()
    published_names = set(FAMILIES[name].shapes)
    assert (set(ours) == published_names) == (kept == "baichuan")
    assert AutoTokenizer.from_pretrained(model).chat_template == AutoTokenizer.from_pretrained(tokenizer).chat_template
    # From a checkpoint and from the published directory, with whose own tokenizer.
    convert.main([str(tmp_path / "one" / "run"), str(tmp_path / "again")])
    for key, value in weights_of(tmp_path / "again").items():
        assert torch.equal(value, ours[key]), key
    convert.main([str(original), str(tmp_path / "translated")])
    copied = set(load_file(tmp_path / "translated" / "model.safetensors"))
    assert copied - set(FAMILIES[name].computed) == set(ours)
    np.testing.assert_allclose(loss_of(tmp_path / "translated", table_in(tmp_path / "one")), before, rtol=1e-5)
    for folder in (model, tmp_path / "translated"):
        prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
        prompts.write_text("def f\nwas\n")
        flags = ["--max_new_tokens", "4", "--engine", "transformers", "--temperature", "0", "--overwrite"]
        batch_infer.main(["--model", str(folder), "--input", str(prompts), "--output", str(answers), *flags])
        assert len(answers.read_text().splitlines()) == 2
    if name == "qwen":
        ends = json.loads((tmp_path / "translated" / "generation_config.json").read_text())["eos_token_id"]
        assert ends == [700, 702]
        assert AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize("name", ["internlm2", "baichuan2-13b"])
def test_an_adapter_of_a_published_model_is_merged_into_it(tmp_path, tokenizers, texts, name):
    original = published(tmp_path / "published", name, tokenizers)
    tokenizer = tokenizers / f"{'internlm2' if name == 'internlm2' else 'baichuan'}-converted"
    (before, after), adapter = trained(
        2, tmp_path, original, tokenizer, texts, "--lora_dim", "4", "--model_parallel_size", "2"
    )
    assert before != after
    convert.main([str(adapter), str(tmp_path / "merged")])
    np.testing.assert_allclose(loss_of(tmp_path / "merged", table_in(tmp_path)), after, rtol=1e-5)
    # It answers as the model that it is merged into does.
    shutil.copytree(tokenizer, original, dirs_exist_ok=True)
    prompts, answers = tmp_path / "prompts.txt", []
    prompts.write_text("def f\nwas\n")
    for model in ([str(original), "--lora", str(adapter)], [str(tmp_path / "merged")]):
        answers.append(tmp_path / f"{len(answers)}.jsonl")
        flags = ["--input", str(prompts), "--output", str(answers[-1]), "--max_new_tokens", "6", "--engine"]
        batch_infer.main(["--model", *model, *flags, "transformers"])
    assert answers[0].read_text() == answers[1].read_text()
