"""A run that stops and goes on is the run that never stopped: to the bit on one layout, to 1e-5 across layouts."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_parity import FAMILIES, LAYOUTS, command, flags, model_dir, read_metrics  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
#: Steps of the straight run, and the step after which another one goes on. An epoch of the table ends within step 13.
STEPS, HALF = 10, 5
#: Of the same global batch as ``data2``: two replicas more.
DATA4 = ("torchrun", 4, "--gradient_accumulation_steps 2")


@pytest.fixture(scope="module")
def train(launch, model_dir, ragged_table):  # noqa: F811
    def run(output, family, layout, *more):
        launcher, ranks, extra = DATA4 if layout == "data4" else LAYOUTS[layout]
        given = [*flags(model_dir(family), ragged_table, output), *extra.split(), "--max_steps", STEPS]
        done = launch(*command(launcher, ranks), *given, "--save_steps", HALF, "--eval_steps", 3, *more)
        assert done.returncode == 0, done.stderr[-3000:]
        return outcome(output)

    return run


def outcome(output):
    """Losses and norms of the steps, evaluations, and the final weights."""
    steps, evaluated = read_metrics(output / "run")
    numbers = [(s["step"], s["loss"], s["grad_norm"], s["lr"]) for s in steps]
    tensors = {}
    for file in sorted((output / "model").glob("*.safetensors")):
        tensors |= load_file(file)
    return np.array(numbers), evaluated, tensors


@pytest.fixture(scope="module")
def straight(tmp_path_factory, train):
    """Runs without a stop, by family, layout and type; each leaves the checkpoint of its half."""
    known = {}

    def of(family, layout, dtype):
        key = (family, layout, dtype)
        if key not in known:
            output = tmp_path_factory.mktemp("-".join(key))
            known[key] = (output, train(output, *key[:2], "--dtype", dtype))
        return known[key]

    return of


def go_on(train, straight_output, output, family, layout, dtype, *more):
    """Go on from the middle of a straight run in a copy of its folder."""
    shutil.copytree(straight_output / "run", output / "run")
    return train(output, family, layout, "--dtype", dtype, "--resume", f"step-{HALF}", "--overwrite", *more)


@pytest.mark.parametrize(
    ("family", "layout", "dtype", "executor"),
    [
        ("llama", "one", "fp32", "none"),
        ("llama", "one", "bf16", "process"),
        ("llama", "data2", "bf16", "thread"),
        ("qwen2-tied", "pipe2", "bf16", "thread"),
        ("qwen2-tied", "pipe2-data2", "fp32", "process"),
        ("llama", "sequence2", "fp32", "thread"),
        ("llama", "pipe2-split-recompute", "bf16", "thread"),
    ],
)
def test_on_the_same_layout_to_the_bit(family, layout, dtype, executor, straight, train, tmp_path):
    output, (numbers, evaluated, weights) = straight(family, layout, dtype)
    again = go_on(train, output, tmp_path, family, layout, dtype, "--background_executor", executor)
    np.testing.assert_array_equal(again[0], numbers)
    assert again[1] == evaluated
    assert again[2].keys() == weights.keys()
    assert all(torch.equal(again[2][name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("qwen2-tied", "pipe2-data2", "one"),
        ("llama", "one", "pipe2-split-recompute"),
        ("llama", "data2", "data4"),
        ("llama", "sequence2", "one"),
        ("llama", "one", "sequence2"),
        ("llama", "data2", "pipe2"),
    ],
)
def test_on_another_layout(family, before, after, straight, train, tmp_path):
    output, (numbers, evaluated, weights) = straight(family, before, "fp32")
    again = go_on(train, output, tmp_path, family, after, "fp32")
    np.testing.assert_array_equal(again[0][:HALF], numbers[:HALF])
    np.testing.assert_allclose(again[0][:, :2], numbers[:, :2], rtol=1e-5)
    np.testing.assert_allclose(again[0][:, 2], numbers[:, 2], rtol=1e-4)
    np.testing.assert_allclose(again[1], evaluated, rtol=1e-5)
    assert again[2].keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(again[2][name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def converted(launch, source, output, *more):
    done = launch("python", "-m", "fft.checkpoint.convert", source, output, *more)
    assert done.returncode == 0, done.stderr
    tensors = {}
    for file in sorted(output.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def test_a_checkpoint_converts_in_its_own_type_and_from_the_masters(straight, launch, tmp_path):
    output, (_, _, weights) = straight("llama", "data2", "bf16")
    stored = converted(launch, output / "run", tmp_path / "stored")
    masters = converted(launch, output / "run", tmp_path / "masters", "--dtype", "fp32")
    assert stored.keys() == masters.keys() == weights.keys()
    assert all(torch.equal(stored[name], value) for name, value in weights.items())
    assert all(torch.equal(masters[name].bfloat16(), value) for name, value in weights.items())
    assert not any(torch.equal(masters[name], value.float()) for name, value in weights.items() if value.ndim == 2)
    AutoModelForCausalLM.from_pretrained(output / "run" / f"step-{STEPS}")  # a checkpoint needs no conversion


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["one", "pipe2-split-recompute", "pipe2-sequence2"])
def test_from_hugging_face_and_back_in_no_steps_is_bitwise(family, layout, launch, model_dir, tmp_path):  # noqa: F811
    launcher, ranks, extra = LAYOUTS[layout]
    given = ["--model", model_dir(family), "--num_train_epochs", 0, "--seq_len", 64, "--dtype", "fp32"]
    done = launch(*command(launcher, ranks), *given, *extra.split(), "--output_dir", tmp_path / "model")
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (AutoModelForCausalLM.from_pretrained(at) for at in (model_dir(family), tmp_path / "model"))
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    assert before.config.to_diff_dict() == after.config.to_diff_dict()


@pytest.mark.parametrize(("family", "more"), [("llama", []), ("qwen2-tied", []), ("qwen3", ["--split_dlayer"])])
def test_deepspeeds_own_checkpoints_convert(family, more, launch, model_dir, tmp_path):  # noqa: F811
    flags = ["--model", model_dir(family), "--num_train_epochs", 0, "--dtype", "fp32", "--output_dir", tmp_path / "o"]
    saved = launch("python", "-m", "tests.distributed.deepspeed_layers", *flags, *more, tmp_path / "ds")
    assert saved.returncode == 0, saved.stderr[-3000:]
    converted(launch, tmp_path / "ds" / "global_step0", tmp_path / "hf", "--model", model_dir(family))
    before, after = (AutoModelForCausalLM.from_pretrained(at) for at in (model_dir(family), tmp_path / "hf"))
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
