"""The ring's arithmetic, ranks being threads of this process; `tests/distributed/test_ring_ranks.py` has real ones."""

import pytest
import torch
from device.rings import documents_of, emulate, tensors, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.errors import UserError
from fft.ops.backends import cpu, reference
from fft.ops.sequence_parallel import SequenceParallel
from fft.parallel.ring_plan import plan_shards

CASES = {
    "one-token documents": ([1] * 9 + [30, 1, 1], 4, 2),
    "longer than two ranks": ([5, 90, 5], 4, 2),
    "boundaries on cuts": ([16, 16, 32, 64], 4, 2),
    "not divisible by 2P": ([41, 60], 4, 2),
    "contiguous": ([70, 31], 3, 1),
    "many chunks": ([70, 31, 20, 8], 4, 7),
    "one document, chosen chunks": ([96], 4, None),
    "one rank": ([20, 31], 1, None),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [(reference, torch.float64, 1e-12), (cpu, torch.float64, 1e-12), (cpu, torch.float32, 1e-5)],
)
def test_ring_equals_one_process(name, backend, dtype, tolerance):
    lengths, ranks, chunks = CASES[name]
    documents, inputs = documents_of(lengths), tensors(sum(lengths), 4, 2, 8, dtype)
    ours = emulate(plan_shards(documents.bounds, ranks, chunks), inputs, backend, 0.3)
    for mine, theirs in zip(ours, whole(documents, inputs, backend, 0.3), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    ranks=st.integers(1, 6),
    chunks=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    size=st.sampled_from([1, 8, 24]),
    seed=st.integers(0, 9),
)
def test_ring_equals_one_process_for_any_documents(lengths, ranks, chunks, kv_heads, groups, size, seed):
    lengths = [*lengths, max(1, ranks * chunks - sum(lengths))]
    documents = documents_of(lengths)
    inputs = tensors(sum(lengths), kv_heads * groups, kv_heads, size, seed=seed)
    ours = emulate(plan_shards(documents.bounds, ranks, chunks), inputs, cpu, 0.4)
    for mine, theirs in zip(ours, whole(documents, inputs, reference, 0.4), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_bf16_is_as_good_as_the_single_kernel(ranks):
    """Errors against float64, of the ring and of one kernel over the whole row."""
    documents, inputs = documents_of([1300, 48, 700]), tensors(2048, 4, 2, 32, torch.bfloat16)
    exact = whole(documents, [x.double() for x in inputs], reference, 0.2)
    single = whole(documents, inputs, cpu, 0.2)
    ring = emulate(plan_shards(documents.bounds, ranks, 2), inputs, cpu, 0.2)
    for name, mine, theirs, true in zip(["out", "lse", "dq", "dk", "dv"], ring, single, exact, strict=True):
        ours, kernel = ((x.double() - true).norm() for x in (mine, theirs))
        assert ours <= 1.25 * kernel + 1e-7 * true.norm(), f"{name}: {ours / kernel:.3f}"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.integers(2, 4), st.data())
def test_documents_never_see_each_other(lengths, ranks, data):
    changed = data.draw(st.integers(0, len(lengths) - 1))
    start, stop = sum(lengths[:changed]), sum(lengths[: changed + 1])
    documents, inputs = documents_of([*lengths, 20]), tensors(sum(lengths) + 20, 4, 2, 8, torch.float32)
    shards = plan_shards(documents.bounds, ranks, 2)
    before = emulate(shards, inputs, cpu, 0.4)
    for x in inputs:
        x[start:stop] += 1.0
    others = torch.ones(len(inputs[0]), dtype=torch.bool)
    others[start:stop] = False
    after = emulate(shards, inputs, cpu, 0.4)
    assert torch.equal(before[1][:, others], after[1][:, others])
    for i in (0, 2, 3, 4):
        assert torch.equal(before[i][others], after[i][others])  # bitwise


def test_results_do_not_depend_on_timing():
    documents, inputs = documents_of([100, 20, 77]), tensors(197, 4, 2, 8, torch.float32)
    shards = plan_shards(documents.bounds, 4, 3)
    first = emulate(shards, inputs, cpu, 0.4)
    for _ in range(3):
        for a, b in zip(first, emulate(shards, inputs, cpu, 0.4), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("degree", [0, 3])
def test_degrees_that_do_not_divide_are_refused(degree):
    with pytest.raises(UserError, match=f"--ulysses_degree {degree} must divide the sequence-parallel size 4"):
        SequenceParallel([[0, 1, 2, 3]], degree)
