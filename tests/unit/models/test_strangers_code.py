"""Code that comes with a model's directory is not run, whatever stands on stdin."""

import json
import subprocess
import sys

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from fft.models.in_process import write_random_model
from fft.models.small import small_config

CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): pass
class Tokenizer(PreTrainedTokenizerFast): pass
"""
AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModel": "evil.Model",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}


@pytest.fixture
def directory(tmp_path):
    """A Llama whose config and tokenizer name classes of a module beside them, which leaves a mark."""
    folder, mark = tmp_path / "model", tmp_path / "mark"
    folder.mkdir()
    write_random_model(small_config("llama"), folder, seed=0)
    words = tokenizers.models.WordLevel({"a": 3, "b": 4, "</s>": 2}, unk_token="b")
    PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), eos_token="</s>").save_pretrained(folder)
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    for name, more in (("config.json", {}), ("tokenizer_config.json", {"tokenizer_class": "Tokenizer"})):
        file = folder / name
        told = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(told | more | {"auto_map": AUTO_MAP}))
    return folder, mark


@pytest.mark.parametrize(
    ("command", "code"),  # the tokenizer's class is the stranger's alone: it is refused
    [
        ("fft.train --dry_run --model {model}", 0),
        ("fft.checkpoint.convert {model} {out}", 0),
        ("fft.serve.batch_infer --model {model} --engine transformers --prompt_file {prompts} --output_file {out}", 2),
    ],
)
def test_a_yes_on_stdin_runs_nothing(command, code, directory, tmp_path):
    model, mark = directory
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a"}) + "\n")
    words = command.format(model=model, out=tmp_path / "out.jsonl", prompts=prompts).split()
    done = subprocess.run(
        [sys.executable, "-m", *words], input="y\n" * 20, text=True, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == code, done.stderr
    assert not mark.exists(), done.stderr
    assert "Traceback" not in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
