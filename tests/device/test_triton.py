"""Liger's kernels and our own, compiled ahead of time for GPUs that need not be there, at the widths of real models."""

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("liger_kernel")

from triton.backends.compiler import GPUTarget  # noqa: E402 - after what says that it is there
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fft.ops import logits_kernel  # noqa: E402
from fft.ops.fused import liger_ops  # noqa: E402


class AbsentGpu:
    """What Triton's compiler asks of a driver, where nothing is going to be launched."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture(params=[80, 90, 100], ids=lambda capability: f"sm_{capability}")
def compiled(request, monkeypatch, tmp_path) -> dict:
    """Kernels by name, with the largest binary of each, filled while Liger believes that it launches them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # what is found there was not compiled now
    kernels, run = {}, JITFunction.run

    def compile_only(function, *args, grid, warmup, **options):
        function.device_caches.clear()  # of the target before
        kernel = run(function, *args, grid=grid, warmup=True, **options)
        binary = len(kernel.asm["cubin"])
        kernels[function.fn.__name__] = max(binary, kernels.get(function.fn.__name__, 0))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    driver.set_active(AbsentGpu(request.param))  # for good: this group has a process of its own
    return kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_liger_compiles(compiled, dtype, record_property):
    ops, tokens = liger_ops(), 16

    def leaf(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, requires_grad=True)

    for hidden, feed_forward, heads, kv_heads, size in ((2048, 8192, 32, 8, 64), (4096, 14336, 32, 8, 128)):
        ops.rms_norm(leaf(tokens, hidden), leaf(hidden), 1e-6).sum().backward()
        turns = torch.ones(1, tokens, size, dtype=dtype)
        q, k = ops.rotary(leaf(1, heads, tokens, size), leaf(1, kv_heads, tokens, size), turns, turns)
        (q.sum() + k.sum()).backward()
        ops.swiglu(leaf(tokens, feed_forward), leaf(tokens, feed_forward)).sum().backward()
    for name, size in compiled.items():
        record_property(f"bytes of {name}", size)
    # Two of each: a forward and a backward kernel; the rotary embedding's is one, which knows both ways.
    assert len(compiled) == 5
    assert all(size > 0 for size in compiled.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_the_loss_compiles(compiled, dtype, cap, record_property):
    logits, targets = torch.ones(4, 128_256, dtype=dtype), torch.zeros(4, 1, dtype=torch.int64)
    sums = torch.zeros(4, 1), torch.zeros(4, 1)
    for bias in (None, torch.ones(128_256, dtype=dtype)):
        logits_kernel.row_sums(logits, targets, bias, cap, *sums)
        logits_kernel.row_gradients(logits, targets, bias, cap, sums[0])
    for name, size in compiled.items():
        record_property(f"bytes of {name}", size)
    assert len(compiled) == 2
    assert all(size > 0 for size in compiled.values())
