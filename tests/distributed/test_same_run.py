"""What ranks, or a run and what it goes on from, have in common: else the first thing that differs is named."""

import json
import shutil

import numpy as np
import pytest
from conftest import SMALL, VOCAB, write_table
from forked import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from fft.checkpoint.folder import read_state
from fft.models.in_process import write_random_model

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path):
    write_random_model(AutoConfig.for_model(**(SMALL | {"model_type": "llama"})), tmp_path / "model", 0)
    return tmp_path / "model"


def another(model, where, config=None, nudge=None):
    """A copy of a model directory, with other entries in its config, or one weight that is a little larger."""
    shutil.copytree(model, where)
    raw = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(raw | (config or {})))
    if nudge:
        tensors = load_file(where / "model.safetensors")
        tensors[nudge] = tensors[nudge] * 1.001
        save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    return where


def rows(seed):
    """A table whose shape is that of any other seed's."""
    return [np.random.default_rng(seed).integers(0, VOCAB, 32).astype(np.int32) for _ in range(40)]


def flags(output, model="model", table="table"):
    given = (
        f"--model {model} --train_data {table} --seq_len 32 --max_steps 2 --dtype fp32 --gradient_accumulation_steps 2"
    )
    return [*given.split(), "--checkpoint", output / "run", "--save_steps", "1"]


@pytest.mark.parametrize(
    ("differs", "said"),
    [
        ("config", "its config.rms_norm_eps is 1e-05, that of rank 0 1e-06"),
        ("weights", "its weights is "),
        ("table", "--train_data or --eval_data of rank 1 is not that of rank 0"),
        ("seed", "its --seed is 1, that of rank 0 0"),
    ],
)
def test_ranks_of_different_runs_do_not_train(differs, said, model, tmp_path):
    """Two stages, each in a folder of its own, where model and table may be other ones of the same shapes."""
    for rank in range(2):
        other = rank if differs in ("config", "weights", "table") else 0
        another(
            model,
            tmp_path / str(rank) / "model",
            {"rms_norm_eps": 1e-5} if other and differs == "config" else None,
            "model.layers.1.mlp.up_proj.weight" if other and differs == "weights" else None,
        )
        write_table(tmp_path / str(rank) / "table", rows(7 if other and differs == "table" else 0))
        (tmp_path / str(rank) / "own.yaml").write_text(f"seed: {rank if differs == 'seed' else 0}\n")
    given = [*flags(tmp_path), "--pipe_parallel_size", "2", "--config", "own.yaml"]
    done = run_ranks(2, tmp_path, *given, module="tests.distributed.apart")
    assert done.returncode == 2, done.stderr[-3000:]
    assert said in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_knows_what_it_trains(model, tmp_path):
    table = write_table(tmp_path / "table", rows(0))
    more = ["--eval_data", table, "--max_num_checkpoints", "9", "--best_of", "1"]
    done = run_ranks(1, *flags(tmp_path, model, table), *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_state(tmp_path / "run" / "step-2")["identity"]["config"]["rms_norm_eps"] == 1e-6
    eps = another(model, tmp_path / "eps", {"rms_norm_eps": 1e-5})
    rope = another(model, tmp_path / "rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    weights = another(model, tmp_path / "weights", nudge="model.layers.1.mlp.up_proj.weight")
    other = write_table(tmp_path / "other", rows(7))
    for changed, said in (
        (["--model", eps], "--resume: rms_norm_eps is 1e-05 in the config of the model, "),
        (["--model", rope], "--resume: rope_parameters is {'rope_theta': 500000.0, 'rope_type': 'default'} in the con"),
        (["--model", weights], "--resume: the weights of the model are not those that the run of "),
        (["--eval_data", other], "--resume: --eval_data is not what it was in "),
        (["--train_data", other], "the data's fingerprint is "),
    ):
        done = run_ranks(1, *flags(tmp_path, model, table), *more, "--max_steps", "4", "--resume", "auto", *changed)
        assert (done.returncode, done.stderr.count("error:")) == (2, 1), done.stderr[-3000:]
        assert said in done.stderr
    same = another(model, tmp_path / "moved")
    done = run_ranks(
        1, *flags(tmp_path, same, table), *more, "--max_steps", "4", "--resume", "auto", "--best_of", "0",
        "--eval_data", other,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning: --eval_data is not what it was in" in done.stderr
