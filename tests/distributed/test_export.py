"""A model that goes through the trainer twice, in fp32: what one run exports is exactly what the next starts from.

``test_runs.py`` has the same for bf16 and for two pipeline stages.
"""

import json

import numpy as np
import pytest
from conftest import SMALL
from forked import run_ranks
from test_parity import read_metrics
from test_runs import SEQ_LEN, loss_of

from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ragged_table):
    """A folder with two runs, ``first`` from random weights, ``second`` from the model of ``first``."""
    folder = tmp_path_factory.mktemp("export")
    # The model directory has its own tokenizer; no flag names it.
    save_tokenizer(train_tokenizer(["def f(x):\n    return x\n"] * 3, 300), folder / "start")
    (folder / "start" / "config.json").write_text(json.dumps(SMALL | {"model_type": "qwen3", "vocab_size": 300}))
    for name, start in (("first", ["--init", "--model", folder / "start"]), ("second", ["--model", folder / "first"])):
        flags = (
            f"--train_data {ragged_table} --eval_data {ragged_table} --seq_len {SEQ_LEN} --max_steps 3 --dtype fp32 "
            f"--learning_rate 1e-2 --checkpoint {folder}/{name}-run --output_dir {folder}/{name}"
        )
        done = run_ranks(1, *start, *flags.split())
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["first", "second"])
def test_transformers_finds_the_reported_loss(runs, name, ragged_table):
    before, after = read_metrics(runs / f"{name}-run")[1]
    assert after != before  # three steps over random tokens: something moved, whichever way
    np.testing.assert_allclose(loss_of(runs / name, ragged_table), after, rtol=1e-5)


def test_the_next_run_starts_where_the_last_ended(runs):
    (_, ended), (started, _) = (read_metrics(runs / f"{name}-run")[1] for name in ("first", "second"))
    assert started == ended


@pytest.mark.parametrize("name", ["first", "second"])
def test_the_models_own_tokenizer_goes_along(runs, name):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (runs / name / file).read_bytes() == (runs / "start" / file).read_bytes()


def test_nothing_but_the_model_is_left(runs):
    assert sorted(path.name for path in runs.iterdir()) == ["first", "first-run", "second", "second-run", "start"]
