"""The CUDA backends that are installed, and the ring's arithmetic on them, against the float64 reference and one whole
call; and Liger's operators, where they are installed.
"""

import itertools

import pytest
import torch
from unit.ops.test_ring import documents_of, emulate, tensors, whole

from fft.ops import fused
from fft.ops.backends import reference
from fft.ops.backends.choice import KERNELS, choose
from fft.ops.documents import Documents, Segments
from fft.parallel.ring_plan import plan_shards

DEVICE = torch.device("cuda", 0)
BACKENDS = [kernel.backend for kernel in KERNELS.values() if kernel.device == "cuda" and kernel.is_installed()]


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.__name__.rpartition(".")[2])
def backend(request):
    """Each kernel that is installed."""
    return request.param


def on_gpu(documents: Documents) -> Documents:
    return Documents.of(documents.bounds, DEVICE)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_pass_their_check(backend, dtype, size):
    assert choose(DEVICE, dtype, backend.__name__.rpartition(".")[2], size) is backend


def test_a_kernel_is_chosen():
    assert choose(DEVICE, torch.bfloat16) in BACKENDS
    assert choose(DEVICE, torch.float32) is reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_operators_pass_their_check(dtype):
    operators = fused.fused_ops("cuda")
    if operators is None:
        pytest.skip("liger-kernel is not installed")
    fused.check_operators(operators, DEVICE, dtype)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("size", [64, 128])
def test_rectangles_with_an_outer_softmax_add_up(backend, kv_heads, size):
    """Two halves of the keys, backward with the whole's out and lse: gradients add to those of one call."""
    queries, keys = documents_of([3, 200, 77]), documents_of([130, 64, 300])
    q, _, _, dout = (x.to(DEVICE) for x in tensors(280, 8, kv_heads, size, torch.bfloat16))
    _, k, v, _ = (x.to(DEVICE) for x in tensors(494, 8, kv_heads, size, torch.bfloat16, seed=1))
    segments = Segments(on_gpu(queries), on_gpu(keys), False, 0.1)
    out, lse = backend.forward(q, k, v, segments)
    dq, dk, dv = backend.backward(dout, q, k, v, out, lse, segments)
    summed = torch.zeros_like(dq, dtype=torch.float32)
    for (a, b), (c, d) in zip(itertools.pairwise(queries.bounds), itertools.pairwise(keys.bounds), strict=True):
        middle = (c + d) // 2
        for lo, hi in ((c, middle), (middle, d)):
            ends = Documents.of((0, b - a), DEVICE), Documents.of((0, hi - lo), DEVICE)
            inputs = (dout[a:b], q[a:b], k[lo:hi], v[lo:hi], out[a:b], lse[:, a:b].contiguous())
            part, part_k, part_v = backend.backward(*inputs, Segments(*ends, False, 0.1))
            summed[a:b] += part
            for ours, theirs in ((part_k, dk), (part_v, dv)):
                assert (ours.float() - theirs[lo:hi].float()).norm() <= 2**-6 * theirs[lo:hi].float().norm()
    assert (summed - dq.float()).norm() <= 2**-6 * dq.float().norm()


def test_documents_without_queries_are_passed_over(backend):
    queries, keys = Documents.of((0, 5, 5, 40), DEVICE), Documents.of((0, 9, 20, 60), DEVICE)
    q, k, v, _ = (x.to(DEVICE) for x in tensors(60, 4, 2, 64, torch.bfloat16))
    segments = Segments(queries, keys, False, 0.1)
    out, lse = backend.forward(q[:40], k, v, segments)
    exact, exact_lse = reference.forward(*(x.double() for x in (q[:40], k, v)), segments)
    assert (out.double() - exact).norm() <= 2**-7 * exact.norm()
    assert (lse.double() - exact_lse).norm() <= 2**-7 * exact_lse.norm()


@pytest.mark.parametrize("ranks", [2, 4, 8, 32])
def test_ring_is_as_good_as_the_single_kernel(backend, ranks):
    documents, inputs = documents_of([1300, 48, 700, 1, 2047]), tensors(4096, 8, 2, 64, torch.bfloat16)
    exact = whole(documents, [x.double() for x in inputs], reference, 0.125)
    on_device = [x.to(DEVICE) for x in inputs]
    single = whole(on_gpu(documents), on_device, backend, 0.125)
    ring = emulate(plan_shards(documents.bounds, ranks), on_device, backend, 0.125)
    for name, mine, theirs, true in zip(["out", "lse", "dq", "dk", "dv"], ring, single, exact, strict=True):
        ours, kernel = ((x.double().cpu() - true).norm() for x in (mine, theirs))
        assert ours <= 1.25 * kernel + 1e-6 * true.norm(), f"{name}: {ours / kernel:.3f}"


def test_documents_never_see_each_other(backend):
    documents, inputs = documents_of([1300, 48, 700]), tensors(2048, 4, 2, 64, torch.bfloat16)
    inputs = [x.to(DEVICE) for x in inputs]
    shards = plan_shards(documents.bounds, 4)
    before = emulate(shards, inputs, backend, 0.125)[0]
    for x in inputs:
        x[1300:1348] += 1
    after = emulate(shards, inputs, backend, 0.125)[0]
    assert torch.equal(before[:1300], after[:1300])
    assert torch.equal(before[1348:], after[1348:])


def test_a_million_tokens_do_not_overflow(backend):
    """2^20 tokens x 32 heads x 128 are more elements than 32 bits can count: the last document is as if alone."""
    total, length = 1 << 20, 4096
    segments = Segments.within(Documents.of(tuple(range(0, total + 1, length)), DEVICE), 0.09)
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = ((total, 32, 128), (total, 1, 128), (total, 1, 128), (total, 32, 128))
    q, k, v, dout = (torch.randn(s, generator=generator, device=DEVICE, dtype=torch.bfloat16) for s in shapes)
    out, lse = backend.forward(q, k, v, segments)
    grads = backend.backward(dout, q, k, v, out, lse, segments)
    one, last = Segments.within(Documents.of((0, length), DEVICE), 0.09), slice(total - length, total)
    alone, alone_lse = backend.forward(q[last], k[last], v[last], one)
    expected = backend.backward(dout[last], q[last], k[last], v[last], alone, alone_lse, one)
    for ours, theirs in zip((out, *grads), (alone, *expected), strict=True):
        assert (ours[last].float() - theirs.float()).norm() <= 2**-7 * theirs.float().norm()
