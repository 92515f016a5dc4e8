"""Flags of vision-language runs as ``jllm`` has them: towers in stages of their own, stages named by two numbers."""

import json

import numpy as np
import pytest
import torch
from forked import run_ranks
from image_tables import END, GRID_RULES, IMAGE, START, packed_rows, rows_table, write_rows
from transformers import AutoModelForImageTextToText
from vision_models import small_config

from fft.arguments import parse_arguments
from fft.models.in_process import LOSS, write_random_model
from fft.parity_reference import one_process
from fft.parity_run import NORM, OUTLIERS, WEIGHT
from fft.planning.preflight import plan_run
from fft.training.run_folder import METRICS

STEPS, SEQ_LEN, LR = 3, 128, 1e-3
#: The command of the README of ``jllm``, of 8 ranks; and fewer, of which the decoder's first and last have a number.
SEED = (
    "--pipe_parallel_size 8 --encoder_pipe_parallel_size 2 --partition_method 11,2 --split_dlayer "
    "--checkpoint_grad_interval 1 --only_ckpt_model --max_num_checkpoints 2"
)
FEWER = "--pipe_parallel_size 4 --encoder_pipe_parallel_size 1 --partition_method 5,3 --max_num_checkpoints 2"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Qwen3-VL, whose taps travel through stages, of 8 decoder layers and 6 of its tower."""
    folder, config = tmp_path_factory.mktemp("models") / "qwen3_vl", small_config("qwen3_vl", 400, layers=8)
    config.image_token_id, config.vision_start_token_id, config.vision_end_token_id = IMAGE, START, END
    write_random_model(config, folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def table(directory, tmp_path_factory):
    rows = packed_rows(np.random.default_rng(0), GRID_RULES, SEQ_LEN, 4 * STEPS)
    return write_rows(tmp_path_factory.mktemp("tables") / "images", rows_table(rows), GRID_RULES, SEQ_LEN).path


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layout", "stages"), [(8, SEED, "6-16"), (4, FEWER, "6-10")], ids=["seed", "fewer"])
def test_stages_equal_one_process(ranks, layout, stages, directory, table, tmp_path):
    """Losses, norms and weights; taps of the tower go through all of its stages and the first of the decoder."""
    given = (
        f"--model {directory} --train_data {table} --seq_len {SEQ_LEN} --max_steps {STEPS} --learning_rate {LR} "
        f"--adam_epsilon 1e-5 --dtype fp32 --gradient_accumulation_steps 4 --save_steps 1 {layout} --checkpoint"
    ).split()
    done = run_ranks(ranks, *given, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stderr.splitlines() if line.endswith(("  tower", "  decoder"))]
    assert next(row[1] for row in rows if row[-1] == "decoder") == stages
    args = parse_arguments([*given, str(tmp_path / "unused")])
    expected = one_process(directory, args, plan_run(args, ranks))
    told = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    steps = [line for line in told if "loss" in line]
    assert [step["loss"] for step in steps] == pytest.approx(expected.losses, rel=LOSS)
    assert [step["grad_norm"] for step in steps] == pytest.approx(expected.norms, rel=NORM)
    kept = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert kept == [f"step-{step}" for step in (STEPS - 1, STEPS)]
    written = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "run" / kept[-1], dtype=torch.float32, trust_remote_code=False
    )
    for name, value in written.state_dict().items():
        off = (value - expected.weights[name]).abs() > WEIGHT * (1 + expected.weights[name].abs())
        assert off.float().mean() <= OUTLIERS, name
