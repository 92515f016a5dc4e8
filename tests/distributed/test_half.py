"""fp16 with its loss scale, on two stages with tied weights: the losses of fp32, skipped steps, resumed to the bit."""

import shutil

import numpy as np
import pytest
from forked import run_ranks
from test_parity import flags, held_out, model_dir, read_metrics, reference  # noqa: F401 - fixtures

from fft.arguments import parse_arguments
from fft.checkpoint.folder import read_state
from fft.errors import UserError
from fft.training.engine import check_device

#: An initial loss scale that does not overflow, and one that does: a power of two, the scale then halves each step.
FITS, TOO_LARGE = 16, 24
LAYOUT = ["--pipe_parallel_size=2", "--gradient_accumulation_steps=8", "--checkpoint_grad_interval=1", "--dtype=fp16"]


@pytest.fixture
def train(model_dir, ragged_table, held_out):  # noqa: F811
    def run(output, power, *more):
        given = [*flags(model_dir("qwen2-tied"), ragged_table, output, held_out), *LAYOUT, *more, power]
        done = run_ranks(2, *given, module="tests.device.half_on_cpu")
        assert done.returncode == 0, done.stderr[-3000:]
        return read_metrics(output / "run")

    return run


@pytest.mark.slow
def test_fp16_follows_fp32(train, reference, tmp_path):  # noqa: F811
    """fp16 keeps 11 bits. The gradient norm would be more than 1 % off if that of the tied weights were not summed."""
    steps, evaluated = train(tmp_path, FITS)
    expected = reference("qwen2-tied")
    np.testing.assert_allclose([step["loss"] for step in steps], expected.losses, rtol=5e-4)
    np.testing.assert_allclose([step["grad_norm"] for step in steps], expected.norms, rtol=2e-3)
    np.testing.assert_allclose(evaluated, expected.evaluations, rtol=5e-4)
    assert {(step["loss_scale"], step["skipped_steps"]) for step in steps} == {(2.0**FITS, 0)}


@pytest.mark.slow
def test_fp16_of_experts_over_ranks(model_dir, ragged_table, held_out, tmp_path):  # noqa: F811
    """As with all experts on every rank; the last stage has none, and all ranks skip the step that overflows."""
    runs = {}
    for spread, power in ((1, FITS), (2, FITS), (2, TOO_LARGE)):
        output = tmp_path / f"{spread}-{power}"
        given = [*flags(model_dir("qwen3-moe"), ragged_table, output, held_out), "--dtype=fp16", "--max_steps=2"]
        layout = ["--pipe_parallel_size=2", "--gradient_accumulation_steps=4", "--partition_method=4,2"]
        done = run_ranks(
            4, *given, *layout, f"--expert_parallel_size={spread}", power, module="tests.device.half_on_cpu"
        )
        assert done.returncode == 0, done.stderr[-3000:]
        runs[spread, power] = read_metrics(output / "run")[0]
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        ours, theirs = ([step[name] for step in runs[spread, FITS]] for spread in (2, 1))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance)
    assert [step["skipped_steps"] for step in runs[2, TOO_LARGE]] == [1, 2]


@pytest.mark.slow
def test_skipped_steps_and_going_on_after_them(train, tmp_path):
    more = ["--max_steps", 10, "--save_steps", 2]
    steps, evaluated = train(tmp_path, TOO_LARGE, *more)
    skipped = [step["skipped_steps"] for step in steps]
    count = skipped[-1]
    assert 2 <= count <= 7
    assert skipped == [min(step["step"], count) for step in steps]
    assert [step["loss_scale"] for step in steps] == [2.0 ** (TOO_LARGE - n) for n in skipped]
    rates = [step["lr"] for step in steps]
    assert rates[: count + 1] == rates[:1] * (count + 1)  # the schedule waits
    assert len(set(rates[count:])) > 2
    assert np.isinf([step["grad_norm"] for step in steps]).tolist() == [step["step"] <= count for step in steps]
    # From a checkpoint before the first step that was taken, and from one after it.
    for step in (2, 8):
        again = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "run", again / "run")
        assert read_state(again / "run" / f"step-{step}")["loss_scaler"]["skipped"] == min(step, count)
        resumed, evaluated_again = train(again, FITS, *more, "--resume", f"step-{step}", "--overwrite")
        names = ("step", "loss", "grad_norm", "lr", "loss_scale", "skipped_steps")
        assert [[s[n] for n in names] for s in resumed] == [[s[n] for n in names] for s in steps]
        assert evaluated_again == evaluated


def test_a_device_without_fp16_is_refused_by_name(monkeypatch):
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: False)
    args = parse_arguments(["--model", "m", "--train_data", "t", "--output_dir", "o", "--dtype", "fp16"])
    with pytest.raises(UserError, match=r"--dtype fp16 does not run on this machine's device \(cpu\): use bf16"):
        check_device(args)
