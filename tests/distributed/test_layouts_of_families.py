"""Families that do what not all do, each in two layouts of two ranks or more, against one process.

Small, and of few steps: what a layout can get wrong of a mechanism shows in the first. `test_parity.py` has the long
runs, with every option, of a few.
"""

import pytest
from forked import run_ranks
from thorough import thorough

from fft.arguments import parse_arguments
from fft.models.in_process import write_random_model
from fft.models.small import small_config
from fft.models.table import config_of, has_windows
from fft.parity_reference import one_process
from fft.parity_run import faults, read_outcome
from fft.planning.preflight import plan_run

pytestmark = pytest.mark.slow
STEPS, BATCH, SEQ_LEN, RATE = 2, 4, 48, 1e-3
LAYOUTS = {
    "pipe": "--pipe_parallel_size=2 --gradient_accumulation_steps=4",
    "recomputed": "--pipe_parallel_size=2 --gradient_accumulation_steps=4 --checkpoint_grad_interval=1",
    "selective": "--pipe_parallel_size=2 --gradient_accumulation_steps=4 --checkpoint_grad_selective",
    "split": "--pipe_parallel_size=2 --gradient_accumulation_steps=4 --split_dlayer",
    "tensor": "--model_parallel_size=2 --gradient_accumulation_steps=4",
    "ring": "--sequence_parallel_size=2 --gradient_accumulation_steps=4",
    "ulysses": "--sequence_parallel_size=2 --ulysses_degree=2 --gradient_accumulation_steps=4",
    "experts": "--expert_parallel_size=2 --gradient_accumulation_steps=2",
    "both": "--model_parallel_size=2 --expert_parallel_size=2 --gradient_accumulation_steps=2",
    "data": "--gradient_accumulation_steps=2",
}
#: Those that a layout could get wrong in a way of their own. Where layers can have windows, they are of 4 tokens.
FAMILIES = {
    "afmoe": "experts selective",
    "apertus": "tensor recomputed",
    "cohere2": "tensor ring",
    "deepseek_v2": "tensor experts",
    "deepseek_v3": "experts ring",
    "diffllama": "split ring",
    "ernie4_5_moe": "tensor experts",
    "gemma2": "tensor ring ulysses",
    "gemma3_text": "recomputed ring",
    "glm4": "tensor pipe",
    "glm4_moe": "tensor experts",
    "gpt_neox": "tensor ring",
    "gpt_oss": "tensor both ulysses",
    "granite": "split ring",
    "granitemoeshared": "tensor experts",
    "granitemoe_swa": "tensor experts",
    "hunyuan_v1_dense": "tensor split",
    "jais2": "tensor recomputed",
    "laguna": "split experts",
    "mimo_v2_flash": "tensor ring",
    "minicpm3": "tensor ulysses",
    "mixtral": "experts recomputed",
    "olmo3": "ring tensor",
    "olmo_hybrid": "data pipe",
    "phi": "tensor ring",
    "phi3": "tensor ring",
    "qwen2_moe": "ring experts",
    "qwen3_next": "tensor experts",
    "starcoder2": "split tensor",
    "vaultgemma": "pipe tensor",
}


@pytest.fixture(scope="module")
def one(ragged_table, tmp_path_factory):
    """A family's directory, the flags of a run of it, and what one process does with both."""
    known = {}

    def of(family: str):
        if family not in known:
            folder = tmp_path_factory.mktemp("families") / family
            write_random_model(config_of(family), folder, seed=1)
            given = (
                f"--model {folder} --train_data {ragged_table} --seq_len {SEQ_LEN} --max_steps {STEPS} "
                f"--warmup_steps 1 --learning_rate {RATE} --max_grad_norm 0.5 --adam_epsilon 1e-5 --dtype fp32 --seed 3"
            ).split()
            args = parse_arguments([*given, "--gradient_accumulation_steps", str(BATCH), "--output_dir", f"{folder}/o"])
            known[family] = given, one_process(folder, args, plan_run(args, 1))
        return known[family]

    return of


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        (thorough if number else pytest.param)(family, layout)
        for family in FAMILIES
        for number, layout in enumerate(FAMILIES[family].split())
    ],
)
def test_a_family_in_a_layout_is_one_process(family, layout, one, tmp_path):
    given, expected = one(family)
    kept = ["--checkpoint", tmp_path / "run", "--save_steps", STEPS]
    done = run_ranks(4 if layout == "both" else 2, *given, *kept, *LAYOUTS[layout].split())
    assert done.returncode == 0, done.stderr[-3000:]
    assert faults(read_outcome(tmp_path / "run"), expected, RATE) == []


def test_enough_of_them_in_enough_layouts():
    assert len(FAMILIES) >= 20
    assert all(len(set(layouts.split())) >= 2 for layouts in FAMILIES.values())
    assert all(small_config(family).num_hidden_layers == 3 for family in FAMILIES)
    assert sum(has_windows(family) for family in FAMILIES) >= 10
