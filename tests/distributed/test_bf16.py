"""bf16 whose tokens or parameters are shared out is as exact as bf16 in one process: what ranks add up is not rounded.

Losses and norms, which ``test_parity.py`` compares, average such errors away. Here the weights are bf16 to begin with,
so that all of a gradient's distance from the one in fp32 is that of activations and sums; and that distance, kind of
parameter by kind, is not to be larger than in one process. Over micro-batches and ranks gradients are summed in fp32:
they have digits that bf16 has not.
"""

import re
from collections import defaultdict

import pytest
import torch
from conftest import SMALL
from forked import run_ranks
from safetensors.torch import load_file, save_file
from test_parity import FAMILIES, LAYOUTS, flags, held_out  # noqa: F401 - a fixture
from transformers import AutoConfig

from fft.arguments import parse_arguments
from fft.models.in_process import write_random_model
from fft.parity_reference import one_process
from fft.parity_run import read_outcome
from fft.planning.preflight import plan_run

pytestmark = pytest.mark.slow
#: A step whose gradient is not clipped, and stays in AdamW's first moment as it is.
STEP = ["--max_steps=1", "--max_grad_norm=0", "--adam_beta1=0"]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """A model in fp32 whose weights bf16 holds without loss."""
    folder = tmp_path_factory.mktemp("rounded") / "llama"
    write_random_model(AutoConfig.for_model(**SMALL, **FAMILIES["llama"]), folder, seed=1)
    weights = load_file(folder / "model.safetensors")
    save_file({n: w.bfloat16().float() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def errors(rounded, ragged_table, held_out, tmp_path_factory):  # noqa: F811
    """Of a layout in bf16: its first gradient, and its errors by kind of parameter, relative to the kind's norm."""
    given = flags(rounded, ragged_table, tmp_path_factory.mktemp("unused"), held_out)
    args = parse_arguments([*given, *STEP, "--gradient_accumulation_steps=8"])
    expected = one_process(rounded, args, plan_run(args, 1))

    def of(layout):
        _, ranks, extra = LAYOUTS[layout]
        out = tmp_path_factory.mktemp(layout)
        given = [*flags(rounded, ragged_table, out, held_out), *extra.split(), *STEP, "--dtype=bf16", "--save_steps=1"]
        done = run_ranks(ranks, *given)
        assert done.returncode == 0, done.stderr[-3000:]
        found, squares = read_outcome(out / "run"), defaultdict(lambda: torch.zeros(2))
        assert found.losses == pytest.approx(expected.losses, rel=3e-4)
        for name, gradient in expected.gradients.items():
            pair = torch.stack([found.gradients[name] - gradient, gradient]).flatten(1)
            squares[re.sub(r"layers\.\d+\.", "", name)] += pair.square().sum(1)
        return found.gradients, {kind: float((off / size).sqrt()) for kind, (off, size) in squares.items()}

    return of


@pytest.fixture(scope="module")
def alone(errors):
    return errors("one")[1]


@pytest.mark.parametrize("layout", ["data2", "sequence2", "tensor2"])
def test_bf16_is_as_exact_as_in_one_process(layout, alone, errors):
    gradients, found = errors(layout)
    assert max(alone.values()) < 0.1
    assert {kind: error / alone[kind] for kind, error in found.items() if error > 1.15 * alone[kind]} == {}
    finer = {name: float((g != g.bfloat16().float()).float().mean()) for name, g in gradients.items()}
    assert min(finer.values()) > 0.5, finer
