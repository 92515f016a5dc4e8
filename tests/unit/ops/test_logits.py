"""What the loss makes of logits, by operators and by the kernel, against the formula in float64."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

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
    monkeypatch.setattr(logits, "find_spec", lambda _: "there")
    monkeypatch.setattr(logits, "results", lambda *_: iter([("score", torch.ones(2), torch.zeros(2).double() + 2)]))
    with pytest.warns(UserWarning, match="differs from its formula: score by"):
        assert logits.choose_logits.__wrapped__(torch.device("cuda", 0), torch.bfloat16) is logits.PlainLogits
    monkeypatch.setattr(logits, "results", lambda *_: iter([("score", torch.ones(2), torch.ones(2).double())]))
    assert logits.choose_logits.__wrapped__(torch.device("cuda", 0), torch.bfloat16) is logits.FusedLogits
    assert logits.choose_logits.__wrapped__(CPU, torch.bfloat16) is logits.PlainLogits
    assert logits.choose_logits.__wrapped__(torch.device("cuda", 0), torch.float32) is logits.PlainLogits
