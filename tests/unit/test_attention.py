"""What the attention operator promises beyond its formula: precision, devices, refusals."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.errors import UserError
from fft.ops.attention import hf_attention, packed_attention
from fft.ops.backends import cpu, reference
from fft.ops.backends.choice import check, choose
from fft.ops.documents import Documents, paired_spans


def random(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def documents_of(*bounds) -> Documents:
    return Documents.of(bounds)


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
    for backend in (reference, cpu):
        out, lse = backend.forward(q, k, v, documents, documents, True, 0.4)
        results.append((out, lse, *backend.backward(dout, q, k, v, out, lse, documents, documents, True, 0.4)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), min_size=1, max_size=4),
    split=st.integers(1, 29),
    backend=st.sampled_from([reference, cpu]),
)
def test_parts_of_a_softmax_add_up(lengths, split, backend):
    """Rectangles over the first and the other keys of each document, given the whole's out and lse, make the whole."""

    def cumulative(values):
        return tuple(itertools.accumulate(values, initial=0))

    queries, keys = Documents.of(cumulative(a for a, _ in lengths)), Documents.of(cumulative(b for _, b in lengths))
    q, dout = random((queries.bounds[-1], 4, 8)), random((queries.bounds[-1], 4, 8), 1)
    k, v = random((keys.bounds[-1], 2, 8), 2), random((keys.bounds[-1], 2, 8), 3)
    out, lse = backend.forward(q, k, v, queries, keys, False, 0.4)
    whole = backend.backward(dout, q, k, v, out, lse, queries, keys, False, 0.4)
    total = [torch.zeros_like(x) for x in whole]
    for q_span, k_span in paired_spans(queries, keys):
        for part in (slice(k_span.start, k_span.start + split), slice(k_span.start + split, k_span.stop)):
            part = slice(part.start, min(part.stop, k_span.stop))
            if part.start >= part.stop:
                continue
            ends = Documents.of((0, q_span.stop - q_span.start)), Documents.of((0, part.stop - part.start))
            given = (dout[q_span], q[q_span], k[part], v[part], out[q_span], lse[:, q_span])
            grads = backend.backward(*given, *ends, False, 0.4)
            for sums, rows, grad in zip(total, (q_span, part, part), grads, strict=True):
                sums[rows] += grad
    for ours, theirs in zip(total, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_queries_without_keys_are_refused():
    with pytest.raises(ValueError, match="queries 3 to 5 have no keys"):
        paired_spans(documents_of(0, 3, 5), documents_of(0, 2, 2))


def test_reference_passes_gradcheck():
    """Gradients are written by hand; finite differences know nothing of that."""
    q, k, v = (random((7, heads, 3), seed).requires_grad_() for seed, heads in enumerate((4, 2, 2)))
    documents = documents_of(0, 4, 5, 7)
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, documents, 0.5, reference), (q, k, v))


def test_bf16_is_as_good_as_bf16_can_be():
    """Scores and sums are float32: outputs are off by their own rounding (2^-9) and that of the weights, no more."""
    documents = documents_of(0, 50, 51, 200)
    q, k, v, dout = (random((200, heads, 16), seed).bfloat16() for seed, heads in enumerate((4, 2, 2, 4)))
    for backend in (reference, cpu):
        out, lse = backend.forward(q, k, v, documents, documents, True, 0.25)
        grads = backend.backward(dout, q, k, v, out, lse, documents, documents, True, 0.25)
        assert lse.dtype == torch.float32
        exact, exact_lse = reference.forward(q.double(), k.double(), v.double(), documents, documents, True, 0.25)
        inputs = (x.double() for x in (dout, q, k, v))
        exact_grads = reference.backward(*inputs, exact, exact_lse, documents, documents, True, 0.25)
        for ours, theirs in zip((out, *grads), (exact, *exact_grads), strict=True):
            assert ours.dtype == torch.bfloat16
            assert (ours.double() - theirs).norm() < 2**-7 * theirs.norm()


def test_each_device_gets_its_backend():
    device = torch.device("cpu")
    assert choose(device, torch.float32) is choose(device, torch.bfloat16) is cpu
    assert choose(device, torch.float64) is reference
    assert choose(torch.device("meta"), torch.bfloat16) is reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [reference, cpu])
def test_backends_pass_the_check(backend, dtype):
    check(backend, torch.device("cpu"), dtype)


@pytest.mark.parametrize("wrong", ["output", "log-sum-exp", "dq", "dk", "dv"])
def test_a_wrong_kernel_is_refused(wrong):
    class Wrong:
        __name__ = "fft.ops.backends.wrong"

        @staticmethod
        def forward(*inputs):
            out, lse = cpu.forward(*inputs)
            return (out * 1.02 if wrong == "output" else out), (lse + 0.2 if wrong == "log-sum-exp" else lse)

        @staticmethod
        def backward(*inputs):
            grads = cpu.backward(*inputs)
            return tuple(g * 1.02 if wrong == n else g for n, g in zip(("dq", "dk", "dv"), grads, strict=True))

    with pytest.raises(UserError, match=f"the wrong attention kernel of cpu in torch.float32 .*: {wrong} by"):
        check(Wrong(), torch.device("cpu"), torch.float32)


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
