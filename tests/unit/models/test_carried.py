"""What travels between layers is what was put in, also through the one tensor that travels between stages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fft.models.carried import Carried, packed, unpacked

SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4)


@given(SHAPES, st.integers(1, 4))
def test_stages_receive_what_was_sent(shapes, others):
    floats = [torch.randn(shape) for shape in shapes]
    rest = [torch.arange(n + 1, dtype=torch.int32) for n in range(others)]
    sent = packed((*floats, *rest))
    assert sent[0].ndim == 1
    assert sum(tensor.is_floating_point() for tensor in sent) == 1
    received = unpacked(sent)
    assert all(torch.equal(a, b) for a, b in zip(received, (*floats, *rest), strict=True))


def test_layers_take_what_layers_gave():
    cu_seqlens, positions = torch.tensor([0, 4, 4, 4, 4]), torch.zeros(3, 4, dtype=torch.int32)
    index, ids = torch.tensor([[1, 3, -1], [0, 2, 3]], dtype=torch.int32), torch.ones(1, 4, dtype=torch.int32)
    grids, hidden = torch.ones(2, 3, dtype=torch.int32), torch.randn(1, 4, 8)
    taps = torch.randn(4, 8), torch.randn(4, 8)
    row = Carried(cu_seqlens, hidden, taps, ids, positions, index, grids)
    again = Carried.of(row.tensors())
    assert all(a is b for a, b in zip(again.tensors(), row.tensors(), strict=True))
    embedded = Carried.of(row.embedded(hidden).tensors())
    assert embedded.input_ids is embedded.grids is None
    after = embedded.tapped(hidden)
    assert len(after.taps) == 1
    expected = hidden.clone()
    expected[0, 1] += taps[0][0]
    expected[0, 3] += taps[0][2]
    assert torch.equal(after.states, expected)
    assert after.tapped(after.states).tapped(hidden).states is hidden


def test_what_is_not_there_is_not_taken():
    with pytest.raises(ValueError, match="no hidden states"):
        _ = Carried(torch.zeros(2)).states
    with pytest.raises(ValueError, match="without images"):
        Carried(torch.zeros(2)).at_images()
