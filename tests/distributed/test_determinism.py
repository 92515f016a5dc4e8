"""Random initial weights depend on the seed and a parameter's name alone: not on the layout.

Equal losses for equal seeds over a whole run are tested in ``test_runs.py``.
"""

import json

import numpy as np
import pytest
import torch
from conftest import SMALL
from forked import run_ranks
from test_parity import read_metrics
from transformers import AutoModelForCausalLM

LAYOUTS = {
    "one": (1, "--gradient_accumulation_steps 4"),
    "pipe2": (2, "--gradient_accumulation_steps 4 --pipe_parallel_size 2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ragged_table):
    """One step from random weights in each layout, at a learning rate of 0: what is exported is what was drawn."""
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama", "tie_word_embeddings": True}))
    for name, (ranks, extra) in LAYOUTS.items():
        output = folder / name
        flags = (
            f"--init --model {folder}/config.json --train_data {ragged_table} --eval_data {ragged_table} --seq_len 64 "
            f"--max_steps 1 --learning_rate 0 --seed 5 --dtype fp32 --checkpoint {output}/run "
            f"--output_dir {output}/model"
        )
        done = run_ranks(ranks, *flags.split(), *extra.split())
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_layouts_start_at_the_same_loss(runs):
    (one, two), (before, after) = zip(*(read_metrics(runs / name / "run") for name in LAYOUTS), strict=True)
    np.testing.assert_allclose(before, after, rtol=1e-6)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(one[0][name], two[0][name], rtol=1e-6)


def test_a_learning_rate_of_zero_changes_nothing(runs):
    for name in LAYOUTS:
        before, after = read_metrics(runs / name / "run")[1]
        assert before == after


def test_layouts_start_from_the_same_weights(runs):
    one, two = (AutoModelForCausalLM.from_pretrained(runs / name / "model").state_dict() for name in LAYOUTS)
    assert set(one) == set(two)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    layers = [value for name, value in one.items() if name.endswith("mlp.down_proj.weight")]
    assert not torch.equal(layers[0], layers[1])
