"""What kernels do not take is made into what they take: the results are the same."""

import pytest
import torch

from fft.ops.backends import limits, reference
from fft.ops.backends.limits import backward_within, forward_within
from fft.ops.documents import Documents, Segments

TOKENS, SIZE = 40, 16


@pytest.mark.parametrize(
    ("heads", "kv_heads", "most", "calls"),
    [(8, 8, 3, 3), (8, 2, 4, 2), (8, 2, 7, 2), (8, 2, 3, 4), (6, 1, 4, 2), (6, 1, 1, 6), (6, 3, 5, 2), (6, 3, 6, 1)],
)
def test_heads_in_parts_add_up(heads, kv_heads, most, calls, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, heads, SIZE), (TOKENS, kv_heads, SIZE), (TOKENS, kv_heads, SIZE), (TOKENS, heads, SIZE))
    q, k, v, dout = (torch.randn(shape, generator=generator) for shape in shapes)
    segments = Segments.within(Documents.of((0, 1, 17, TOKENS)), 0.3)
    out, lse = reference.forward(q, k, v, segments)
    seen = []

    def counted(*inputs):
        seen.append(inputs[1].shape[1])
        assert inputs[1].shape[1] % inputs[2].shape[1] == 0
        return reference.backward(*inputs)

    # Three documents of 128 more tokens each, and heads of 16 that count as 64.
    monkeypatch.setattr(limits, "_LIMIT", (TOKENS + 3 * 128) * 64 * most + 1)
    ours = backward_within(counted, dout, q, k, v, out, lse, segments)
    assert (len(seen), sum(seen)) == (calls, heads)
    assert max(seen) <= most
    for mine, theirs in zip(ours, reference.backward(dout, q, k, v, out, lse, segments), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 12, 16, 100])
def test_heads_of_any_size_go_as_multiples_of_eight(size):
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(TOKENS, heads, size, generator=generator).double() for heads in (4, 2, 2, 4))
    segments = Segments.within(Documents.of((0, 1, 17, TOKENS)), 0.3)
    sizes = set()

    def forward(*inputs):
        sizes.update(x.shape[-1] for x in inputs[:3])
        return reference.forward(*inputs)

    def backward(*inputs):
        sizes.update(x.shape[-1] for x in inputs[:5])
        return reference.backward(*inputs)

    out, lse = forward_within(forward, q, k, v, segments)
    theirs = reference.forward(q, k, v, segments)
    gradients = backward_within(backward, dout, q, k, v, out, lse, segments)
    assert sizes == {-(-size // 8) * 8}
    expected = (*theirs, *reference.backward(dout, q, k, v, *theirs, segments))
    for mine, exact in zip((out, lse, *gradients), expected, strict=True):
        torch.testing.assert_close(mine, exact)
