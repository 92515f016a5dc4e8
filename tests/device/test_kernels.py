"""Every attention kernel that is installed for the device, against the reference in float64 on the CPU."""

import itertools

import pytest
import torch
from conftest import device_type
from rings import documents_of, tensors, whole

from fft.ops.alibi import alibi_slopes, widened
from fft.ops.attention import packed_attention
from fft.ops.backends import reference
from fft.ops.backends.choice import KERNELS, check_backend, choose
from fft.ops.compare import TOLERANCE
from fft.ops.documents import Documents, Segments

#: A document of one token, one of none, and lengths on both sides of a kernel's tile.
LENGTHS = [1, 300, 0, 63, 64, 65, 1, 1, 129, 128]
#: That of 144 is heads of 128 with ALiBi; 100 is no multiple of 8.
SIZES = [64, 72, 80, 96, 100, 128, 144, 192]
RESULTS = ("output", "log-sum-exp", "dq", "dk", "dv")


def pytest_generate_tests(metafunc):
    """The kernels of the device, what each takes, and the sizes of heads; the rehearsal takes few of those."""
    device = device_type(metafunc.config)
    kernels = {name: kernel for name, kernel in KERNELS.items() if kernel.device == device}
    if "dtype" in metafunc.fixturenames:
        both = [(kernel, dtype) for kernel in kernels.values() for dtype in kernel.dtypes]
        names = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, k in kernels.items() for dtype in k.dtypes]
        metafunc.parametrize(("kernel", "dtype"), both, ids=names, indirect=["kernel"])
    elif "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", list(kernels.values()), ids=list(kernels), indirect=True)
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", SIZES[:2] if device == "cpu" else SIZES)


@pytest.fixture
def kernel(request):
    """A kernel of this device, if it is installed."""
    if not request.param.is_installed():
        pytest.skip(f"{request.param.package} is not installed")
    return request.param


def relative_error(ours: torch.Tensor, true: torch.Tensor) -> float:
    return float((ours.double().cpu() - true).norm() / true.norm())


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_packed_documents(kernel, dtype, size, kv_heads, device, record_property):
    inputs = tensors(sum(LENGTHS), 8, kv_heads, size, dtype)
    true = whole(documents_of(LENGTHS), [x.double() for x in inputs], reference, size**-0.5)
    ours = whole(documents_of(LENGTHS, device), [x.to(device) for x in inputs], kernel.backend, size**-0.5)
    for name, mine, exact in zip(RESULTS, ours, true, strict=True):
        error = relative_error(mine, exact)
        record_property(f"error of {name}", error)
        assert error <= TOLERANCE[dtype], name


def test_alibi(kernel, dtype, device, record_property):
    """Wider heads, against a bias in the reference's own algebra: scores of one document, in float64."""
    heads, size, tokens = 5, 48, 300
    inputs = tensors(tokens, heads, heads, size, dtype)
    slopes, row = alibi_slopes(heads), Documents.of((0, tokens), device)
    states = [x.to(device).detach().requires_grad_() for x in inputs[:3]]
    wide = widened(*states, row.positions(), slopes, size**-0.5)
    out = packed_attention(*wide, row, size**-0.5, kernel.backend)[..., :size]
    exact = [x.double().cpu().detach().requires_grad_() for x in inputs[:3]]
    at = torch.arange(tokens)
    scores = torch.einsum("qhd,khd->hqk", *exact[:2]) * size**-0.5
    scores = scores + torch.tensor(slopes).double()[:, None, None] * (at - at[:, None])
    weights = scores.masked_fill(at > at[:, None], float("-inf")).softmax(-1)
    true = torch.einsum("hqk,khd->qhd", weights, exact[2])
    out.backward(inputs[3].to(device))
    true.backward(inputs[3].double().cpu())
    found = [out, *(x.grad for x in states)], [true, *(x.grad for x in exact)]
    for name, mine, other in zip(("output", "dq", "dk", "dv"), *found, strict=True):
        error = relative_error(mine.detach(), other.detach())
        record_property(f"error of {name}", error)
        assert error <= TOLERANCE[dtype], name


def test_the_check_before_training_passes(kernel, dtype, size, device):
    for capped in {False, kernel.caps}:
        check_backend(kernel.backend, device, dtype, size, capped)


def test_one_is_chosen(device):
    assert choose(device, torch.bfloat16) in [each.backend for each in KERNELS.values()]
    if device.type != "cpu":
        assert choose(device, torch.float32) is reference


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_rectangles_with_an_outer_softmax_add_up(kernel, kv_heads, size, device):
    """Two halves of the keys, backward with the whole's out and lse: gradients add to those of one call."""
    backend = kernel.backend
    queries, keys = documents_of([3, 200, 77]), documents_of([130, 64, 300])
    q, _, _, dout = (x.to(device) for x in tensors(280, 8, kv_heads, size, torch.bfloat16))
    _, k, v, _ = (x.to(device) for x in tensors(494, 8, kv_heads, size, torch.bfloat16, seed=1))
    segments = Segments(Documents.of(queries.bounds, device), Documents.of(keys.bounds, device), False, 0.1)
    out, lse = backend.forward(q, k, v, segments)
    dq, dk, dv = backend.backward(dout, q, k, v, out, lse, segments)
    summed = torch.zeros_like(dq, dtype=torch.float32)
    for (a, b), (c, d) in zip(itertools.pairwise(queries.bounds), itertools.pairwise(keys.bounds), strict=True):
        middle = (c + d) // 2
        for lo, hi in ((c, middle), (middle, d)):
            ends = Documents.of((0, b - a), device), Documents.of((0, hi - lo), device)
            inputs = (dout[a:b], q[a:b], k[lo:hi], v[lo:hi], out[a:b], lse[:, a:b].contiguous())
            part, part_k, part_v = backend.backward(*inputs, Segments(*ends, False, 0.1))
            summed[a:b] += part
            for ours, theirs in ((part_k, dk), (part_v, dv)):
                assert (ours.float() - theirs[lo:hi].float()).norm() <= 2**-6 * theirs[lo:hi].float().norm()
    assert (summed - dq.float()).norm() <= 2**-6 * dq.float().norm()


def test_documents_without_queries_are_passed_over(kernel, device):
    queries, keys = Documents.of((0, 5, 5, 40), device), Documents.of((0, 9, 20, 60), device)
    q, k, v, _ = (x.to(device) for x in tensors(60, 4, 2, 64, torch.bfloat16))
    segments = Segments(queries, keys, False, 0.1)
    out, lse = kernel.backend.forward(q[:40], k, v, segments)
    host = Segments(Documents.of(queries.bounds), Documents.of(keys.bounds), False, 0.1)
    exact, exact_lse = reference.forward(*(x.double().cpu() for x in (q[:40], k, v)), host)
    assert relative_error(out, exact) <= 2**-7
    assert relative_error(lse, exact_lse) <= 2**-7


def test_a_million_tokens_do_not_overflow(kernel, device, small):
    """2^20 tokens x 32 heads x 128 are more elements than 32 bits can count: the last document is as if alone."""
    total, heads, length = (1 << 12, 2, 512) if small else (1 << 20, 32, 4096)
    documents = Documents.of(tuple(range(0, total + 1, length)), device)
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((total, heads, 128), (total, 1, 128), (total, 1, 128), (total, heads, 128))
    inputs = [torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16) for s in shapes]
    ours = whole(documents, inputs, kernel.backend, 0.09)
    alone = whole(Documents.of((0, length), device), [x[-length:] for x in inputs], kernel.backend, 0.09)
    for name, mine, theirs in zip(RESULTS, ours, alone, strict=True):
        last = mine[:, -length:] if name == "log-sum-exp" else mine[-length:]
        assert (last.float() - theirs.float()).norm() <= 2**-7 * theirs.float().norm(), name


def test_a_document_of_a_million_tokens_does_not_overflow(kernel, device, small):
    """The same of one document, whose queries see few keys: as if the last of them were alone."""
    total, heads, last = (1 << 12, 2, 512) if small else (1 << 20, 32, 4096)
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((total, heads, 128), (128, 2, 128), (128, 2, 128), (total, heads, 128))
    inputs = [torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16) for s in shapes]
    found = []
    for queries in (total, last):
        q, k, v, dout = (x[-queries:] for x in inputs)
        segments = Segments(Documents.of((0, queries), device), Documents.of((0, 128), device), False, 0.09)
        out, lse = kernel.backend.forward(q, k, v, segments)
        dq, *_ = kernel.backend.backward(dout, q, k, v, out, lse, segments)
        found.append((out[-last:].float(), lse[:, -last:], dq[-last:].float()))
    for name, mine, theirs in zip(("output", "log-sum-exp", "dq"), *found, strict=True):
        assert (mine - theirs).norm() <= 2**-7 * theirs.norm(), name
