"""Windows, attention sinks and capped scores against a dense mask in float64: packed, and in a ring of threads."""

import pytest
import torch
from device.rings import documents_of, emulate, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.errors import UserError
from fft.ops.attention import packed_attention
from fft.ops.backends import cpu, reference
from fft.ops.documents import Softmax
from fft.ops.ring import gradient_of_sinks, with_sinks
from fft.parallel.ring_plan import plan_shards
from fft.parallel.window_plan import main, plan_attention

SCALE = 0.3


def dense(lengths, inputs, window=None, sinks=None, cap=None):
    """``(out, lse)`` and gradients of q, k, v and sinks by plain algebra, from a mask that says all."""
    q, k, v, dout = inputs
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    sink = None if sinks is None else sinks.clone().requires_grad_()
    groups = q.shape[1] // k.shape[1]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(len(document))
    seen = (document[:, None] == document) & (at[:, None] >= at)
    if window is not None:
        seen &= at[:, None] - at < window
    key, value = (x.repeat_interleave(groups, 1) for x in leaves[1:])
    scores = torch.einsum("ihd,jhd->hij", leaves[0], key) * SCALE
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink[:, None])
    out = torch.einsum("hij,jhd->ihd", (scores - lse[..., None]).exp(), value)
    out.backward(dout)
    return out.detach(), lse.detach(), *(x.grad for x in leaves), *([] if sink is None else [sink.grad])


LENGTHS = {
    "one document": [96],
    "many": [5, 40, 1, 17, 33],
    "a window to the token": [8, 16, 9, 7, 24, 32],
    "boundaries on cuts": [16, 16, 32, 32],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [1, 2, 3, 8, 9, 17, 95])
@pytest.mark.parametrize(("ranks", "chunks"), [(1, None), (2, 1), (2, 2), (4, 1), (4, 3)])
def test_windows_equal_a_mask(lengths, window, ranks, chunks):
    documents, inputs = documents_of(lengths), tensors(sum(lengths), 4, 2, 8)
    ours = emulate(plan_shards(documents.bounds, ranks, chunks), inputs, cpu, SCALE, window)
    for mine, theirs in zip(ours, dense(lengths, inputs, window), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("ranks", "chunks"), [(1, None), (2, 2), (3, 1), (4, 3)])
def test_capped_scores_equal_a_mask(lengths, window, ranks, chunks):
    documents, inputs = documents_of(lengths), tensors(sum(lengths), 4, 2, 8)
    ours = emulate(plan_shards(documents.bounds, ranks, chunks), inputs, reference, SCALE, window, 0.7)
    for mine, theirs in zip(ours, dense(lengths, inputs, window, cap=0.7), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_long_documents_are_capped_block_by_block():
    """Longer than what the reference holds the scores of at once."""
    lengths = [1100, 3, 513]
    inputs = tensors(sum(lengths), 2, 1, 4)
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = packed_attention(*leaves, documents_of(lengths), SCALE, softmax=Softmax(cap=0.7))
    out.backward(inputs[3])
    true, _, *grads = dense(lengths, inputs, cap=0.7)
    for mine, theirs in zip([out.detach(), *(x.grad for x in leaves)], [true, *grads], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    window=st.integers(1, 60),
    ranks=st.integers(1, 5),
    chunks=st.integers(1, 4),
    sunk=st.booleans(),
    cap=st.sampled_from([None, 0.5, 3.0]),
)
def test_windows_sinks_and_caps_equal_a_mask_for_any_documents(lengths, window, ranks, chunks, sunk, cap):
    lengths = [*lengths, max(1, ranks * chunks - sum(lengths))]
    documents, inputs = documents_of(lengths), tensors(sum(lengths), 4, 2, 8)
    sinks = torch.randn(4, dtype=torch.float64) if sunk else None
    expected = dense(lengths, inputs, window, sinks, cap)
    if ranks > 1 and not sunk:
        ours = emulate(plan_shards(documents.bounds, ranks, chunks), inputs, reference, SCALE, window, cap)
    else:
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        leaf = None if sinks is None else sinks.clone().requires_grad_()
        out = packed_attention(*leaves, documents, SCALE, None if cap else cpu, Softmax(window, leaf, cap))
        out.backward(inputs[3])
        ours = out.detach(), expected[1], *(x.grad for x in leaves), *([] if leaf is None else [leaf.grad])
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_of_sinks_are_those_of_autograd():
    torch.manual_seed(0)
    out, lse, sinks = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((7, 4, 8), (4, 7), (4,)))
    dout = torch.randn(7, 4, 8, dtype=torch.float64)
    result, total = with_sinks(out, lse, sinks)
    (expected,) = torch.autograd.grad(result, sinks, dout)
    torch.testing.assert_close(gradient_of_sinks(dout, result, total, sinks), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("window", "ranks"), [(4096, 4), (512, 8)])
def test_a_window_makes_the_ring_cheaper(window, ranks):
    """Pairs are counted once each; of keys there travel those within reach of a stretch's first query, no more."""
    length = 32768
    shards = plan_shards((0, length), ranks, 1)
    plans = [plan_attention(shards, rank, window) for rank in range(ranks)]
    whole = [plan_attention(shards, rank) for rank in range(ranks)]
    pairs = window * (window + 1) // 2 + (length - window) * window
    own = sum((b - a) * (b - a + 1) // 2 for plan in plans for a, b in zip(plan.bounds, plan.bounds[1:], strict=False))
    others = sum(call.area for plan in plans for call in plan.near)
    others += sum(call.area for plan in plans for step in plan.steps for call in step.calls)
    assert own + others == pairs
    received = [sum(step.received for step in plan.steps) for plan in plans]
    assert received == [0] + [window - 1] * (ranks - 1)
    assert sum(received) < sum(step.received for plan in whole for step in plan.steps) / (2 * ranks / 4)
    assert max(plan.calls for plan in plans) <= 6


def test_a_window_as_long_as_the_documents_is_none():
    shards = plan_shards((0, 16, 32), 2, 1)
    assert plan_attention(shards, 1, 16) is plan_attention(shards, 1)


def test_what_a_window_spares_is_printed(capsys):
    main(["100", "--ranks", "2", "--window", "11"])
    _, *rows = capsys.readouterr().out.splitlines()
    pairs = [[int(number.replace(",", "")) for number in row.split()[1:]] for row in rows]
    assert sum(row[0] for row in pairs) == 100 * 101 // 2
    assert sum(row[1] for row in pairs) == 11 * 12 // 2 + 89 * 11
    assert all(row[5] <= 2 * 10 <= row[4] for row in pairs)
    with pytest.raises(UserError, match="must be at least 1"):
        main(["100", "--window", "0"])
    with pytest.raises(UserError, match="give longer documents"):
        main(["2", "--ranks", "4", "--window", "3"])
