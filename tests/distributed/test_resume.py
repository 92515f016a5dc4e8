"""A run that stops and goes on is the run that never stopped: to the bit on one layout, to 1e-5 across layouts."""

import shutil

import numpy as np
import pytest
import torch
from conftest import VOCAB, write_table
from forked import run_ranks
from in_process import run_here
from safetensors.torch import load_file
from test_parity import EVERYWHERE, FAMILIES, LAYOUTS, flags, held_out, model_dir, read_metrics  # noqa: F401 - fixtures
from thorough import thorough
from transformers import AutoModelForCausalLM

from fft.checkpoint.convert import cli

pytestmark = pytest.mark.slow
#: Steps of the straight run, and the step after which another one goes on. An epoch of the table ends within step 13.
STEPS, HALF = 10, 5
#: ``data4`` has the same global batch as ``data2``: two replicas more. ``blend`` is ``one`` on the two tables.
MORE = {
    "pipe2-data2-zero0": (4, f"{LAYOUTS['pipe2-data2'][2]} --zero_stage 0"),
    "data4": (4, "--gradient_accumulation_steps 2"),
    "blend": (1, f"{LAYOUTS['one'][2]} --pack best-fit --blend_end drop"),
    "pipe2-ragged": (2, f"{LAYOUTS['pipe2'][2]} --pack best-fit --ragged"),
}


@pytest.fixture(scope="module")
def small_table(tmp_path_factory):
    """Rows that make some 30 samples: in a blend that is half theirs they end within step 8, after the run's stop."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, VOCAB, rng.integers(20, 45)).astype(np.int32) for _ in range(48)]
    return write_table(tmp_path_factory.mktemp("small") / "table", rows)


@pytest.fixture(scope="module")
def train(model_dir, ragged_table, small_table, held_out):  # noqa: F811
    def run(output, family, layout, *more):
        ranks, extra = MORE[layout] if layout in MORE else LAYOUTS[layout][1:]
        given = [*flags(model_dir(family), ragged_table, output, held_out), *extra.split(), "--max_steps", STEPS]
        if layout == "blend":
            given += ["--train_data", f"{ragged_table}:0.5 {small_table}:0.5"]
        done = run_ranks(ranks, *given, "--save_steps", HALF, "--eval_steps", 3, *more)
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
        ("llama", "blend", "bf16", "process"),
        ("llama", "data2", "bf16", "thread"),
        thorough("qwen2-tied", "pipe2", "bf16", "thread"),
        thorough("llama", "pipe2-ragged", "bf16", "thread"),
        ("qwen2-tied", "pipe2-data2", "fp32", "process"),
        ("llama", "sequence2", "fp32", "thread"),
        thorough("qwen2-tied", "pipe2-data2-zero0", "fp32", "thread"),
        thorough("llama", "pipe2-split-recompute", "bf16", "thread"),
        thorough("qwen2-moe", "data2-tensor2", "bf16", "thread"),
        thorough("qwen2-tied", "pipe2-data2-offload", "bf16", "thread"),
        ("qwen3-moe", "pipe2-expert2", "bf16", "thread"),
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
        ("qwen2-tied", "pipe2-data2", "pipe2-data2-zero0"),
        ("llama", "one", "pipe2-split-recompute"),
        ("llama", "data2", "data4"),
        ("llama", "sequence2", "one"),
        ("llama", "one", "sequence2"),
        ("llama", "data2", "pipe2"),
        ("qwen2-tied", "pipe2-tensor2", "data2"),
        ("llama", "one", "tensor2"),
        thorough("qwen2-moe", "data2-tensor2", "pipe2"),
        thorough("qwen2-moe", "data2-tensor2", "data2-tensor2-expert2"),
        ("qwen3-moe", "pipe2-expert2", "pipe2"),
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


def test_adapters_alone(train, model_dir, tmp_path):  # noqa: F811
    """LoRA: on the same layout to the bit, with tensor parallelism to 1e-5; and merged, from the run folder."""
    family, lora = "qwen2-tied", ["--lora_dim", 3, "--lora_alpha", 12]
    numbers, evaluated, weights = train(tmp_path / "straight", family, "pipe2", *lora)
    again = go_on(train, tmp_path / "straight", tmp_path / "again", family, "pipe2", "fp32", *lora)
    np.testing.assert_array_equal(again[0], numbers)
    assert again[1] == evaluated
    assert again[2].keys() == weights.keys()
    assert all(torch.equal(again[2][name], value) for name, value in weights.items())
    tensor = ["--sequence_parallel_size", 1, "--model_parallel_size", 2]
    other = go_on(train, tmp_path / "straight", tmp_path / "other", family, "sequence2", "fp32", *lora, *tensor)
    np.testing.assert_allclose(other[0][:, :2], numbers[:, :2], rtol=1e-5)
    np.testing.assert_allclose(other[0][:, 2], numbers[:, 2], rtol=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(other[2][name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    merged = converted(tmp_path / "straight" / "run", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(model_dir(family)).state_dict()
    adapted = 0
    for name, value in merged.items():
        down, up = (weights.get(f"base_model.model.{name[:-7]}.lora_{part}.weight") for part in "AB")
        adapted += down is not None
        expected = base[name] if down is None else base[name] + 12 / 3 * (up @ down)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    assert 2 * adapted == len(weights)


def test_a_runs_adapter_is_merged_from_its_masters(train, model_dir, tmp_path):  # noqa: F811
    """W + alpha / rank * B @ A, of the fp32 matrices that were stepped: not of those rounded to bf16."""
    run = tmp_path / "run"
    _, _, rounded = train(tmp_path, "llama", "data2", "--dtype", "bf16", "--lora_dim", 3, "--lora_alpha", 12)
    masters = {}
    for file in sorted((run / f"step-{STEPS}" / "training").glob("rank-*.safetensors")):
        for key, value in load_file(file).items():
            if key.startswith("master/"):
                masters.setdefault(key.removeprefix("master/"), []).append(value.flatten())
    base = AutoModelForCausalLM.from_pretrained(model_dir("llama")).state_dict()
    merged = converted(run, tmp_path / "run-merged", "--dtype", "fp32")
    given = converted(model_dir("llama"), tmp_path / "merged", "--lora", run / f"step-{STEPS}", "--dtype", "fp32")
    for name, weight in base.items():
        matrices = [f"{name[:-7]}.lora_{part}.weight" for part in "AB"]
        expected = weight
        if matrices[0] in masters:
            down, up = (torch.cat(masters[m]).view(rounded[f"base_model.model.{m}"].shape) for m in matrices)
            assert torch.equal(up.bfloat16(), rounded[f"base_model.model.{matrices[1]}"])
            assert not torch.equal(up, rounded[f"base_model.model.{matrices[1]}"].float())
            expected = weight + 12 / 3 * (up @ down)
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(given[name], merged[name])
    assert len(masters) == len(rounded)


def converted(source, output, *more):
    done = run_here(cli, source, output, *more)
    assert done.returncode == 0, done.stderr
    tensors = {}
    for file in sorted(output.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def test_a_checkpoint_converts_in_its_own_type_and_from_the_masters(straight, tmp_path):
    output, (_, _, weights) = straight("llama", "data2", "bf16")
    stored = converted(output / "run", tmp_path / "stored")
    masters = converted(output / "run", tmp_path / "masters", "--dtype", "fp32")
    assert stored.keys() == masters.keys() == weights.keys()
    assert all(torch.equal(stored[name], value) for name, value in weights.items())
    assert all(torch.equal(masters[name].bfloat16(), value) for name, value in weights.items())
    assert not any(torch.equal(masters[name], value.float()) for name, value in weights.items() if value.ndim == 2)
    AutoModelForCausalLM.from_pretrained(output / "run" / f"step-{STEPS}")  # a checkpoint needs no conversion


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((family, "one") for family in FAMILIES),
        *((family, "pipe2-tensor2") for family in EVERYWHERE),
        *(thorough(family, "pipe2-split-recompute") for family in EVERYWHERE),
    ],
)
def test_from_hugging_face_and_back_in_no_steps_is_bitwise(family, layout, model_dir, tmp_path):  # noqa: F811
    _, ranks, extra = LAYOUTS[layout]
    given = ["--model", model_dir(family), "--num_train_epochs", 0, "--seq_len", 64, "--dtype", "fp32"]
    done = run_ranks(ranks, *given, *extra.split(), "--output_dir", tmp_path / "model")
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (AutoModelForCausalLM.from_pretrained(at) for at in (model_dir(family), tmp_path / "model"))
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    assert before.config.to_diff_dict() == after.config.to_diff_dict()


@pytest.mark.parametrize(
    ("family", "more"), [thorough("llama", []), ("qwen2-tied", []), thorough("qwen3", ["--split_dlayer"])]
)
def test_deepspeeds_own_checkpoints_convert(family, more, model_dir, tmp_path):  # noqa: F811
    flags = ["--model", model_dir(family), "--num_train_epochs", 0, "--dtype", "fp32", "--output_dir", tmp_path / "o"]
    saved = run_ranks(1, *flags, *more, tmp_path / "ds", module="tests.distributed.deepspeed_layers")
    assert saved.returncode == 0, saved.stderr[-3000:]
    converted(tmp_path / "ds" / "global_step0", tmp_path / "hf", "--model", model_dir(family))
    before, after = (AutoModelForCausalLM.from_pretrained(at) for at in (model_dir(family), tmp_path / "hf"))
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
