"""Which backend a device and dtype get, or were asked for by name, and the test it has to pass first."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from fft.errors import UserError
from fft.ops.backends import (
    Backend,
    cpu,
    cuda,
    cudnn,
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
    meta,
    npu,
    reference,
)
from fft.ops.compare import disagreement
from fft.ops.documents import Documents, Segments

#: Near the size of the scores with which kernels are compared.
_CAP = 2.0
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernel:
    """A backend, where it runs, on what, the package it needs besides torch, whether it can cap scores, and whether it
    is for those who ask for it by name alone.
    """

    backend: Backend
    device: str
    dtypes: tuple[torch.dtype, ...]
    package: str | None = None
    caps: bool = False
    asked: bool = False

    def fits(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it runs there, on that."""
        return device.type == self.device and dtype in self.dtypes

    def is_installed(self) -> bool:
        """Whether its package is there."""
        try:
            return self.package is None or bool(version(self.package))
        except PackageNotFoundError:
            return False


#: Fused kernels by name. On a device, the first one that is installed and right is taken.
KERNELS = {
    "cpu": Kernel(cpu, "cpu", (torch.float32, *_HALF)),
    "flash_attention_4": Kernel(flash_attention_4, "cuda", _HALF, "flash-attn-4", caps=True),
    "flash_attention_3": Kernel(flash_attention_3, "cuda", _HALF, "flash-attn-3", caps=True),
    "flash_attention_2": Kernel(flash_attention_2, "cuda", _HALF, "flash-attn", caps=True),
    "cuda": Kernel(cuda, "cuda", _HALF),
    "cudnn": Kernel(cudnn, "cuda", _HALF, asked=True),
    "npu": Kernel(npu, "npu", _HALF),
}


@lru_cache(maxsize=64)
def choose(
    device: torch.device, dtype: torch.dtype, name: str = "auto", size: int = 64, capped: bool = False
) -> Backend:
    """The backend called ``name``, once it has passed :func:`check_backend` with heads of ``size``.

    ``auto``: the first fused kernel of the device that takes the dtype, caps scores where they are ``capped``, is
    installed and passes, with a warning for each that does not pass; the reference where the device has none. On the
    meta device shapes are all. Raises :class:`UserError` if a named kernel does not fit, is missing or does not pass,
    or if none of several passes.
    """
    if device.type == "meta":
        return meta
    if name == "reference":
        return reference
    if name != "auto":
        kernel = KERNELS[name]
        if not kernel.fits(device, dtype):
            takes = " or ".join(_plain(dtype) for dtype in kernel.dtypes)
            raise UserError(
                f"--attention {name} runs on {kernel.device} in {takes}, not on {device.type} in {_plain(dtype)}: "
                "choose another or leave it at auto."
            )
        if capped and not kernel.caps:
            able = ", ".join([*(other for other in KERNELS if KERNELS[other].caps), "reference"])
            raise UserError(
                f"--attention {name} caps no scores, as the model does (attn_logit_softcapping in its config.json): "
                f"use one of {able}, or leave it at auto."
            )
        if not kernel.is_installed():
            raise UserError(f"--attention {name} needs the package {kernel.package}: install it or leave it at auto.")
        check_backend(kernel.backend, device, dtype, size, capped)
        return kernel.backend
    able = [kernel for kernel in KERNELS.values() if not kernel.asked and (kernel.caps or not capped)]
    fitting = [kernel for kernel in able if kernel.fits(device, dtype) and kernel.is_installed()]
    for kernel in fitting:
        try:
            check_backend(kernel.backend, device, dtype, size, capped)
        except UserError as error:
            if kernel is fitting[-1]:
                raise
            warnings.warn(f"passed over: {error}", stacklevel=2)
            continue
        return kernel.backend
    return reference


def check_backend(
    backend: Backend, device: torch.device, dtype: torch.dtype, size: int = 64, capped: bool = False
) -> None:
    """Compare a backend with the reference in float64, forward and backward, on packed documents and on rectangles.

    With ``capped`` its scores are. Raises :class:`UserError` if they differ: training would go on, and be wrong; or
    if the backend fails.
    """
    wrong = disagreement(_results(backend, device, dtype, size, capped), dtype, "fails", "differs from the reference")
    if wrong:
        raise UserError(
            f"the {kernel_name(backend)} attention kernel of {device} in {_plain(dtype)}, heads of {size}, "
            f"{wrong}; install a build for this device and driver, or choose another kernel with --attention."
        )


def _results(
    backend: Backend, device: torch.device, dtype: torch.dtype, size: int, capped: bool
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every result's name, the backend's, and the reference's."""
    packed, others = (0, 1, 40, 130, 200), (0, 70, 71, 100, 300)
    generator = torch.Generator().manual_seed(0)
    cases = [(packed, packed, True), (packed, others, False), ((0, 1, 2, 3, 4), others, False)]
    if backend is cudnn:  # short documents are not its own
        long = (0, cudnn.LONG, 2 * cudnn.LONG + 2)
        cases = [*cases, (long, long, True)]
    for queries, keys, causal in cases:
        shapes = ((n, heads, size) for n, heads in ((queries[-1], 4), (keys[-1], 2), (keys[-1], 2), (queries[-1], 4)))
        inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        results = []
        for tested, (q, k, v, dout) in ((backend, inputs), (reference, [x.double().cpu() for x in inputs])):
            asked, seen = Documents.of(queries, q.device), Documents.of(keys, q.device)
            segments = Segments(asked, seen, causal, size**-0.5, _CAP if capped else None)
            out, lse = tested.forward(q, k, v, segments)
            results.append((out, lse, *tested.backward(dout, q, k, v, out, lse, segments)))
        yield from zip(("output", "log-sum-exp", "dq", "dk", "dv"), *results, strict=True)


def kernel_name(backend: Backend) -> str:
    """A backend's name: what --attention calls it."""
    return backend.__name__.rpartition(".")[2]


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
