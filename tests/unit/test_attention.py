"""What the attention operator promises beyond its formula: precision, devices, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.ops.attention import CpuBackend, Documents, ReferenceBackend, backend_for, hf_attention, packed_attention


def random(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def documents_of(*bounds) -> Documents:
    return Documents(torch.tensor(bounds, dtype=torch.int32), bounds)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2]),
    groups=st.integers(1, 3),
    size=st.sampled_from([1, 8, 24]),
    seed=st.integers(0, 9),
)
def test_backends_agree_on_any_documents(lengths, kv_heads, groups, size, seed):
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    documents, shape = documents_of(*bounds), (bounds[-1], kv_heads, size)
    q, dout = (random((bounds[-1], kv_heads * groups, size), seed + i) for i in (0, 1))
    k, v = random(shape, seed + 2), random(shape, seed + 3)
    results = []
    for backend in (ReferenceBackend, CpuBackend):
        out, lse = backend.forward(q, k, v, documents, 0.4)
        results.append((out, lse, *backend.backward(dout, q, k, v, out, lse, documents, 0.4)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_reference_passes_gradcheck():
    """Gradients are written by hand; finite differences know nothing of that."""
    q, k, v = (random((7, heads, 3), seed).requires_grad_() for seed, heads in enumerate((4, 2, 2)))
    documents = documents_of(0, 4, 5, 7)
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, documents, 0.5, ReferenceBackend), (q, k, v))


def test_bf16_is_as_good_as_bf16_can_be():
    """Scores and sums are float32: outputs are off by their own rounding (2^-9) and that of the weights, no more."""
    documents = documents_of(0, 50, 51, 200)
    q, k, v, dout = (random((200, heads, 16), seed).bfloat16() for seed, heads in enumerate((4, 2, 2, 4)))
    for backend in (ReferenceBackend, CpuBackend):
        out, lse = backend.forward(q, k, v, documents, 0.25)
        grads = backend.backward(dout, q, k, v, out, lse, documents, 0.25)
        assert lse.dtype == torch.float32
        exact, exact_lse = ReferenceBackend.forward(q.double(), k.double(), v.double(), documents, 0.25)
        inputs = (x.double() for x in (dout, q, k, v))
        exact_grads = ReferenceBackend.backward(*inputs, exact, exact_lse, documents, 0.25)
        for ours, theirs in zip((out, *grads), (exact, *exact_grads), strict=True):
            assert ours.dtype == torch.bfloat16
            assert (ours.double() - theirs).norm() < 2**-7 * theirs.norm()


def test_each_device_gets_its_backend():
    assert backend_for(torch.empty(0)) is CpuBackend
    assert backend_for(torch.empty(0, dtype=torch.float64)) is ReferenceBackend  # the kernels of GPUs have none
    assert backend_for(torch.empty(0, device="meta")) is ReferenceBackend


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "no mask"),
        ({"dropout": 0.1}, "no dropout"),
        ({"softcap": 50.0}, "caps no scores"),
        ({"s_aux": torch.zeros(2)}, "no attention sinks"),
        ({"sliding_window": 2}, "3 tokens exceed 2"),
    ],
)
def test_what_a_model_would_silently_not_get_is_refused(asked, sentence):
    q = torch.zeros(1, 2, 4, 8)
    given = {"attention_mask": None, "scaling": 1.0, "documents": documents_of(0, 3, 4)}
    assert hf_attention(None, q, q, q, **given, sliding_window=3)[0].shape == (1, 4, 2, 8)
    with pytest.raises(ValueError, match=sentence):
        hf_attention(None, q, q, q, **{**given, **asked})
