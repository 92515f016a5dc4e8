"""Attention backends and the loss against the obvious formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from fft.ops.attention import packed_attention, register_with_transformers
from fft.ops.backends import cpu, cuda, reference
from fft.ops.cross_entropy import IGNORE, Vocabulary, linear_cross_entropy
from fft.ops.documents import Documents, Segments, UnderWay


def documents_of(lengths) -> Documents:
    return Documents.of((0, *np.cumsum(lengths).tolist()))


def tensors(lengths, heads, kv_heads, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    shapes = ((total, heads, size), (total, kv_heads, size), (total, kv_heads, size), (total, heads, size))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_mask(q, k, v, lengths, scale):
    """Softmax over the whole row under a block-diagonal causal mask, in float64."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(document))
    seen = (document[:, None] == document) & (position[:, None] >= position)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


CASES = [([7], 2, 2), ([1, 1, 1], 2, 1), ([5, 1, 33, 2], 4, 2), ([64, 3], 4, 1)]


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [(reference, torch.float64, 1e-12), (cpu, torch.float64, 1e-12), (cpu, torch.float32, 1e-5)],
)
@pytest.mark.parametrize(("lengths", "heads", "kv_heads"), CASES)
def test_backends_equal_masked_softmax(backend, dtype, tolerance, lengths, heads, kv_heads):
    q, k, v, dout = tensors(lengths, heads, kv_heads, 8, dtype)
    scale = 0.3
    segments = Segments.within(documents_of(lengths), scale)
    out, lse = backend.forward(q, k, v, segments)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = by_mask(*leaves, lengths, scale)
    expected.backward(dout.double())
    grads = backend.backward(dout, q, k, v, out, lse, segments)
    for ours, theirs in zip((out, lse, *grads), (expected, expected_lse, *(x.grad for x in leaves)), strict=True):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=tolerance, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=6), st.data())
def test_documents_never_see_each_other(lengths, data):
    changed = data.draw(st.integers(0, len(lengths) - 1))
    start, stop = sum(lengths[:changed]), sum(lengths[: changed + 1])

    def run(shift):
        leaves = tensors(lengths, 4, 2, 8, torch.float32)
        for leaf in leaves[:3]:
            leaf[start:stop] += shift
            leaf.requires_grad_()
        out = packed_attention(*leaves[:3], documents_of(lengths), 0.4)
        out.backward(leaves[3])
        return out.detach(), *(leaf.grad for leaf in leaves[:3])

    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[start:stop] = False
    for before, after in zip(run(0.0), run(1.0), strict=True):
        assert torch.equal(before[others], after[others])  # bitwise


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_packed_model_equals_documents_alone(model_type):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(model_type, **sizes, **heads, initializer_range=0.2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    lengths = [5, 1, 11]
    ids, documents = torch.randint(50, (1, 17)), documents_of(lengths)
    alone = torch.cat([model(piece[None]).logits[0] for piece in ids[0].split(lengths)])
    model.set_attn_implementation(register_with_transformers())
    packed = model(ids, position_ids=documents.positions()[None], documents=documents).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_padded_boundaries():
    documents = Documents.from_padded(torch.tensor([0, 3, 4, *[9] * 7], dtype=torch.int32))
    assert documents.bounds == (0, 3, 4, 9)
    assert documents.max_length == 5
    assert documents.positions().tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]


def test_documents_of_a_micro_batch_under_way_are_looked_at_once(monkeypatch):
    """A recomputation is given another tensor of the same memory; what the host was told is not read anywhere."""
    first, second, third = (torch.tensor([0, n, *[9] * 8], dtype=torch.int32) for n in (3, 4, 5))
    under_way, made = UnderWay(kept=2), []

    def make(cu_seqlens: torch.Tensor, host: list[int] | None) -> list[int]:
        documents = Documents.from_padded(cu_seqlens, host)
        made.append(documents.bounds)
        return [documents.bounds[1]]

    under_way.expect([0, 7, *[9] * 8])
    under_way.start()
    under_way.expect(first.tolist())
    under_way.expect(second.tolist())
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "tolist", None)
        ours = under_way.of(first, make)
        assert ours == [3]
        assert under_way.of(first.detach(), make) is ours
        assert under_way.of(second, make) == [4]
        assert under_way.of(first.detach(), make) is ours
    assert under_way.of(third, make) == [5]  # of this nobody was told: a stage in the middle
    assert made == [(0, 3, 9), (0, 4, 9), (0, 5, 9)]
    assert under_way.of(first, make) is not ours  # two are known, the last ones
    third[1] = 6
    assert under_way.of(third, make) == [6]


@pytest.mark.parametrize("causal", [True, False])
def test_cuda_backend_calls_operators_as_they_are(causal):
    """Without a GPU: the meta kernels accept the very calls of the backend and give the contract's shapes."""
    queries = Documents.of((0, 5, 6, 39), "meta")
    keys = queries if causal else Documents.of((0, 7, 50, 60), "meta")
    q, dout = (torch.empty(39, 4, 64, device="meta", dtype=torch.bfloat16) for _ in "qd")
    k, v = (torch.empty(keys.bounds[-1], 2, 64, device="meta", dtype=torch.bfloat16) for _ in "kv")
    segments = Segments(queries, keys, causal, 0.1)
    out, lse = cuda.forward(q, k, v, segments)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (4, 39), torch.float32)
    grads = cuda.backward(dout, q, k, v, out, lse, segments)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("chunk", [1, 70, 1 << 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_linear_cross_entropy_equals_torch(chunk, dtype, tolerance, monkeypatch):
    monkeypatch.setattr("fft.ops.cross_entropy.PIECE", chunk * dtype.itemsize)
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 8, dtype=dtype), torch.randn(31, 8, dtype=dtype)
    labels = torch.randint(31, (23,)).masked_fill(torch.rand(23) < 0.3, IGNORE)
    results, each = [], []
    for loss in (
        lambda h, w: linear_cross_entropy(h, w, labels, each=each),
        lambda h, w: torch.nn.functional.cross_entropy(h @ w.t(), labels, reduction="sum", ignore_index=IGNORE),
    ):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = loss(*leaves)
        (value * 0.7).backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none", ignore_index=IGNORE)
    (told,) = each
    assert not told.requires_grad
    torch.testing.assert_close(told, expected[labels != IGNORE], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cap", [None, 1.5])
def test_a_bias_and_capped_logits_equal_torch(cap, monkeypatch):
    monkeypatch.setattr("fft.ops.cross_entropy.PIECE", 70 * 8)
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((23, 8), (31, 8), (31,))]
    labels = torch.randint(31, (23,)).masked_fill(torch.rand(23) < 0.3, IGNORE)

    def plain(hidden, weight, bias):
        logits = hidden @ weight.t() + bias
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)

    results = []
    for loss in (lambda h, w, b: linear_cross_entropy(h, w, labels, Vocabulary(cap=cap), b), plain):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = loss(*leaves)
        (value * 0.7).backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_nothing_trained_costs_nothing():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((4,), IGNORE))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_bf16_weight_s_gradient_is_summed_over_chunks_in_fp32(monkeypatch):
    """A token a chunk: what bf16 would drop of 512 small summands is there."""
    monkeypatch.setattr("fft.ops.cross_entropy.PIECE", 1)
    torch.manual_seed(0)
    hidden, labels = torch.rand(512, 16).bfloat16(), torch.randint(11, (512,))
    exact = torch.randn(11, 16).bfloat16().float().requires_grad_()
    ours = exact.detach().bfloat16().requires_grad_()
    linear_cross_entropy(hidden.float(), exact, labels).backward()
    linear_cross_entropy(hidden, ours, labels).backward()
    assert (ours.grad.float() - exact.grad).norm() < 2**-8 * exact.grad.norm()


def test_the_loss_of_half_logits_is_summed_in_fp32():
    """Logits are rounded, as the matrix product gives them; log-sum-exp and the sum over tokens are not."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 16).bfloat16(), torch.randn(97, 16).bfloat16()
    labels = torch.randint(97, (64,))
    expected = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), expected, rtol=1e-6, atol=0)


def test_bf16_gradients_are_rounded_once():
    """A factor that bf16 cannot hold changes a gradient by its last bit at most, not all of it in one direction."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 16).bfloat16(), torch.randn(97, 16).bfloat16()
    labels, factor = torch.randint(97, (64,)), 1 / 3
    exact, ours = hidden.float().requires_grad_(), hidden.clone().requires_grad_()
    (linear_cross_entropy(exact, weight.float(), labels) * factor).backward()
    (linear_cross_entropy(ours, weight, labels) * factor).backward()
    ratio = float((ours.grad.double() * exact.grad).sum() / (exact.grad.double() ** 2).sum())
    assert abs(ratio - 1) < 2**-10  # bf16(1/3) * 3 is off by 2^-9
