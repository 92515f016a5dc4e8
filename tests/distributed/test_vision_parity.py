"""Image chats in every layout against one process: transformers, a document at a time (fft/parity_reference.py)."""

import dataclasses
import os

import image_tables
import numpy as np
import pytest
from forked import run_ranks
from image_tables import document, rows_table, write_rows
from thorough import thorough
from vision_models import FAMILIES, small_config

from fft.arguments import parse_arguments
from fft.images.rules import ImageRules
from fft.models.in_process import write_random_model
from fft.parity_reference import one_process
from fft.parity_run import faults, read_outcome
from fft.planning.preflight import plan_run

STEPS, GLOBAL_BATCH, SEQ_LEN, LR = 5, 8, 64, 1e-3
GRID = ImageRules("qwen2_vl", 4, 2, 2, 151, 152, 153, min_pixels=64, max_pixels=640)
TILES = ImageRules("internvl", 4, 2, 1, 151, 152, 153, tile=16, min_tiles=1, max_tiles=3)

#: Family, ranks, flags. Stages of the tower's layers, cut where flops are even, or the tower on all ranks ("shared").
CASES = {
    "one": ("qwen2_vl", 1, "--per_device_train_batch_size 2 --gradient_accumulation_steps 4"),
    "pipe2": ("qwen2_5_vl", 2, "--pipe_parallel_size 2 --gradient_accumulation_steps 8"),
    "pipe2-interval1": (
        "internvl",
        2,
        "--pipe_parallel_size 2 --gradient_accumulation_steps 8 --checkpoint_grad_interval 1",
    ),
    "pipe2-data2-zero1-split": (
        "qwen3_vl",
        4,
        "--pipe_parallel_size 2 --gradient_accumulation_steps 4 --zero_stage 1 --split_dlayer",
    ),
    "pipe4-selective": (
        "qwen3_vl",
        4,
        "--pipe_parallel_size 4 --gradient_accumulation_steps 8 --checkpoint_grad_selective",
    ),
    "data4": ("internvl", 4, "--gradient_accumulation_steps 2"),
    "sequence2": ("qwen3_vl", 2, "--sequence_parallel_size 2 --gradient_accumulation_steps 8"),
    "pipe2-sequence2": (
        "qwen2_vl",
        4,
        "--pipe_parallel_size 2 --sequence_parallel_size 2 --gradient_accumulation_steps 8 --ulysses_degree 2",
    ),
    "tensor2": ("qwen2_5_vl", 2, "--model_parallel_size 2 --gradient_accumulation_steps 8"),
    "pipe2-tensor2": ("qwen3_vl", 4, "--pipe_parallel_size 2 --model_parallel_size 2 --gradient_accumulation_steps 8"),
    "frozen-tower": ("qwen3_vl", 2, "--pipe_parallel_size 2 --gradient_accumulation_steps 8 --freeze=visual\\."),
    "frozen-text": ("qwen2_vl", 2, "--pipe_parallel_size 2 --gradient_accumulation_steps 8 --freeze=^lm_head,language"),
    "lora": ("qwen3_vl", 2, "--pipe_parallel_size 2 --gradient_accumulation_steps 8 --lora_dim 4 --lora_dropout=0.2"),
    "experts-tensor2": (
        "qwen3_vl_moe",
        4,
        "--model_parallel_size 2 --expert_parallel_size 2 --gradient_accumulation_steps 4",
    ),
    "lora-both": (
        "internvl",
        2,
        "--pipe_parallel_size 2 --gradient_accumulation_steps 8 --lora_dim 4 "
        "--lora_module_name=q_proj,vision_tower.q_proj,vision_tower.fc2,multi_modal_projector.linear_1",
    ),
    "ragged": ("qwen2_5_vl", 2, "--pipe_parallel_size 2 --gradient_accumulation_steps 8 --ragged --pack best-fit"),
}
#: Where the tower is; the second is the default.
PLACES = {"staged": "--encoder_pipe_parallel_size=-1", "shared": "--encoder_pipe_parallel_size=0"}
#: Where a tower in stages shows nothing that the other cases do not.
SHARED_ALONE = ("one", "data4", "sequence2", "tensor2", "pipe2-tensor2", "frozen-text", "lora", "lora-both")
SHARED_ALONE += ("experts-tensor2",)
#: What of it `make test` tries.
SOON = {("pipe2", "staged"), ("pipe2-data2-zero1-split", "staged"), ("frozen-tower", "staged"), ("ragged", "staged")}
SOON |= {(name, "shared") for name in ("one", "sequence2", "tensor2", "experts-tensor2", "lora-both")}
TRIED = [
    (CASES[name][0], name, place) for name in CASES for place in PLACES if place == "shared" or name not in SHARED_ALONE
]
if os.environ.get("FFT_VISION_LAYOUTS") == "all":  # minutes: every family in every layout that names no module of one
    TRIED += [
        (family, name, place)
        for family in (*FAMILIES, "qwen3_vl_moe")
        for name in CASES
        for place in PLACES
        if (family, name, place) not in TRIED and not name.startswith(("frozen", "lora", "experts"))
        # The experts' balance is that of a micro-batch: the reference's have one sample.
        if (family, name) != ("qwen3_vl_moe", "one")
    ]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A directory of each family, in fp32."""
    made = {}

    def of(family):
        if family not in made:
            config = small_config(family)
            for part in (config.text_config, config.vision_config):
                part.initializer_range = 0.2
            made[family] = tmp_path_factory.mktemp("models") / family
            write_random_model(config, made[family], seed=1)
        return made[family]

    return of


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    """Rows packed to SEQ_LEN, of chats with 0 to 3 images and of texts alone."""
    made = {}

    def of(rules):
        if rules.family not in made:
            rows = rows_of(np.random.default_rng(0), rules, 36)
            made[rules.family] = tmp_path_factory.mktemp("tables") / rules.family
            write_rows(made[rules.family], rows_table(rows), rules, seq_len=SEQ_LEN)
        return made[rules.family]

    return of


def rows_of(rng, rules, count):
    """Rows in which every third document is a text, and every fourth row all texts."""
    rows = []
    for number in range(count):
        row, left = [], SEQ_LEN
        while left > 8:
            made = document(rng, rules, number % 40, most_images=0 if number % 4 == 3 or len(row) % 3 == 2 else 3)
            if len(made.ids) > left:
                break
            row.append(made)
            left -= len(made.ids)
        rows.append(row or [document(rng, rules, number % 40, most_images=0)])
    return rows


@pytest.fixture(autouse=True, scope="module")
def tokens():
    """The image's tokens of these models."""
    before = image_tables.IMAGE, image_tables.START, image_tables.END
    image_tables.IMAGE, image_tables.START, image_tables.END = 151, 152, 153
    yield
    image_tables.IMAGE, image_tables.START, image_tables.END = before


def rules_of(family):
    return TILES if family == "internvl" else dataclasses.replace(GRID, family=family)


def flags(model, table, output):
    return (
        f"--model {model} --train_data {table} --eval_data {table} --seq_len {SEQ_LEN} --max_steps {STEPS} "
        f"--learning_rate {LR} --min_learning_rate {LR / 2} --warmup_steps 2 --max_grad_norm 0.5 "
        f"--adam_epsilon 1e-5 --dtype fp32 --seed 3 --save_steps {STEPS} "
        f"--output_dir {output}/model --checkpoint {output}/run"
    ).split()


@pytest.fixture(scope="session")
def reference(models, tables, tmp_path_factory):
    """What the plain loop does, by family and flags that say what is trained."""
    known = {}

    def of(family, *which):
        if (family, *which) not in known:
            given = flags(models(family), tables(rules_of(family)), tmp_path_factory.mktemp("unused"))
            args = parse_arguments([*given, *which, "--gradient_accumulation_steps", str(GLOBAL_BATCH)])
            known[family, *which] = one_process(models(family), args, plan_run(args, 1))
        return known[family, *which]

    return of


@pytest.mark.parametrize(
    ("family", "name", "place"),
    [(pytest.param if case[1:] in SOON else thorough)(*case) for case in TRIED],
)
def test_a_layout_computes_what_one_process_does(family, name, place, models, tables, reference, tmp_path):
    _, ranks, extra = CASES[name]
    given = flags(models(family), tables(rules_of(family)), tmp_path)
    words = [*extra.split(), PLACES[place]]
    done = run_ranks(ranks, *given, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    which = [
        w
        for i, w in enumerate(words)
        if w.startswith(("--freeze", "--lora", "--ragged", "--pack")) or words[i - 1] in ("--lora_dim", "--pack")
    ]
    expected = reference(family, *which)
    found = read_outcome(tmp_path / "run")
    assert not faults(found, expected, LR)
