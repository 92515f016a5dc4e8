"""What the loss makes of logits, by operators and by the kernel, against the formula in float64."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fft.errors import UserError
from fft.ops import logits
from fft.ops.compare import TOLERANCE

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_operators_compute_the_formula(dtype):
    for name, ours, exact in logits.results(logits.PlainLogits, CPU, dtype):
        assert ours.dtype == (dtype if name == "gradient" else torch.float32)
        assert (ours.double() - exact).norm() <= TOLERANCE[dtype] / 4 * exact.norm(), name


def test_a_gradient_is_where_the_logits_were():
    given = torch.randn(3, 40).bfloat16()
    made = logits.PlainLogits(given, torch.tensor([[1], [2], [3]]), None, None)
    assert made.gradient(made.lse).data_ptr() == given.data_ptr()


@pytest.mark.skipif(not find_spec("triton"), reason="Triton comes with torch for GPUs")
def test_the_kernel_computes_the_formula():
    """In Triton's interpreter, which is asked for before Triton is imported, and which rounds to bf16 towards zero."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env={"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


INTERPRETED = """
import torch
from fft.ops.logits import FusedLogits, results
for dtype, allowed in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-20)):
    for name, ours, exact in results(FusedLogits, torch.device("cpu"), dtype):
        assert (ours.double() - exact).norm() <= allowed * exact.norm(), (dtype, name)
"""


def test_a_kernel_that_is_wrong_is_passed_over_with_a_warning(monkeypatch):
    """And where the operators of a device are wrong, too, nothing is computed."""
    gpu, wrong = torch.device("cuda", 0), {logits.FusedLogits}

    def results(made, *_):
        return iter([("score", torch.ones(2), torch.full((2,), 2.0 if made in wrong else 1.0, dtype=torch.float64))])

    monkeypatch.setattr(logits, "find_spec", lambda _: "there")
    monkeypatch.setattr(logits, "results", results)
    choose = logits.choose_logits.__wrapped__
    with pytest.warns(UserWarning, match="differs from its formula: score by"):
        assert choose(gpu, torch.bfloat16) is logits.PlainLogits
    wrong.add(logits.PlainLogits)
    with pytest.raises(UserError, match=r"the loss on xpu:0 in bfloat16 differs from its formula: score by .*--dtype"):
        choose(torch.device("xpu", 0), torch.bfloat16)
    assert choose(CPU, torch.bfloat16) is logits.PlainLogits
    wrong.clear()
    assert choose(gpu, torch.bfloat16) is logits.FusedLogits
    assert choose(gpu, torch.float32) is logits.PlainLogits
