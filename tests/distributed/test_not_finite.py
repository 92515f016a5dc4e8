"""Numbers that are none: steps are skipped, told and counted on every layout, losses are refused."""

import re

import pytest
import torch
from conftest import SMALL
from forked import run_ranks
from safetensors.torch import load_file, save_file
from test_parity import read_metrics
from transformers import AutoConfig

from fft.models.in_process import write_random_model

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path):
    """A model directory whose tensors were changed by a function of their names."""

    def make(change):
        config = AutoConfig.for_model(**(SMALL | {"model_type": "llama", "rms_norm_eps": 1e-40}))
        write_random_model(config, tmp_path / "model", 0)
        file = tmp_path / "model" / "model.safetensors"
        tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        return tmp_path / "model"

    return make


def run(ranks, model, table, output, *more):
    given = f"--model {model} --train_data {table} --seq_len 32 --max_steps 9 --gradient_accumulation_steps 2"
    return run_ranks(ranks, *given.split(), f"--checkpoint={output}/run", "--logging_steps=1", *more)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, "--dtype=fp32"),
        (2, "--dtype=fp32 --zero_stage=1"),
        (2, "--dtype=fp32 --pipe_parallel_size=2"),
        (2, "--dtype=bf16 --pipe_parallel_size=2"),
        (1, "--dtype=bf16 --offload_optimizer"),
    ],
)
def test_gradients_that_are_not_finite_change_nothing(ranks, layout, model, ragged_table, tmp_path):
    """The norm divides by the size of embeddings of 1e-19: the loss is what it was, squares of gradients overflow."""
    start = model(lambda name, tensor: tensor * 1e-18 if "embed_tokens" in name else tensor)
    done = run(ranks, start, ragged_table, tmp_path, *layout.split(), "--save_steps=1", "--max_skipped_steps=2")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "warning: step 1: the loss is finite, its gradients are not (norm inf); it is skipped" in done.stderr
    assert "step 2: the loss is finite, its gradients are not (norm inf), and 2 steps in a row were sk" in done.stderr
    (step,), _ = read_metrics(tmp_path / "run")
    assert step["skipped_steps"] == 1
    saved = {k: v for file in (tmp_path / "run" / "step-1").glob("*.safetensors") for k, v in load_file(file).items()}
    given = load_file(start / "model.safetensors")
    assert saved.keys() == given.keys()
    assert all(torch.equal(saved[name], tensor.to(saved[name].dtype)) for name, tensor in given.items())


def test_a_validation_loss_that_is_no_number_is_an_error(model, ragged_table, tmp_path):
    start = model(lambda name, tensor: tensor * 1e38 if "layers.1.mlp" in name else tensor)
    more = f"--eval_data={ragged_table} --num_train_epochs=0 --max_steps=-1 --output_dir={tmp_path}/out --dtype=fp32"
    done = run(1, start, ragged_table, tmp_path, *more.split())
    assert done.returncode == 2, done.stderr[-3000:]
    assert "the validation loss became " in done.stderr
    assert not (tmp_path / "out").exists()


#: Ranks and flags: what is written by whom, and how.
WRITTEN = {
    "stages": (2, "--dtype=bf16 --pipe_parallel_size=2 --background_executor=process"),
    "parts of an adapter": (2, "--dtype=fp32 --model_parallel_size=2 --lora_dim=2"),
    "shared state": (2, "--dtype=fp32 --zero_stage=1"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_weights_that_a_last_step_spoilt_are_not_written(case, model, ragged_table, tmp_path):
    """Nothing is evaluated after it, and its loss was that of the weights before."""
    ranks, more = WRITTEN[case]
    start, output = model(lambda _, tensor: tensor), f"--output_dir={tmp_path}/out"
    given = [*more.split(), "--warmup_steps=1000000000", "--save_steps=1", output, "--adam_epsilon=1e-30"]
    done = run(ranks, start, ragged_table, tmp_path, *given, "--max_steps=1")
    assert done.returncode == 0, done.stderr[-3000:]
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    again = [*given, "--resume=auto", "--overwrite", "--max_steps=2", "--learning_rate=1e48"]  # of which it has 2e-9
    done = run(ranks, start, ragged_table, tmp_path, *again)
    assert done.returncode == 2, done.stderr[-3000:]
    told = r"error: step 2: \S+ holds NaN or infinity(, as [\d,]+ more tensors do)?; it is not written"
    assert re.search(told, done.stderr)
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-1"]
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("weights", [[], ["--save_steps=1", "--only_ckpt_model", "--background_executor=none"]])
def test_weights_alone_are_not_written_either(weights, model, ragged_table, tmp_path):
    """Those of the output, where nothing is saved, and of checkpoints that nobody goes on from."""
    start = model(lambda _, tensor: tensor)
    flags = ["--dtype=bf16", "--max_steps=1", "--learning_rate=1e48", f"--output_dir={tmp_path}/out", *weights]
    done = run(2, start, ragged_table, tmp_path, *flags, "--pipe_parallel_size=2")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: step 1: " in done.stderr
    assert not [*(tmp_path / "run").glob("*step-*")]
    assert not (tmp_path / "out").exists()
    assert not [*tmp_path.glob(".*out*")]
