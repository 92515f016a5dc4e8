"""What is not understood of a model directory is refused by one sentence, whichever command reads it."""

import json

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from fft import parity
from fft.arguments import parse_arguments
from fft.checkpoint import convert
from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.in_process import write_random_model
from fft.models.spec import ModelSpec
from fft.planning.dry_run import dry_run
from fft.planning.preflight import plan_run
from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer
from fft.serve import batch_infer, server


def trainer(folder, table, out):
    plan = plan_run(
        parse_arguments(["--model", folder, "--train_data", table, "--seq_len", "64", "--output_dir", out]), 1
    )
    StageBuilder(ModelSpec(plan.config, torch.float32), weights=plan.weights).build("model.norm")


def planner(folder, table, out):
    dry_run(parse_arguments(["--dry_run", "--ranks", "1", "--model", folder, "--seq_len", "64"]))


def comparison(folder, table, out):
    parity.main(["--model", folder, "--train_data", table, "--seq_len", "64", "--output_dir", out])


def converter(folder, table, out):
    convert.main([folder, out])


def generator(folder, table, out):
    prompts = f"{folder}/prompts.txt"
    with open(prompts, "w") as stream:
        stream.write("a")
    batch_infer.main(["--model", folder, "--input", prompts, "--output", f"{out}.jsonl", "--engine", "transformers"])


def serving(folder, table, out):
    server.model_settings(str(folder), frozenset())


COMMANDS = {c.__name__: c for c in (trainer, planner, comparison, converter, generator, serving)}


@pytest.fixture
def folder(tmp_path):
    """A model with its tokenizer, to be harmed."""
    folder = tmp_path / "model"
    save_tokenizer(train_tokenizer(["ab"], 258), folder)
    write_random_model(AutoConfig.for_model("llama", **SMALL | {"vocab_size": 300}), folder, 0)
    return folder


def setting(**entries):
    def harm(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))

    return harm


def weight(name, change):
    def harm(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights, name)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return harm


#: The first is not for the server: vLLM reads more quantized models than we do.
EVERYWHERE = [
    (setting(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantized .quant_method 'gptq'"),
    (setting(model_type="nonsense"), "config.json is not a model configuration .model_type is 'nonsense'"),
    (setting(rms_norm_eps="tiny"), "config.json is not a model configuration"),
    (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter beside a model"),
]
#: What a dry run and a comparison, which makes weights of its own, do not read.
WEIGHTS = [
    (weight("model.norm.weight", lambda w, name: w.pop(name)), "has no tensor model.norm.weight"),
    (weight("model.norm.bias", lambda w, name: w.update({name: torch.ones(32)})), "holds tensor model.norm.bias, for"),
    (weight("lm_head.weight", lambda w, name: w.update({name: w[name].to(torch.float8_e4m3fn)})), "holds codes"),
]
#: What transformers does, and we do not.
MATHEMATICS = [
    (setting(attention_dropout=0.1), "attention_dropout is not supported"),
    (setting(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}), "rope_type 'proportional'"),
    (setting(is_causal=False), "attends to what follows"),
]


@pytest.mark.parametrize(
    ("command", "harm", "said"),
    [
        *((command, *case) for command in COMMANDS for case in EVERYWHERE[command == "serving" :]),
        *((command, *case) for command in ("converter", "generator", "serving") for case in WEIGHTS),
        *(("trainer", *case) for case in WEIGHTS[:2]),
        *((command, *case) for command in ("trainer", "planner", "comparison") for case in MATHEMATICS),
    ],
)
def test_one_sentence_for_all(command, harm, said, folder, ragged_table, tmp_path):
    harm(folder)
    with pytest.raises(UserError, match=said):
        COMMANDS[command](str(folder), str(ragged_table), str(tmp_path / "out"))
