"""cuDNN's attention without a GPU: its calls fit torch's schemas, on stand-ins that compute what cuDNN documents."""

from types import SimpleNamespace

import pytest
import torch
from test_attention import documents_of, random

from fft.errors import UserError
from fft.ops.backends import cuda, cudnn, reference
from fft.ops.backends.choice import KERNELS, check_backend
from fft.ops.documents import Documents, Segments

NAMES = ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward")
SCHEMAS = {name: getattr(torch.ops.aten, name).default._schema for name in NAMES}


def given(name, args, kwargs):
    """A call's arguments by name; it fits the schema."""
    expected = SCHEMAS[name].arguments
    found = dict(zip([x.name for x in expected if not x.kwarg_only], args, strict=False)) | kwargs
    missing = [x.name for x in expected if x.name not in found and not x.has_default_value()]
    assert found.keys() <= {x.name for x in expected}
    assert missing == []
    return found


def rows(x):
    """[1, heads, tokens, size] -> [tokens, heads, size]."""
    assert x.ndim == 4
    assert len(x) == 1
    assert x.stride(-1) == 1
    return x[0].transpose(0, 1)


class StandIn:
    """The two operators, on one document; what is computed is counted."""

    def __init__(self):
        self.lengths = []

    def forward(self, *args, **kwargs):
        x = given(NAMES[0], args, kwargs)
        assert (x["attn_bias"], x["compute_log_sumexp"], x["dropout_p"], x["is_causal"]) == (None, True, 0.0, True)
        q, k, v = (rows(x[name]) for name in ("query", "key", "value"))
        self.lengths.append(len(q))
        out, lse = reference.forward(q, k, v, Segments.within(Documents.of((0, len(q))), x["scale"]))
        out = out.transpose(0, 1)[None]
        return out, lse[None, ..., None], None, None, len(q), len(q), out.new_empty(()), out.new_empty(()), None

    def backward(self, *args, **kwargs):
        x = given(NAMES[1], args, kwargs)
        q, k, v, out, dout = (rows(x[name]) for name in ("query", "key", "value", "out", "grad_out"))
        assert (x["max_q"], x["max_k"], x["dropout_p"], x["is_causal"]) == (len(q), len(q), 0.0, True)
        assert x["attn_bias"] is x["cum_seq_q"] is x["cum_seq_k"] is None
        lse = x["logsumexp"]
        assert lse.is_contiguous()
        segments = Segments.within(Documents.of((0, len(q))), x["scale"])
        found = reference.backward(dout, q, k, v, out, lse[0, ..., 0], segments)
        return tuple(grad.transpose(0, 1)[None] for grad in found)


@pytest.fixture
def stand_in(monkeypatch):
    made = StandIn()
    operators = SimpleNamespace(**{NAMES[0]: made.forward, NAMES[1]: made.backward})
    used = {name: getattr(torch, name) for name in ("empty_like", "empty", "int64", "contiguous_format")}
    monkeypatch.setattr(cudnn, "torch", SimpleNamespace(ops=SimpleNamespace(aten=operators), **used))
    monkeypatch.setattr(cudnn, "cuda", reference)  # for what is not its own
    return made


@pytest.mark.parametrize("bounds", [(0, 40), (0, 33, 33, 80), (0, 1, 100), (0, 64, 100)])
def test_long_documents_give_the_reference(stand_in, monkeypatch, bounds):
    monkeypatch.setattr(cudnn, "LONG", 20)
    monkeypatch.setattr(cudnn, "SHORTEST", 16)
    documents = documents_of(*bounds)
    q, k, v, dout = (random((bounds[-1], heads, 8), seed) for seed, heads in enumerate((4, 2, 2, 4)))
    results = []
    for tested in (cudnn, reference):
        out, lse = tested.forward(q, k, v, Segments.within(documents, 0.4))
        results.append((out, lse, *tested.backward(dout, q, k, v, out, lse, Segments.within(documents, 0.4))))
    assert stand_in.lengths
    assert all(length % 16 == 0 for length in stand_in.lengths)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_it_passes_the_check_by_its_own_kernel(stand_in, monkeypatch):
    monkeypatch.setattr(cudnn, "LONG", 200)
    check_backend(cudnn, torch.device("cpu"), torch.bfloat16)
    assert stand_in.lengths == [256, 256]


def test_the_check_finds_a_kernel_that_is_wrong(stand_in, monkeypatch):
    def wrong(*args, **kwargs):
        out, lse, *rest = stand_in.forward(*args, **kwargs)
        return out, 1.1 * lse, *rest

    monkeypatch.setattr(cudnn, "LONG", 200)
    cudnn.torch.ops.aten._scaled_dot_product_cudnn_attention = wrong
    with pytest.raises(UserError, match=r"the cudnn attention kernel of cpu .* differs from the reference"):
        check_backend(cudnn, torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_short_or_not_causal_is_not_its_own(stand_in, causal):
    documents = documents_of(0, 3000, 3004) if causal else documents_of(0, 3000)
    q = random((documents.bounds[-1], 2, 8))
    cudnn.forward(q, q, q, Segments(documents, documents, causal, 0.4))
    assert stand_in.lengths == []


@pytest.mark.parametrize("heads", [15, 16])
def test_documents_that_31_bits_cannot_count_are_not_its_own(heads, monkeypatch):
    others = []
    monkeypatch.setattr(cudnn, "cuda", SimpleNamespace(forward=lambda q, *_: others.append(q) or (q, q)))
    q = torch.empty(1 << 20, heads, 128, device="meta", dtype=torch.bfloat16)
    cudnn.forward(q, q, q, Segments.within(Documents.of((0, 1 << 20), "meta"), 0.1))
    assert len(others) == (heads == 16)


def test_lengths_are_few_and_little_longer():
    lengths = {tokens: cudnn.computed(tokens) for tokens in range(1, 1 << 17)}
    assert all(tokens <= length <= max(128, tokens * 17 / 16) + 128 for tokens, length in lengths.items())
    assert all(length <= tokens * 17 / 16 for tokens, length in lengths.items() if tokens > 2048)
    assert len({length for length in lengths.values() if length <= 1 << 15}) < 100
    assert lengths[1 << 15] == 1 << 15


def test_shapes_of_the_kernels_without_memory():
    """torch's own meta kernels take the calls, so sizes and types of what is returned are those documented."""
    q, k = (torch.empty(5000, heads, 128, device="meta", dtype=torch.bfloat16) for heads in (8, 2))
    segments = Segments.within(Documents.of((0, 5000), "meta"), 128**-0.5)
    out, lse = cudnn.forward(q, k, k, segments)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (8, 5000), torch.float32)
    grads = cudnn.backward(out, q, k, k, out, lse, segments)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]


def test_it_is_not_chosen_unasked():
    assert KERNELS["cudnn"].asked
    assert list(KERNELS.values()).index(KERNELS["cudnn"]) > [x.backend for x in KERNELS.values()].index(cuda)
