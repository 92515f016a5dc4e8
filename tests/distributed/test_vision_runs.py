"""Runs on images: they go on to the bit, train on texts beside, and leave directories that transformers reads."""

import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_table
from forked import run_ranks, started
from image_tables import rows_table, write_rows
from in_process import run_here
from safetensors import safe_open
from safetensors.torch import load_file
from test_parity import read_metrics
from test_resume import outcome
from test_vision_parity import LR, SEQ_LEN, flags, models, rows_of, rules_of, tables, tokens  # noqa: F401 - fixtures
from thorough import thorough
from transformers import AutoModelForImageTextToText

from fft.arguments import parse_arguments
from fft.checkpoint.convert import cli
from fft.parity_reference import one_process
from fft.parity_run import faults, read_outcome
from fft.planning.preflight import plan_run

pytestmark = pytest.mark.slow
#: The second half of the run begins in the middle of an epoch.
STEPS, HALF = 6, 3
ADAPTERS = ["--lora_dim=4", "--lora_module_name=q_proj,vision_tower.q_proj"]
STAGED, SHARED = "--encoder_pipe_parallel_size=-1", "--encoder_pipe_parallel_size=0"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A table without images."""
    rng = np.random.default_rng(3)
    rows = [rng.integers(0, 150, rng.integers(5, 60)).astype(np.int32) for _ in range(60)]
    return write_table(tmp_path_factory.mktemp("texts") / "table", rows)


@pytest.fixture(scope="module")
def run(models, tables):  # noqa: F811
    def of(family, ranks, output, *more):
        given = flags(models(family), tables(rules_of(family)), output)
        done = run_ranks(ranks, *given, "--max_steps", STEPS, "--save_steps", HALF, "--overwrite", *more)
        assert done.returncode == 0, done.stderr[-3000:]
        return outcome(output)

    return of


@pytest.mark.parametrize(
    ("family", "ranks", "more"),
    [
        thorough("qwen3_vl", 2, ["--pipe_parallel_size=2", "--gradient_accumulation_steps=8", "--dtype=bf16", SHARED]),
        ("qwen2_5_vl", 2, ["--pipe_parallel_size=2", "--gradient_accumulation_steps=8", "--dtype=bf16", STAGED]),
        thorough("internvl", 2, ["--sequence_parallel_size=2", "--gradient_accumulation_steps=8", SHARED]),
        ("internvl", 2, ["--pipe_parallel_size=2", "--gradient_accumulation_steps=8", SHARED, *ADAPTERS]),
    ],
)
def test_on_the_same_layout_to_the_bit(family, ranks, more, run, tmp_path):
    numbers, evaluated, weights = run(family, ranks, tmp_path / "straight", *more)
    shutil.copytree(tmp_path / "straight" / "run", tmp_path / "again" / "run")
    again = run(family, ranks, tmp_path / "again", *more, "--resume", f"step-{HALF}")
    np.testing.assert_array_equal(again[0], numbers)
    assert again[1] == evaluated
    assert all(torch.equal(again[2][name], value) for name, value in weights.items())


def test_experts_go_on_and_are_converted_from_their_masters(run, tmp_path):
    """Files have rows and columns of experts swapped, the optimizer has not."""
    experts = ["--expert_parallel_size=2", "--gradient_accumulation_steps=4", "--dtype=bf16"]
    numbers, _, stored = run("qwen3_vl_moe", 2, tmp_path / "straight", *experts)
    shutil.copytree(tmp_path / "straight" / "run", tmp_path / "again" / "run")
    again, _, weights = run("qwen3_vl_moe", 2, tmp_path / "again", *experts, "--resume", f"step-{HALF}")
    np.testing.assert_array_equal(again, numbers)
    assert all(torch.equal(weights[name], value) for name, value in stored.items())
    done = run_here(cli, tmp_path / "straight" / "run", tmp_path / "fp32", "--dtype", "fp32")
    assert done.returncode == 0, done.stderr[-2000:]
    masters = load_file(tmp_path / "fp32" / "model.safetensors")
    assert masters.keys() == stored.keys()
    assert all(torch.equal(masters[name].bfloat16(), value) for name, value in stored.items())
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    assert stored[name].shape == (4, 64, 96)
    assert not torch.equal(masters[name], stored[name].float())


def test_from_a_shared_tower_to_stages_and_back(run, tmp_path):
    common = ["--pipe_parallel_size=2", "--gradient_accumulation_steps=8"]
    numbers, _, _ = run("qwen3_vl", 2, tmp_path / "straight", *common, SHARED)
    shutil.copytree(tmp_path / "straight" / "run", tmp_path / "again" / "run")
    again, _, _ = run("qwen3_vl", 2, tmp_path / "again", *common, STAGED, "--resume", f"step-{HALF}")
    np.testing.assert_allclose(again[:, :3], numbers[:, :3], rtol=1e-5)
    shutil.rmtree(tmp_path / "again" / "run" / f"step-{STEPS}")
    once_more, _, _ = run("qwen3_vl", 1, tmp_path / "again", "--gradient_accumulation_steps=8", "--resume", "auto")
    np.testing.assert_allclose(once_more[:, :3], numbers[:, :3], rtol=1e-5)


def test_a_killed_run_goes_on_as_if_nothing_had_been(run, models, tables, tmp_path):  # noqa: F811
    """Killed at ten moments, some of them before there is anything to go on from."""
    more = ["--pipe_parallel_size=2", "--gradient_accumulation_steps=8", "--save_steps=1", "--resume=auto"]
    numbers, _, weights = run("qwen2_vl", 2, tmp_path / "straight", *more)
    output, dice = tmp_path / "killed", random.Random(1)
    given = [*flags(models("qwen2_vl"), tables(rules_of("qwen2_vl")), output), f"--max_steps={STEPS}", "--overwrite"]
    for _ in range(10):
        with started(2, *given, *more) as (processes, _):
            time.sleep(dice.uniform(1, 5))
            victim = dice.choice(processes)
            victim.kill()
            victim.join()
    ended = run("qwen2_vl", 2, output, *more)
    assert victim.exitcode in (-signal.SIGKILL, 0)
    np.testing.assert_array_equal(ended[0][-1], numbers[-1])
    assert all(torch.equal(ended[2][name], value) for name, value in weights.items())


def compare(ranks, given, *more):
    """Of a run of so many ranks, what one process does."""
    args = parse_arguments([*given, "--gradient_accumulation_steps=8"])
    expected = one_process(args.model, args, plan_run(args, 1))
    done = run_ranks(ranks, *given, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not faults(read_outcome(Path(args.checkpoint)), expected, LR)


@pytest.mark.parametrize("family", ["qwen2_vl", thorough("qwen2_5_vl"), thorough("qwen3_vl"), "internvl"])
@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, ["--pipe_parallel_size=2", "--gradient_accumulation_steps=8"]),
        (2, ["--model_parallel_size=2", "--gradient_accumulation_steps=8"]),
    ],
    ids=["pipe2", "tensor2"],
)
def test_texts_train_the_decoder_and_leave_the_tower(family, ranks, more, models, texts, tmp_path):  # noqa: F811
    given = flags(models(family), texts, tmp_path)
    compare(ranks, given, *more)


def test_images_and_texts_side_by_side(models, tables, texts, tmp_path):  # noqa: F811
    given = flags(models("qwen2_vl"), tables(rules_of("qwen2_vl")), tmp_path)
    given += ["--train_data", f"{tables(rules_of('qwen2_vl'))}:0.5 {texts}:0.5", "--pack=best-fit"]
    compare(2, given, "--pipe_parallel_size=2", "--gradient_accumulation_steps=8")


def test_steps_without_an_image_at_all(models, tmp_path):  # noqa: F811
    """The table says that it has images; of the first steps' rows none has one, on any replica."""
    rules, rng = rules_of("qwen3_vl"), np.random.default_rng(5)
    rows = [[made for made in row if not made.files] or rows_of(rng, rules, 4)[3] for row in rows_of(rng, rules, 40)]
    rows[-1] = rows_of(rng, rules, 1)[0]
    write_rows(tmp_path / "table", rows_table(rows), rules, seq_len=SEQ_LEN)
    given = flags(models("qwen3_vl"), tmp_path / "table", tmp_path)
    compare(4, given, "--pipe_parallel_size=2", "--gradient_accumulation_steps=4")


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl"])
def test_what_is_written_has_the_names_of_the_hub(family, run, models, tmp_path):  # noqa: F811
    run(family, 2, tmp_path, "--pipe_parallel_size=2", "--gradient_accumulation_steps=8")
    names = {}
    for folder in (tmp_path / "model", models(family)):
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                names.setdefault(folder, set()).update(tensors.keys())
    assert len(set(map(frozenset, names.values()))) == 1
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", output_loading_info=True, trust_remote_code=False
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert read_metrics(tmp_path / "run")[0][-1]["step"] == STEPS
    assert type(loaded).__name__ == loaded.config.architectures[0]
