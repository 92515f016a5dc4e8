"""Which backend a device and dtype get, and the test it has to pass first."""

from functools import lru_cache

import torch

from fft.errors import UserError
from fft.ops.backends import Backend, cpu, cuda, npu, reference
from fft.ops.documents import Documents

_HALF = (torch.bfloat16, torch.float16)
_BACKENDS: dict[str, tuple[Backend, tuple[torch.dtype, ...]]] = {
    "cpu": (cpu, (torch.float32, *_HALF)),
    "cuda": (cuda, _HALF),
    "npu": (npu, _HALF),
}

#: Largest error of a sample, relative to its norm. Kernels multiply rounded weights, float32 ones perhaps as TF32.
_TOLERANCE = {torch.float16: 2**-8, torch.bfloat16: 2**-6, torch.float32: 2**-9, torch.float64: 1e-12}


@lru_cache(maxsize=16)
def choose(device: torch.device, dtype: torch.dtype) -> Backend:
    """The device's fused kernel where it takes the dtype, once it has passed :func:`check`; else the reference."""
    backend, dtypes = _BACKENDS.get(device.type, (reference, ()))
    if dtype not in dtypes:
        return reference
    check(backend, device, dtype)
    return backend


def check(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a backend with the reference in float64, forward and backward, on packed documents and on rectangles.

    Raises :class:`UserError` if they differ: training would go on, and be wrong.
    """
    ends = Documents.of((0, 1, 40, 130, 200), device)
    others = Documents.of((0, 70, 71, 100, 300), device)
    generator = torch.Generator().manual_seed(0)
    for keys, causal in ((ends, True), (others, False)):
        shapes = ((200, 4, 64), (keys.bounds[-1], 2, 64), (keys.bounds[-1], 2, 64), (200, 4, 64))
        q, k, v, dout = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        results = []
        for tested, inputs in ((backend, (q, k, v, dout)), (reference, [x.double().cpu() for x in (q, k, v, dout)])):
            *qkv, grad = inputs
            spans = [Documents.of(x.bounds, grad.device) for x in (ends, keys)]
            out, lse = tested.forward(*qkv, *spans, causal, 0.125)
            results.append((out, lse, *tested.backward(grad, *qkv, out, lse, *spans, causal, 0.125)))
        for name, ours, theirs in zip(("output", "log-sum-exp", "dq", "dk", "dv"), *results, strict=True):
            error = float((ours.double().cpu() - theirs).norm() / theirs.norm())
            if not error <= _TOLERANCE[dtype]:
                kernel = backend.__name__.rpartition(".")[2]
                raise UserError(
                    f"the {kernel} attention kernel of {device} in {dtype} differs from the reference: {name} by "
                    f"{error:.1e} of its norm; install a torch built for this device and driver."
                )
