"""Whether a kernel computes what its formula says: the comparison that it has to pass before it is used."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fft.errors import one_line

#: Largest error of a sample, relative to its norm. Kernels multiply rounded weights, float32 ones perhaps as TF32.
TOLERANCE = {torch.float16: 2**-8, torch.bfloat16: 2**-6, torch.float32: 2**-9, torch.float64: 1e-12}


def disagreement(results: Iterable[tuple[str, Tensor, Tensor]], dtype: torch.dtype, fails: str, differs: str) -> str:
    """What is wrong with a kernel's results in ``dtype``, as the end of a sentence; nothing if all are right.

    ``results`` are (name, the kernel's tensor, the float64 tensor on the CPU that it should be), computed while they
    are asked for: what the kernel raises is told after ``fails``, the first tensor that is beyond :data:`TOLERANCE`
    after ``differs``.
    """
    try:
        for name, ours, theirs in results:
            error = float((ours.detach().double().cpu() - theirs).norm() / theirs.norm())
            if not error <= TOLERANCE[dtype]:
                return f"{differs}: {name} by {error:.1e} of its norm"
    except Exception as error:  # whatever a kernel built for other devices or another interface may raise
        return f"{fails}: {type(error).__name__}: {one_line(error)}"
    return ""
