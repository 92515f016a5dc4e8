"""Every way to start the trainer: what ``--help`` says and starts, and which settings a run really takes."""

import json

import numpy as np
import pytest
from conftest import SMALL
from test_parity import command, read_metrics

#: Flags that ``jllm`` users look for.
NAMES = (
    "--model",
    "--train_data",
    "--eval_data",
    "--pipe_parallel_size",
    "--model_parallel_size",
    "--sequence_parallel_size",
    "--encoder_pipe_parallel_size",
    "--partition_method",
    "--split_dlayer",
    "--checkpoint_grad_interval",
    "--num_train_epochs",
    "--per_device_train_batch_size",
    "--gradient_accumulation_steps",
    "--learning_rate",
    "--seq_len",
    "--checkpoint",
    "--only_ckpt_model",
    "--max_num_checkpoints",
    "--from_ckpt",
    "--tag",
)


@pytest.fixture(scope="module")
def help_text(launch) -> str:
    done = launch("python", "-m", "fft.train", "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_names_the_flags_and_shows_examples(help_text):
    words = help_text.split()
    assert [name for name in NAMES if name not in words] == []
    assert "examples:" in help_text
    assert "Traceback" not in help_text


@pytest.mark.parametrize("start", [("python", "fft/train.py"), ("fft-train",)], ids=["script", "console"])
def test_help_is_the_same_and_loads_nothing_heavy(start, launch, help_text):
    done = launch(*start, "--help", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    assert done.stdout.replace("usage: fft-train", "usage: fft/train.py", 1).split() == help_text.split()
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fft.arguments" in imported
    assert not {name.partition(".")[0] for name in imported} & {"torch", "deepspeed", "transformers", "pyarrow"}


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_help_passes_through_a_launcher(launcher, launch, help_text):
    done = launch(*command(launcher, 1), "--help", timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(help_text) == 1  # deepspeed adds lines of its own
    assert "Traceback" not in done.stderr


def test_settings_of_the_file_act_and_the_command_line_wins(launch, ragged_table, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    settings = {
        "init": True,
        "model": str(tmp_path / "config.json"),
        "train_data": str(ragged_table),
        "output_dir": str(tmp_path / "model"),
        "checkpoint": str(tmp_path / "run"),
        "seq_len": 32,
        "max_steps": 50,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "dtype": "fp32",
    }
    (tmp_path / "run.yaml").write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in settings.items()))
    given = ["--max_steps", "2", "--learning_rate", "0.003", "--gradient_accumulation_steps", "3"]
    done = launch(*command("python", 1), "--config", tmp_path / "run.yaml", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    steps, _ = read_metrics(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2]
    np.testing.assert_allclose([step["lr"] for step in steps], 0.003)
    assert f"2 steps of {3 * 32} tokens" in done.stderr
