"""Training goes on with an adapter of PEFT's: on layouts of every kind as by PEFT in one process."""

import dataclasses
import json
import math
import shutil

import peft
import pytest
import torch
from conftest import SMALL, VOCAB
from forked import run_ranks
from pairs import random_pairs, write_pairs
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fft.arguments import parse_arguments
from fft.checkpoint.adapter import PREFIX, WEIGHTS, adapter_parameters
from fft.data.pairs import REFERENCE_PREFIX
from fft.models.in_process import write_random_model
from fft.parity_reference import train_alone
from fft.parity_run import faults, read_outcome
from fft.planning.preflight import plan_run

STEPS, GLOBAL_BATCH, LR = 3, 8, 1e-3
FAMILIES = {"llama": {"model_type": "llama"}, "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True}}
KINDS = {"lora": {}, "dora": {"use_rslora": True, "use_dora": True}}
LAYOUTS = {
    "pipe2": (2, "--pipe_parallel_size=2 --gradient_accumulation_steps=8 --checkpoint_grad_interval=1"),
    "data2": (2, "--gradient_accumulation_steps=4"),
    "sequence2": (2, "--sequence_parallel_size=2 --gradient_accumulation_steps=8"),
    "tensor2": (2, "--model_parallel_size=2 --gradient_accumulation_steps=8"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By family and kind, a model's directory and that of an adapter, random everywhere, which PEFT saved."""
    folder = tmp_path_factory.mktemp("adapters")

    def of(family, kind):
        model, adapter = folder / family, folder / f"{family}-{kind}"
        if not model.exists():
            write_random_model(AutoConfig.for_model(**{**SMALL, **FAMILIES[family]}), model, seed=1)
        if not adapter.exists():
            torch.manual_seed(2)
            modules = ["q_proj", "o_proj", "up_proj", "down_proj"]
            config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=modules, **KINDS[kind])
            adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.data.mul_(1.5) if "magnitude" in name else nn.init.normal_(parameter, std=0.2)
            adapted.save_pretrained(adapter)
        return model, adapter

    return of


def flags(model, adapter, table, output) -> list[str]:
    return (
        f"--model={model} --adapter_name_or_path={adapter} --train_data={table} --seq_len=64 --max_steps={STEPS} "
        f"--learning_rate={LR} --max_grad_norm=0.5 --adam_epsilon=1e-5 --dtype=fp32 --seed=3 "
        f"--checkpoint={output / 'run'} --output_dir={output / 'model'} --save_steps={STEPS} --logging_steps=1"
    ).split()


def by_peft(args, plan):
    """What a plain loop does with PEFT's model, parameters by their names here."""
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, args.adapter_name_or_path, is_trainable=True)
    found = train_alone(model, args, plan)

    def named(tensors):
        own = {name.removeprefix(PREFIX).replace(".default", ""): value for name, value in tensors.items()}
        own = {name.replace("magnitude_vector.weight", "magnitude_vector"): value for name, value in own.items()}
        return adapter_parameters(own)

    return dataclasses.replace(found, weights=named(found.weights), gradients=named(found.gradients))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "layout"),
    [
        ("llama", "lora", "pipe2"),
        ("qwen2", "dora", "data2"),
        ("qwen2", "lora", "sequence2"),
        ("llama", "dora", "tensor2"),
    ],
)
def test_layout_equals_peft(family, kind, layout, made, ragged_table, tmp_path):
    (model, adapter), (ranks, given) = made(family, kind), LAYOUTS[layout]
    own = flags(model, adapter, ragged_table, tmp_path)
    done = run_ranks(ranks, *own, *given.split())
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"goes on with the adapter in {adapter}: " in done.stderr
    args = parse_arguments(
        [*flags(model, adapter, ragged_table, tmp_path / "unused"), "--gradient_accumulation_steps=8"]
    )
    assert faults(read_outcome(tmp_path / "run"), by_peft(args, plan_run(args, 1)), LR) == []
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| began with | `{model}` and the adapter `{adapter}` |" in card
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "model")


@pytest.mark.slow
def test_preferences_are_measured_against_the_model_with_the_adapter(made, tmp_path):
    """At first nothing has changed: the loss is log 2. The reference has a name of its own; resumed, the adapter is."""
    model, adapter = made("llama", "lora")
    other, table = made("llama", "dora")[1], tmp_path / "pairs"
    write_pairs(table, random_pairs(30, VOCAB))
    given = ["--objective=dpo", "--pack=best-fit", "--gradient_accumulation_steps=8"]
    firsts = []
    for number, place in enumerate((adapter, other, None)):
        own = flags(model, place, table, tmp_path / str(number))
        own = [flag for flag in own if place is not None or "adapter_name" not in flag] + ["--lora_dim=3"]
        done = run_ranks(1, *own, *given)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("reference log-probabilities of ") == 1
        assert len([*table.glob(f"{REFERENCE_PREFIX}*")]) == number + 1
        lines = (tmp_path / str(number) / "run" / "metrics.jsonl").read_text().splitlines()
        firsts.append(next(line["loss"] for line in map(json.loads, lines) if "loss" in line))
    assert firsts == pytest.approx([math.log(2)] * 3, abs=1e-5)
    resumed = [*flags(model, adapter, table, tmp_path / "0"), *given, "--resume=auto", f"--max_steps={STEPS + 1}"]
    done = run_ranks(1, *resumed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "those of" in done.stderr
    assert "kept beside it" not in done.stderr
    shutil.copytree(adapter, changed := tmp_path / "changed")
    tensors = load_file(changed / WEIGHTS)
    save_file({name: 1.1 * value for name, value in tensors.items()}, changed / WEIGHTS)
    done = run_ranks(1, *[flag.replace(str(adapter), str(changed)) for flag in resumed])
    assert done.returncode == 2
    assert "--resume: --adapter_name_or_path is not the adapter that the run of" in done.stderr
