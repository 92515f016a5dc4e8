"""Flags of vision-language runs as ``jllm`` has them: towers in stages of their own, stages named by two numbers."""

import numpy as np
import pytest
from forked import run_ranks
from image_tables import END, GRID_RULES, IMAGE, START, packed_rows, rows_table, write_rows
from vision_models import small_config

from fft.arguments import parse_arguments
from fft.models.in_process import write_random_model
from fft.parity_reference import one_process
from fft.parity_run import faults, read_outcome
from fft.planning.preflight import plan_run

STEPS, SEQ_LEN, LR = 3, 128, 1e-3
#: The command of the README of ``jllm``: 8 ranks.
SEED = (
    "--pipe_parallel_size 8 --encoder_pipe_parallel_size 2 --partition_method 11,2 --split_dlayer "
    "--checkpoint_grad_interval 1"
)
ONLY_MODEL = "--only_ckpt_model --max_num_checkpoints 2 --save_steps 1"


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
@pytest.mark.parametrize(("ranks", "layout"), [(8, SEED)], ids=["seed"])
def test_stages_equal_one_process(ranks, layout, directory, table, tmp_path):
    given = (
        f"--model {directory} --train_data {table} --seq_len {SEQ_LEN} --max_steps {STEPS} --learning_rate {LR} "
        f"--adam_epsilon 1e-5 --dtype fp32 --gradient_accumulation_steps 4 --checkpoint {tmp_path}/run {layout}"
    ).split()
    done = run_ranks(ranks, *given, "--save_steps", STEPS)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stderr[:3000])
    args = parse_arguments([*given, "--save_steps", str(STEPS)])
    assert faults(read_outcome(tmp_path / "run"), one_process(directory, args, plan_run(args, ranks)), LR) == []
