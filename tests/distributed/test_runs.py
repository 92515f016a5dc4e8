"""What a run leaves behind: equal losses for equal seeds, a model that is what was evaluated, checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL
from forked import run_ranks
from ports import free_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_parity import read_metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

from fft.data.reader import SampleReader
from fft.data.table import Table
from fft.parity_reference import mean_loss
from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer

pytestmark = pytest.mark.slow
SEQ_LEN = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama", "vocab_size": 300}))
    save_tokenizer(train_tokenizer(["def f(x):\n    return x\n"] * 3, 300), folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def train(folder, launch, ragged_table):
    """Train for six steps on two pipeline stages; returns the run's step and evaluation losses."""

    def run(output, *flags, settings: dict | None = None, launched: bool = False) -> tuple[list[float], list[float]]:
        given = {
            **{"train_data": str(ragged_table), "eval_data": str(ragged_table), "seq_len": SEQ_LEN, "max_steps": 6},
            **{"pipe_parallel_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 1e-2, "dtype": "fp32"},
            **{"checkpoint": str(output / "run"), "output_dir": str(output / "model"), "logging_steps": 2},
            **(settings or {}),
        }
        output.mkdir()
        (output / "settings.yaml").write_text(yaml.safe_dump(given))
        given = ["--config", output / "settings.yaml", *flags]
        port = str(free_port())
        deepspeed = ["deepspeed", "--num_gpus", "2", "--master_port", port, "fft/train.py"]
        done = launch(*deepspeed, *given) if launched else run_ranks(2, *given)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))  # memory that would stay after the run
        steps, evaluated = read_metrics(output / "run")
        return [step["loss"] for step in steps], evaluated

    return run


@pytest.fixture(scope="module")
def first(folder, train):
    """A run from random weights that keeps checkpoints, in bf16."""
    scratch = ["--init", "--model", folder / "config.json", "--tokenizer", folder / "tokenizer", "--dtype", "bf16"]
    keep = ["--save_steps", "2", "--eval_steps", "2", "--only_ckpt_model", "--max_num_checkpoints", "2"]
    return (folder / "first", *train(folder / "first", *scratch, *keep, launched=True))


def loss_of(model_dir, table) -> float:
    """The loss by a plain loop: transformers' model, one document at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    reader = SampleReader(Table.open(table), SEQ_LEN, seed=0, shuffle=False)
    return mean_loss(model, reader)


def test_same_seed_same_losses(folder, train, first, tmp_path):
    scratch = ["--init", "--model", folder / "config.json", "--dtype", "bf16"]
    again, evaluated = train(tmp_path / "again", *scratch, settings={"eval_steps": 2})
    assert (again, evaluated) == first[1:]
    other, _ = train(tmp_path / "other", *scratch, "--seed", "1")
    assert all(a != b for a, b in zip(again, other, strict=True))


def test_command_line_wins_over_the_file(first):
    settings = yaml.safe_load((first[0] / "run" / "arguments.yaml").read_text())
    assert (settings["dtype"], settings["seq_len"], settings["max_num_checkpoints"]) == ("bf16", SEQ_LEN, 2)


def test_tensorboard_shows_the_metrics_file(first):
    """All of its numbers; lists, a number for each rank, are in the file alone."""
    run = first[0] / "run"
    accumulated = EventAccumulator(str(run / "tensorboard"))
    accumulated.Reload()
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lists = {name for line in written for name, value in line.items() if isinstance(value, list)}
    assert lists == {"rank_work", "rank_wait"}
    names = set().union(*written) - {"step"} - lists
    tags = {tag.rpartition("/")[2]: tag for tag in accumulated.Tags()["scalars"]}
    assert tags.keys() == names
    assert {tags[name] for name in ("loss", "eval_loss", "mfu")} == {"train/loss", "evaluation/eval_loss", "speed/mfu"}
    for name in names:
        shown = [(event.step, event.value) for event in accumulated.Scalars(tags[name])]
        expected = [(line["step"], line[name]) for line in written if name in line]
        np.testing.assert_allclose(shown, expected, rtol=1e-6)


def test_speed_is_measured_against_the_devices(first):
    lines = [json.loads(line) for line in (first[0] / "run" / "metrics.jsonl").read_text().splitlines()]
    start = next(line for line in lines if "matrix_flops_per_second" in line)
    assert 1 / 5 < start["pipeline_bubble"] < 1 / 2  # two stages, four micro-batches: 1 / 5 were the stages equal
    reported = [line for line in lines if "mfu" in line]
    assert [line["step"] for line in reported] == [2, 4, 6]
    for line in reported:
        assert line["tokens_per_second_per_device"] == pytest.approx(line["tokens_per_second"] / 2)
        assert 0 < line["mfu"] < 1
        assert 100 * 2**20 < line["memory"] < 8 * 2**30


def test_environment_is_written_down(first):
    facts = yaml.safe_load((first[0] / "run" / "environment.yaml").read_text())
    assert facts["torch"] == torch.__version__
    assert "fft/train.py" in facts["command"]
    assert len(facts["ranks"]) == 2
    assert all("cpu" in place for place in facts["ranks"].values())


def test_exported_bf16_model_has_the_reported_loss(first, ragged_table):
    output, _, evaluated = first
    assert evaluated[-1] < evaluated[0]
    np.testing.assert_allclose(loss_of(output / "model", ragged_table), evaluated[-1], rtol=1e-3)


def test_exported_fp32_model_has_the_reported_loss_and_goes_on(first, train, ragged_table, tmp_path):
    start = first[0] / "model"
    _, evaluated = train(tmp_path / "second", "--model", start)
    np.testing.assert_allclose(loss_of(start, ragged_table), evaluated[0], rtol=1e-5)
    np.testing.assert_allclose(loss_of(tmp_path / "second" / "model", ragged_table), evaluated[-1], rtol=1e-5)
    assert evaluated[-1] < evaluated[0]


def test_exported_directory_is_complete(first, folder):
    model = first[0] / "model"
    ours, theirs = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert ours("def g(y):").input_ids == theirs("def g(y):").input_ids
    assert json.loads((model / "config.json").read_text())["vocab_size"] == 300
    assert not [path for path in first[0].iterdir() if path.name not in ("model", "run", "settings.yaml")]


def test_checkpoints_are_kept_and_started_from(first, train, tmp_path):
    output, _, evaluated = first
    run = output / "run"
    assert sorted(path.name for path in run.glob("step-*")) == ["step-4", "step-6"]
    (run / "step-9").mkdir()  # without a config.json: no checkpoint
    # --dtype bf16: an evaluation of the same weights in the same type gives the same number.
    flags = ["--from_ckpt", run, "--dtype", "bf16", "--max_steps", "1"]
    assert train(tmp_path / "newest", *flags)[1][0] == evaluated[-1]
    assert train(tmp_path / "tagged", *flags, "--tag", "step-4")[1][0] == evaluated[2]
