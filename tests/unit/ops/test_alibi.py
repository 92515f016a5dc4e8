"""ALiBi by wider heads is ALiBi, on every kernel that runs here, in every precision, also for long documents."""

from itertools import pairwise

import pytest
import torch

from fft.ops.alibi import COLUMNS, LONGEST, alibi_slopes, widened
from fft.ops.attention import hf_attention
from fft.ops.documents import Documents

BOUNDS = (0, 5, 6, 30, 400)
HEADS, SIZE = 6, 16


def plain(q, k, v, slopes, scale):
    """A document at a time, scores with slope * (key - query); [tokens, heads, size], in float64."""
    out = []
    for a, b in pairwise(BOUNDS):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
        at = torch.arange(b - a)
        scores = scores + torch.tensor(slopes).double()[:, None, None] * (at - at[:, None])
        weights = scores.masked_fill(at > at[:, None], float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[a:b]))
    return torch.cat(out)


@pytest.mark.parametrize(
    ("dtype", "attention", "tolerance"),
    [
        (torch.float64, "reference", 1e-12),
        (torch.float32, "reference", 2e-5),
        (torch.float32, "cpu", 2e-5),
        (torch.bfloat16, "cpu", 0.03),
    ],
)
def test_attention_and_its_gradients_are_those_with_alibi(dtype, attention, tolerance):
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(BOUNDS[-1], HEADS, SIZE, generator=generator).to(dtype) for _ in range(4)]
    ours = [x.clone().requires_grad_() for x in given[:3]]
    theirs = [x.double().requires_grad_() for x in given[:3]]
    slopes, documents = alibi_slopes(HEADS), Documents.of(BOUNDS)
    out, _ = hf_attention(
        None,
        *(x.transpose(0, 1)[None] for x in ours),
        None,
        SIZE**-0.5,
        documents,
        attention=attention,
        position_ids=documents.positions()[None],
        alibi=slopes,
    )
    expected = plain(*theirs, slopes, SIZE**-0.5)
    torch.testing.assert_close(out[0].double(), expected, rtol=0, atol=tolerance)
    out[0].backward(given[3])
    expected.backward(given[3].double())
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-4), (torch.float16, 1e-5), (torch.float32, 1e-6)])
def test_what_is_added_to_a_score_is_exact_in_half_precision(dtype, tolerance):
    positions, slopes, scale = torch.tensor([0, 1, 255, 256, 257, 4095, LONGEST - 1]), alibi_slopes(40), 128**-0.5
    zeros = torch.zeros(len(positions), 40, 128, dtype=dtype)
    q, k, v = widened(zeros, zeros, zeros, positions, slopes, scale)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 128 + COLUMNS
    added = torch.einsum("qhd,khd->hqk", q.double(), k.double())[:, 0] * scale
    expected = torch.outer(torch.tensor(slopes).double(), positions.double())
    torch.testing.assert_close(added, expected, rtol=tolerance, atol=0)


def test_slopes_are_the_published_ones():
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    forty = alibi_slopes(40)
    assert len(forty) == 40
    assert forty[0] == pytest.approx(2**-0.25)
    assert forty[31] == 2**-8
    assert forty[32] == pytest.approx(2**-0.125)
    assert [round(s, 5) for s in forty[-3:]] == [0.38555, 0.32421, 0.27263]


def test_alibi_without_positions_is_refused():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="needs the positions"):
        hf_attention(None, q, q, q, None, 1.0, Documents.of((0, 4)), alibi=(0.5, 0.25))
