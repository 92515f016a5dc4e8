"""Folders that an interrupted run leaves behind are never taken for checkpoints. See also ``test_runs.py``."""

import json
import math
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import SMALL
from forked import run_ranks
from safetensors.torch import load_file, save_file
from test_parity import read_metrics
from test_runs import loss_of

from fft.arguments import parse_arguments
from fft.checkpoint.folder import checkpoint_steps, read_state
from fft.errors import UserError
from fft.files import staging_folder
from fft.planning.preflight import plan_run

FLAGS = "--seq_len 64 --dtype fp32"


@pytest.fixture(scope="module")
def run(tmp_path_factory, ragged_table):
    """The folder of a run that was started again where a former one had been killed while writing."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    run = folder / "run"
    # The staging folders of two checkpoints, and folders with a checkpoint's name but no config.json.
    for leftover in (staging_folder(run / "step-2"), staging_folder(run / "step-90"), run / "step-4", run / "step-80"):
        leftover.mkdir(parents=True)
        (leftover / "model-00001-of-00007.safetensors").write_bytes(b"half a shard")
    (staging_folder(run / "step-90") / "config.json").write_text((folder / "config.json").read_text())
    flags = (
        f"--init --model {folder}/config.json --train_data {ragged_table} --eval_data {ragged_table} {FLAGS} "
        f"--max_steps 4 --learning_rate 1e-2 --save_steps 1 --eval_steps 1 --only_ckpt_model --max_num_checkpoints 3 "
        f"--checkpoint {run} --overwrite"
    )
    done = run_ranks(1, *flags.split())
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def start_from(run, *flags):
    """The plan of a run that starts from a checkpoint; nothing is started."""
    given = ["--from_ckpt", run, "--output_dir", run.parent / "unwritten", *FLAGS.split(), "--num_train_epochs", 0]
    return plan_run(parse_arguments([str(part) for part in (*given, *flags)]), 1)


def test_the_newest_are_kept(run):
    assert checkpoint_steps(run) == [2, 3, 4]


@pytest.mark.parametrize("step", [2, 3, 4])
def test_checkpoints_hold_the_weights_of_their_step(run, step, ragged_table):
    """Also those over whose name something half-written lay."""
    evaluated = read_metrics(run)[1][step]
    assert loss_of(run / f"step-{step}", ragged_table) == pytest.approx(evaluated, rel=1e-5)
    assert sorted(path.name for path in (run / f"step-{step}").iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
        "training",
    ]


def test_the_newest_checkpoint_is_a_whole_one(run):
    tags = ([], ["--tag", "step-4"], ["--tag", "step-2"])
    newest, last, older = (start_from(run, *tag).weights.read("model.norm.weight", torch.Size([32])) for tag in tags)
    assert torch.equal(newest, last)
    assert not torch.equal(newest, older)


@pytest.mark.parametrize("tag", ["step-1", "step-80", ".step-90.writing"])
def test_what_is_no_checkpoint_is_refused_by_name(run, tag):
    with pytest.raises(UserError) as raised:
        start_from(run, "--tag", tag)
    assert f"{run / tag} is no checkpoint; {run} holds: step-2, step-3, step-4" in str(raised.value)


def test_the_best_is_kept_besides_the_newest(run, ragged_table, tmp_path):
    """At a rate at which the loss soon rises again."""
    flags = (
        f"--init --model {run.parent}/config.json --train_data {ragged_table} --eval_data {ragged_table} {FLAGS} "
        f"--max_steps 8 --learning_rate 3 --lr_scheduler_type linear --warmup_steps 8 --save_steps 1 "
        f"--max_num_checkpoints 2 --best_of 1 --checkpoint {tmp_path}/run"
    )
    done = run_ranks(1, *flags.split())
    assert done.returncode == 0, done.stderr[-3000:]
    evaluated = read_metrics(tmp_path / "run")[1][1:]  # without that before the first step
    assert len(evaluated) == 8
    best = evaluated.index(min(evaluated)) + 1
    assert best < 7, evaluated
    assert checkpoint_steps(tmp_path / "run") == [best, 7, 8]
    assert read_state(tmp_path / "run" / f"step-{best}")["eval_loss"] == min(evaluated)
    assert (tmp_path / "run" / "best").read_text() == f"step-{best}\n"
    assert start_from(tmp_path / "run", "--tag", "best").weights.directory.name == f"step-{best}"


def test_a_run_ends_early_and_does_so_again_when_resumed(run, ragged_table, tmp_path):
    """At the same rate, after two evaluations without improvement; the second run goes on from one before the end."""
    flags = (
        f"--init --model {run.parent}/config.json --train_data {ragged_table} --eval_data {ragged_table} {FLAGS} "
        f"--max_steps 20 --learning_rate 3 --lr_scheduler_type linear --warmup_steps 8 --save_steps 1 --eval_steps 1 "
        f"--early_stop_patience 2 --resume auto --overwrite"
    )
    first, again = tmp_path / "first", tmp_path / "again"

    def train(folder, *more):
        done = run_ranks(1, *flags.split(), "--checkpoint", folder, "--output_dir", f"{folder}-model", *more)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr, read_metrics(folder)[1]

    said, evaluated = train(first)
    best = evaluated.index(min(evaluated))
    assert len(evaluated) == best + 3  # the first of them before the first step
    assert f"stopped early after step {best + 2}/20: 2 evaluations" in said
    lowest, last = (f"{loss:.4f} (perplexity {math.exp(loss):.4g})" for loss in (min(evaluated), evaluated[-1]))
    where = f"lowest {lowest} at step {best}, {first / f'step-{best}'}; last {last} at step {best + 2}, "
    assert f"validation loss: {where}{first / f'step-{best + 2}'}\n" in said
    drawn = ElementTree.parse(first / "loss.svg").getroot()
    assert len(drawn.findall("{http://www.w3.org/2000/svg}circle")) == len(evaluated)
    assert len(drawn.findall("{http://www.w3.org/2000/svg}polyline")) == 1
    # What is written is not what was trained last.
    assert loss_of(f"{first}-model", ragged_table) == pytest.approx(min(evaluated), rel=1e-5)
    assert f"# llama, trained to step {best}\n" in Path(f"{first}-model", "README.md").read_text()
    assert (first / "best").read_text() == f"step-{best}\n"
    assert f"model of step-{best}, which had the lowest validation loss, written to {first}-model" in said

    again.mkdir()
    shutil.copytree(first / f"step-{best + 1}", again / f"step-{best + 1}")
    shutil.copy(first / "metrics.jsonl", again)
    assert train(again)[1] == evaluated
    said, unchanged = train(first)  # which has ended
    assert unchanged == evaluated
    assert f"stopped early after step {best + 2}/20" in said
    said, from_best = train(first, "--resume", "best")  # it trains the steps after the best one again, to the same end
    assert f"going on from {first / f'step-{best}'}\n" in said
    assert from_best == evaluated


def test_a_run_without_checkpoints_writes_its_best_model(run, ragged_table, tmp_path):
    flags = (
        f"--init --model {run.parent}/config.json --train_data {ragged_table} --eval_data {ragged_table} {FLAGS} "
        f"--max_steps 20 --learning_rate 3 --lr_scheduler_type linear --warmup_steps 8 --eval_steps 1 "
        f"--early_stop_patience 2 --output_dir {tmp_path}/model"
    )
    done = run_ranks(1, *flags.split())
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(found) for found in re.findall(r"validation loss ([0-9.]+) over", done.stderr)]
    assert losses[-1] > min(losses) + 0.01
    assert loss_of(tmp_path / "model", ragged_table) == pytest.approx(min(losses), rel=1e-4)
    assert f"| validation loss | {min(losses):.4f} (perplexity " in (tmp_path / "model" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_finished_run_may_be_started_once_more(run, ragged_table, tmp_path):
    """As a scheduler does that does not know; its last steps, which --save_steps does not divide, have a checkpoint."""
    flags = (
        f"--init --model {run.parent}/config.json --train_data {ragged_table} {FLAGS} --max_steps 5 --save_steps 2 "
        f"--checkpoint {tmp_path}/run --output_dir {tmp_path}/model --resume auto"
    )
    for _ in range(2):
        done = run_ranks(1, *flags.split())
        assert done.returncode == 0, done.stderr[-3000:]
        assert checkpoint_steps(tmp_path / "run") == [2, 4, 5]
    assert f"going on from {tmp_path / 'run' / 'step-5'}" in done.stderr
    file = tmp_path / "model" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)  # somebody else's
    done = run_ranks(1, *flags.split())
    assert done.returncode == 2
    assert f"--output_dir {tmp_path / 'model'} exists and is not empty" in done.stderr


def test_converting_keeps_the_type(run, tmp_path):
    """bf16 only where it is asked for."""
    given = ["--from_ckpt", run, "--num_train_epochs", 0, "--output_dir", tmp_path / "model"]
    assert parse_arguments([str(part) for part in given]).dtype == "fp32"
    assert parse_arguments([str(part) for part in (*given, "--tag", "step-2")]).dtype == "fp32"
    assert parse_arguments([str(part) for part in (*given, "--dtype", "bf16")]).dtype == "bf16"
    trains = [*given[:2], "--train_data", "t", *given[4:]]
    assert parse_arguments([str(part) for part in trains]).dtype == "bf16"
