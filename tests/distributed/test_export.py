"""A model that goes through the trainer twice, in fp32: what one run exports is exactly what the next starts from.

``test_runs.py`` has the same for bf16 and for two pipeline stages.
"""

import json

import numpy as np
import pytest
import torch
from conftest import SMALL
from forked import run_ranks
from safetensors.torch import load_file, save_file
from test_parity import read_metrics
from test_runs import SEQ_LEN, loss_of
from transformers import AutoConfig

from fft.checkpoint.folder import fault
from fft.models.in_process import write_random_model
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


@pytest.fixture(scope="module")
def hard(tmp_path_factory, ragged_table):
    """A model with all that is easily lost: stored buffers, FP8, a head of its own that the config ties, more than
    one chat template; trained for three steps and evaluated before and after."""
    folder = tmp_path_factory.mktemp("hard")
    start = folder / "start"
    write_random_model(AutoConfig.for_model("apertus", **SMALL, pad_token_id=0), start, 0)
    weights = load_file(start / "model.safetensors")
    for layer in range(SMALL["num_hidden_layers"]):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        weights[f"model.layers.{layer}.mlp.act_fn.beta"] += 0.25
        weights[name], weights[f"{name}_scale_inv"] = weights[name].to(torch.float8_e4m3fn), torch.full((4, 2), 0.5)
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    config = json.loads((start / "config.json").read_text())
    changes = {"tie_word_embeddings": True, "quantization_config": fp8, "architectures": None}
    (start / "config.json").write_text(json.dumps(config | changes))
    save_tokenizer(train_tokenizer(["ab"], 258), folder / "tokenizer")
    for name in TEMPLATES:
        (folder / "tokenizer" / name).parent.mkdir(exist_ok=True)
        (folder / "tokenizer" / name).write_text("{{ messages }}")
    flags = (
        f"--model {start} --tokenizer {folder}/tokenizer --train_data {ragged_table} --eval_data {ragged_table} "
        f"--seq_len {SEQ_LEN} --max_steps 3 --save_steps 3 --dtype fp32 --learning_rate 1e-2 --pipe_parallel_size 2 "
        f"--checkpoint {folder}/run --output_dir {folder}/model"
    )
    done = run_ranks(2, *flags.split())
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


TEMPLATES = ["chat_template.jinja", "additional_chat_templates/tools.jinja"]


def test_a_hard_model_starts_and_ends_with_the_loss_of_transformers(hard, ragged_table):
    before, after = read_metrics(hard / "run")[1]
    np.testing.assert_allclose(loss_of(hard / "start", ragged_table), before, rtol=1e-5)
    np.testing.assert_allclose(loss_of(hard / "model", ragged_table), after, rtol=1e-5)


@pytest.mark.parametrize("written", ["model", "run/step-3"])
def test_nothing_of_a_hard_model_is_lost(hard, written):
    weights, stored = {}, load_file(hard / "start" / "model.safetensors")
    for file in (hard / written).glob("*.safetensors"):
        weights |= load_file(file)
    buffers = [name for name in weights if name.endswith((".beta", ".eps"))]
    assert len(buffers) == 2 * SMALL["num_hidden_layers"]
    assert all(torch.equal(weights[name], stored[name]) for name in buffers)
    assert set(weights) == {name for name in stored if not name.endswith("_scale_inv")}
    config = json.loads((hard / written / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["tie_word_embeddings"], config["architectures"]) == (False, ["ApertusForCausalLM"])
    assert all((hard / written / name).read_text() == "{{ messages }}" for name in TEMPLATES)


def test_all_files_of_a_hard_checkpoint_have_checksums(hard):
    assert fault(hard / "run" / "step-3") is None
    assert all(f"  {name}\n" in (hard / "run" / "step-3" / "SHA256SUMS").read_text() for name in TEMPLATES)
