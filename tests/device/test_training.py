"""A small model trained for twenty steps by ``python -m fft.train``, against a plain loop on the CPU, in fp32."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import column, config_of, largest_difference, read_metrics, train
from token_tables import chain, write_table

from fft.arguments import parse_arguments
from fft.models.in_process import write_random_model
from fft.parity_reference import one_process
from fft.planning.preflight import plan_run

STEPS = 20
#: Largest differences, relative, of losses and of gradient norms: half types as tests/distributed has them, by the bits
#: that they keep, over five steps; float32 as fft.parity has them. Twenty steps of the rehearsal stay within a quarter.
#: As TF32, products would be off by 5e-4.
ALLOWED = {"fp32": (1e-5, 1e-4), "fp16": (5e-4, 2e-3), "bf16": (2e-3, 2e-2)}


@pytest.fixture(scope="module")
def flags(small, tmp_path_factory) -> list[str]:
    """All but --dtype and where to write. AdamW's epsilon keeps it from making a step of a rounding error."""
    folder = tmp_path_factory.mktemp("given")
    config, longest, length = config_of(small), *((60, 64) if small else (200, 256))
    write_random_model(config, folder / "model", seed=1)
    for name, count, seed in (("table", 150, 0), ("held-out", 20, 1)):
        write_table(folder / name, chain(count, longest, config.vocab_size, seed))
    return (
        f"--model {folder}/model --train_data {folder}/table --eval_data {folder}/held-out --seq_len {length} "
        f"--gradient_accumulation_steps 4 --max_steps {STEPS} --learning_rate 2e-3 --warmup_steps 2 "
        "--adam_epsilon 1e-5 --max_grad_norm 1 --seed 3 --logging_steps 10"
    ).split()


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory):
    """What transformers and torch do, a document at a time, in fp32 on the CPU."""
    args = parse_arguments([*flags, "--dtype", "fp32", "--output_dir", str(tmp_path_factory.mktemp("none") / "model")])
    return one_process(Path(args.model), args, plan_run(args, 1))


@pytest.fixture(scope="module")
def trained(device, flags, tmp_path_factory):
    """Steps and evaluations of a run in a type, on a type of device; each is made once."""
    known = {}

    def of(dtype: str, place: torch.device = device):
        if (dtype, place.type) not in known:
            run = tmp_path_factory.mktemp(f"{dtype}-{place.type}")
            # DeepSpeed's CPU accelerator wants hardware for fp16; this program talks it out of that.
            on_cpu = dtype == "fp16" and place.type == "cpu"
            program, more = ("half_on_cpu", ["16"]) if on_cpu else ("fft.train", [])
            train(place, *flags, "--dtype", dtype, "--checkpoint", run, *more, program=("-m", program))
            known[dtype, place.type] = read_metrics(run)
        return known[dtype, place.type]

    return of


def compare(dtype, found, losses, norms, evaluations, record_property):
    steps, evaluated = found
    for name, ours, theirs, allowed in zip(
        ("a loss", "a gradient norm", "a validation loss"),
        (column(steps, "loss"), column(steps, "grad_norm"), np.array(evaluated)),
        (losses, norms, evaluations),
        (*ALLOWED[dtype], ALLOWED[dtype][0]),
        strict=True,
    ):
        difference = largest_difference(ours, np.array(theirs))
        record_property(f"largest difference of {name}", difference)
        assert difference <= allowed, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("dtype", list(ALLOWED))
def test_it_is_the_plain_loop(dtype, trained, reference, record_property):
    steps, evaluated = trained(dtype)
    assert len(steps) == STEPS
    assert all(step.get("skipped_steps", 0) == 0 for step in steps)
    assert evaluated[-1] < evaluated[0] - 0.3  # it learns
    found = steps, evaluated
    compare(dtype, found, reference.losses, reference.norms, reference.evaluations, record_property)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])  # few CPUs have fast products in fp16
def test_it_is_the_same_command_on_the_cpu(dtype, trained, small, record_property):
    """In one type both round at the same places, to the same bits, if not always in the same direction."""
    if small:
        pytest.skip("the device is the CPU")
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("DeepSpeed compiles its CPU communication, and there is no C++ compiler")
    steps, evaluated = trained(dtype, torch.device("cpu"))
    expected = column(steps, "loss"), column(steps, "grad_norm"), evaluated
    compare(dtype, trained(dtype), *expected, record_property)
