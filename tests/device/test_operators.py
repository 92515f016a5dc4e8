"""Fused operators, where the device has them, and transformers' formulas on the device, against float64 on the CPU."""

import pytest
import torch

from fft.ops.fused import check_operators, fused_ops, plain_ops

#: Largest error relative to its tensor's norm: some two roundings to the type, of inputs, of a product, of the result.
#: No operator multiplies matrices, so float32 is never TF32.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}
TYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["bf16", "fp16", "fp32"])
#: No multiple of a kernel's block.
TOKENS = 333


@pytest.fixture(params=["plain", "fused"])
def operators(request, device):
    """The device's own, and the formulas that they replace, whose error is recorded beside theirs."""
    if request.param == "plain":
        return plain_ops()
    found = fused_ops(device.type)
    if found is None:
        pytest.skip(f"no fused operators for {device.type} are installed (for cuda: liger-kernel)")
    return found


@pytest.fixture
def tokens(small) -> int:
    return 5 if small else TOKENS


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(operator: str, operators, inputs, constants, device, dtype, record_property) -> None:
    """Outputs and gradients of one operator; ``inputs`` get gradients, ``constants`` may be numbers."""
    given = [x.to(device, dtype) for x in inputs]
    rest = [x.to(device, dtype) if isinstance(x, torch.Tensor) else x for x in constants]
    results = []
    for tested, convert in ((operators, lambda x: x), (plain_ops(), lambda x: x.double().cpu())):
        leaves = [convert(x).clone().requires_grad_() for x in given]
        others = [convert(x) if isinstance(x, torch.Tensor) else x for x in rest]
        entered = [x * 1 for x in leaves]  # as results of other operators enter, which no check guards
        before = [x.detach().clone() for x in entered]
        outputs = getattr(tested, operator)(*entered, *others)
        assert all(map(torch.equal, entered, before)), "inputs were written over, which recomputation may have kept"
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [convert(normal(*x.shape, seed=n).to(device, dtype)) for n, x in enumerate(outputs)]
        torch.autograd.backward(outputs, grads)
        results.append([*outputs, *(leaf.grad for leaf in leaves)])
    names = [f"output {n}" for n in range(len(results[0]) - len(inputs))]
    names += [f"gradient {n}" for n in range(len(inputs))]
    for name, ours, exact in zip(names, *results, strict=True):
        assert (ours.shape, ours.dtype) == (exact.shape, dtype)
        error = float((ours.detach().double().cpu() - exact.detach()).norm() / exact.detach().norm())
        record_property(f"error of {name}", error)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


@TYPES
@pytest.mark.parametrize("hidden", [1024, 4096, 8192])
def test_rms_norm(operators, dtype, hidden, tokens, device, record_property):
    inputs = [normal(1, tokens, hidden, seed=10), normal(hidden, seed=11)]
    compare("rms_norm", operators, inputs, [1e-6], device, dtype, record_property)


@TYPES
@pytest.mark.parametrize("size", [64, 128])
def test_rms_norm_of_heads(operators, dtype, size, tokens, device, record_property):
    """As Qwen3 has it, of queries and keys."""
    inputs = [normal(1, tokens, 8, size, seed=10), normal(size, seed=11)]
    compare("rms_norm", operators, inputs, [1e-6], device, dtype, record_property)


@TYPES
@pytest.mark.parametrize(("size", "kv_heads"), [*((size, 8) for size in (64, 72, 80, 96, 128, 192)), (128, 1)])
def test_rotary(operators, dtype, size, kv_heads, tokens, device, record_property):
    """Queries and keys are views as attention modules make them: [1, tokens, heads, size], transposed."""
    turn = (torch.rand(1, tokens, size // 2, generator=torch.Generator().manual_seed(12)) * 6.3).repeat(1, 1, 2)
    inputs = [normal(1, tokens, heads, size, seed=heads).transpose(1, 2) for heads in (32, kv_heads)]
    compare("rotary", operators, inputs, [turn.cos(), turn.sin()], device, dtype, record_property)


@TYPES
@pytest.mark.parametrize("feed_forward", [2816, 14336, 28672])
def test_swiglu(operators, dtype, feed_forward, tokens, device, record_property):
    inputs = [normal(1, tokens, feed_forward, seed=seed) for seed in (10, 11)]
    compare("swiglu", operators, inputs, [], device, dtype, record_property)


@TYPES
def test_the_check_before_training_passes(operators, dtype, device):
    check_operators(operators, device, dtype)
