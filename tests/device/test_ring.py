"""The ring's whole arithmetic on the device: ranks are threads, each with its shard, and the sum is one call's."""

import pytest
import torch
from rings import documents_of, emulate, tensors, whole

from fft.ops.backends import reference
from fft.ops.backends.choice import choose
from fft.parallel.ring_plan import plan_shards

LENGTHS = [1300, 48, 700, 1, 2047]


@pytest.fixture
def backend(device):
    """The kernel that trains on this device."""
    return choose(device, torch.bfloat16)


@pytest.fixture(scope="module")
def lengths(small) -> list[int]:
    """Of documents that lie on cuts, are longer than two ranks, or have one token."""
    return [max(1, length // 4) for length in LENGTHS] if small else LENGTHS


@pytest.mark.parametrize("ranks", [2, 4, 8, 32])
def test_it_is_as_good_as_the_single_kernel(backend, ranks, lengths, device, record_property):
    inputs = tensors(sum(lengths), 8, 2, 64, torch.bfloat16)
    exact = whole(documents_of(lengths), [x.double() for x in inputs], reference, 0.125)
    inputs = [x.to(device) for x in inputs]
    single = whole(documents_of(lengths, device), inputs, backend, 0.125)
    ring = emulate(plan_shards(documents_of(lengths).bounds, ranks), inputs, backend, 0.125)
    for name, mine, theirs, true in zip(["out", "lse", "dq", "dk", "dv"], ring, single, exact, strict=True):
        ours, kernel = (float((x.double().cpu() - true).norm() / true.norm()) for x in (mine, theirs))
        record_property(f"error of {name}, of the single call's", ours / kernel)
        assert ours <= 1.25 * kernel + 1e-6, name


def test_it_is_exact_in_float64(lengths, device):
    inputs = [x.to(device) for x in tensors(sum(lengths), 4, 2, 64)]
    true = whole(documents_of(lengths, device), inputs, reference, 0.125)
    ring = emulate(plan_shards(documents_of(lengths).bounds, 4), inputs, reference, 0.125)
    for mine, theirs in zip(ring, true, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_documents_never_see_each_other(backend, device):
    documents, inputs = documents_of([1300, 48, 700]), tensors(2048, 4, 2, 64, torch.bfloat16)
    inputs = [x.to(device) for x in inputs]
    shards = plan_shards(documents.bounds, 4)
    before = emulate(shards, inputs, backend, 0.125)[0]
    for x in inputs:
        x[1300:1348] += 1
    after = emulate(shards, inputs, backend, 0.125)[0]
    assert torch.equal(before[:1300], after[:1300])
    assert torch.equal(before[1348:], after[1348:])
