"""A run that is stopped, killed and resumed is, to the bit, the run that nothing ended; weights alone go in and out."""

import signal

import numpy as np
import pytest
import torch
from runs import ONE_TILE, column, config_of, read_metrics, train, weights
from token_tables import chain, write_table

from fft.checkpoint.folder import checkpoint_steps, checkpoint_tag, fault
from fft.models.in_process import write_random_model

STEPS = 8
NUMBERS = ("step", "loss", "grad_norm", "lr")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def flags(small, tmp_path_factory) -> list[str]:
    """All but --dtype and where to write. Nothing here sums in an order of its own: see ONE_TILE."""
    folder = tmp_path_factory.mktemp("given")
    config = config_of(small)
    write_random_model(config, folder / "model", seed=1)
    for name, count in (("table", 120), ("held-out", 9)):
        write_table(folder / name, chain(count, ONE_TILE, config.vocab_size, count))
    return (
        f"--model {folder}/model --train_data {folder}/table --eval_data {folder}/held-out --max_steps {STEPS} "
        f"--seq_len {ONE_TILE if small else 4 * ONE_TILE} --gradient_accumulation_steps 2 --learning_rate 2e-3 "
        "--warmup_steps 2 --seed 3 --save_steps 2"
    ).split()


@pytest.fixture(params=["bf16", "fp16", "fp32"])
def dtype(request, small) -> str:
    if small and request.param != "bf16":
        pytest.skip("on a CPU, tests/distributed resume the other types")
    return request.param


@pytest.fixture(scope="module")
def straight(device, flags, tmp_path_factory):
    """Run folder and model of a run that nothing ended, by type; a thread wrote its checkpoints."""
    known = {}

    def of(dtype: str):
        if dtype not in known:
            run = known[dtype] = tmp_path_factory.mktemp(f"straight-{dtype}")
            train(device, *flags, "--dtype", dtype, "--checkpoint", run / "run", "--output_dir", run / "model")
        return known[dtype] / "run", known[dtype] / "model"

    return of


def tensors(checkpoint) -> dict[str, torch.Tensor]:
    """Weights, masters and moments. The random states, which a process is born with, are of no use to a model."""
    assert fault(checkpoint) is None
    found = weights(checkpoint) | weights(checkpoint / "training")
    return {name: x for name, x in found.items() if not name.startswith("random/")}


def test_a_run_in_three_pieces_is_one_run(device, flags, dtype, straight, tmp_path):
    """Stopped after step 3, with a thread writing; killed after step 7, with a process; the rest with neither."""
    run, model = straight(dtype)
    pieces = [*flags, "--dtype", dtype, "--checkpoint", tmp_path / "run", "--output_dir", tmp_path / "model"]
    pieces += ["--background_executor"]
    train(device, 3, "SIGTERM", *pieces, "thread", program=("-m", "interrupted"), code=75)
    assert checkpoint_steps(tmp_path / "run") == [2, 3]
    pieces += ["process", "--resume", "auto"]
    train(device, 7, "SIGKILL", *pieces, program=("-m", "interrupted"), code=-signal.SIGKILL)
    assert checkpoint_steps(tmp_path / "run") in ([2, 3, 4], [2, 3, 4, 6])
    train(device, *pieces, "--background_executor", "none")
    (steps, evaluated), (again, evaluated_again) = map(read_metrics, (run, tmp_path / "run"))
    for name in NUMBERS:
        np.testing.assert_array_equal(column(again, name), column(steps, name), err_msg=name)
    assert evaluated_again == evaluated
    for step in checkpoint_steps(run):
        ours, theirs = (tensors(folder / checkpoint_tag(step)) for folder in (tmp_path / "run", run))
        assert ours.keys() == theirs.keys()
        assert [name for name, x in theirs.items() if not torch.equal(ours[name], x)] == [], f"step {step}"
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_weights_alone_go_in_and_out(device, flags, dtype, straight, tmp_path):
    """--from_ckpt begins with the loss that the run ended with; steps at a rate of nothing change no weight."""
    run, _ = straight(dtype)
    more = ["--from_ckpt", run, "--only_ckpt_model", "--learning_rate", 0, "--max_steps", 2]
    train(device, *flags, "--dtype", dtype, *more, "--checkpoint", tmp_path)
    assert read_metrics(tmp_path)[1][0] == read_metrics(run)[1][-1]
    written, taken = tmp_path / checkpoint_tag(2), run / checkpoint_tag(STEPS)
    assert not list(written.rglob("rank-*"))
    assert list(taken.rglob("rank-*"))
    assert (written / WEIGHTS).read_bytes() == (taken / WEIGHTS).read_bytes()
