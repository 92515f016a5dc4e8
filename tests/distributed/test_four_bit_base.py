"""Adapters on a model in four bits: every kind of layout against one process, whose weights are rounded alike."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SMALL, VOCAB
from forked import run_ranks
from in_process import run_here
from pairs import random_pairs, write_pairs
from safetensors import safe_open
from thorough import thorough
from transformers import AutoConfig, AutoModelForCausalLM

from fft.arguments import parse_arguments
from fft.checkpoint.adapter import CONFIG, WEIGHTS
from fft.checkpoint.convert import cli
from fft.data.pairs import REFERENCE_PREFIX
from fft.models.in_process import write_random_model
from fft.parity_reference import one_process
from fft.parity_run import faults, read_outcome
from fft.planning.preflight import plan_run

bitsandbytes = pytest.importorskip("bitsandbytes")

STEPS, LR = 3, 1e-3
#: Two ranks have whole blocks of 64 inputs each. Weights are as much smaller as there are more of them in a sum.
SIZES = SMALL | {"hidden_size": 128, "intermediate_size": 128, "initializer_range": SMALL["initializer_range"] / 2}
FAMILIES = {"llama": {"model_type": "llama"}, "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True}}
LORA, DORA = ("--lora_dim=3", "--lora_alpha=12"), ("--lora_dim=3", "--use_dora", "--lora_dropout=0.2")
LAYOUTS = {
    "pipe2": ("--pipe_parallel_size=2", "--gradient_accumulation_steps=8", "--checkpoint_grad_interval=1"),
    "data2": ("--gradient_accumulation_steps=4", "--zero_stage=1"),
    "tensor2": ("--model_parallel_size=2", "--gradient_accumulation_steps=8", "--checkpoint_grad_selective"),
    "sequence2": ("--sequence_parallel_size=2", "--gradient_accumulation_steps=8", "--compile"),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family, more in FAMILIES.items():
        write_random_model(AutoConfig.for_model(**{**SIZES, **more}), folder / family, seed=1)
    return lambda family: folder / family


def flags(model, table, output) -> list[str]:
    return (
        f"--model={model} --load_in_4bit --train_data={table} --seq_len=64 --max_steps={STEPS} --learning_rate={LR} "
        f"--max_grad_norm=0.5 --adam_epsilon=1e-5 --dtype=fp32 --seed=3 --checkpoint={output / 'run'} "
        f"--output_dir={output / 'model'} --save_steps={STEPS} --logging_steps=1"
    ).split()


def first_step(run) -> dict:
    """The numbers of a run's first step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return next(line for line in lines if "loss" in line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout", "trained"),
    [
        ("llama", "pipe2", LORA),
        thorough("qwen2", "data2", DORA),
        ("llama", "tensor2", DORA),
        thorough("qwen2", "tensor2", LORA),
        thorough("qwen2", "sequence2", LORA),
    ],
)
def test_layout_equals_one_process(family, layout, trained, model_dir, ragged_table, tmp_path):
    own = [*flags(model_dir(family), ragged_table, tmp_path), *trained]
    done = run_ranks(2, *own, *LAYOUTS[layout])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"NF4 bitsandbytes {bitsandbytes.__version__}" in done.stderr
    assert " of all parameters in four bits (NF4); total" in done.stderr
    args = parse_arguments([*flags(model_dir(family), ragged_table, tmp_path / "n"), *trained, LAYOUTS["pipe2"][1]])
    expected = one_process(Path(args.model), args, plan_run(args, 1))
    assert faults(read_outcome(tmp_path / "run"), expected, LR) == []


@pytest.mark.slow
def test_what_is_written_says_so_and_is_merged_into_the_whole_model(model_dir, ragged_table, tmp_path):
    """In bf16, whose casts leave magnitudes alone: the first loss is that of the rounded model. Resumed, it goes on."""
    own = [*flags(model_dir("llama"), ragged_table, tmp_path), *LORA, "--gradient_accumulation_steps=8", "--dtype=bf16"]
    done = run_ranks(1, *own)
    assert done.returncode == 0, done.stderr[-3000:]
    for place in (tmp_path / "model", tmp_path / "run" / f"step-{STEPS}"):
        with safe_open(place / WEIGHTS, "pt") as file:
            assert file.metadata() == {"format": "pt", "base_model": "nf4"}
        assert "| model | llama, bf16, below the adapter in four bits (NF4) |" in (place / "README.md").read_text()
    whole = run_ranks(1, *[x.replace("/run", "/whole") for x in own if "4bit" not in x and "output" not in x])
    assert whole.returncode == 0, whole.stderr[-3000:]
    args = parse_arguments([*flags(model_dir("llama"), ragged_table, tmp_path / "n"), *LORA, LAYOUTS["pipe2"][1]])
    expected = one_process(Path(args.model), args, plan_run(args, 1)).losses[0]
    plain = first_step(tmp_path / "whole")["loss"]
    assert first_step(tmp_path / "run")["loss"] == pytest.approx(expected, rel=1e-3)
    assert plain != pytest.approx(expected, rel=1e-3)

    merged = run_here(cli, model_dir("llama"), tmp_path / "merged", "--lora", place)
    assert merged.returncode == 0, merged.stderr
    assert merged.stderr.count("was trained on the model in four bits (NF4), whose rounded weights it saw") == 1
    name = "model.layers.0.self_attn.q_proj.weight"
    base, made = (AutoModelForCausalLM.from_pretrained(p) for p in (model_dir("llama"), tmp_path / "merged"))
    torch.testing.assert_close(made.get_parameter(name), base.get_parameter(name), atol=1e-2, rtol=0)
    assert json.loads((place / CONFIG).read_text())["base_model_name_or_path"] == str(model_dir("llama"))

    done = run_ranks(1, *own, "--resume=auto", f"--max_steps={STEPS + 1}", "--overwrite")
    assert done.returncode == 0, done.stderr[-3000:]
    done = run_ranks(
        1, *[x for x in own if "4bit" not in x], "--resume=auto", f"--max_steps={STEPS + 2}", "--overwrite"
    )
    assert done.returncode == 2
    assert "--load_in_4bit False: " in done.stderr
    assert "was trained with True; resume with that." in done.stderr


@pytest.mark.slow
def test_the_reference_of_preferences_is_the_rounded_model(model_dir, tmp_path):
    """Its name is another than that of the model itself, and the first loss is log 2 by each."""
    write_pairs(table := tmp_path / "pairs", random_pairs(20, VOCAB))
    given = ["--objective=dpo", "--pack=best-fit", "--gradient_accumulation_steps=8", *LORA]
    for number in range(2):
        own = [x for x in flags(model_dir("qwen2"), table, tmp_path / str(number)) if number or "4bit" not in x]
        done = run_ranks(1, *own, *given)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len([*table.glob(f"{REFERENCE_PREFIX}*")]) == number + 1
        first = first_step(tmp_path / str(number) / "run")
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_ranks_that_would_cut_blocks_are_refused(ragged_table, tmp_path):
    write_random_model(AutoConfig.for_model("llama", **SMALL), tmp_path / "small", seed=1)
    given = ["--model_parallel_size=2", "--gradient_accumulation_steps=8", *LORA]
    done = run_ranks(2, *flags(tmp_path / "small", ragged_table, tmp_path), *given)
    assert done.returncode == 2
    assert "which cuts blocks of 64 values: lower it, and raise --pipe_parallel_size instead." in done.stderr
