"""What holds no numbers is found, in every type, wherever in a tensor it is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.checkpoint.finite import clause_on, not_finite


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([None, math.nan, math.inf, -math.inf])), max_size=6),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.randoms(use_true_random=False),
)
def test_the_names_of_those_that_hold_one(kinds, dtype, random):
    tensors, expected = {}, []
    for number, (size, value) in enumerate(kinds):
        tensors[f"t{number}"] = tensor = torch.full((size, 3), torch.finfo(dtype).max, dtype=dtype)
        if value is not None and size:
            tensor[random.randrange(size), random.randrange(3)] = value
            expected.append(f"t{number}")
    assert not_finite(tensors) == expected


def test_what_has_no_such_values_is_passed_over():
    tensors = {"ids": torch.arange(4), "bytes": torch.zeros(4, dtype=torch.uint8), "view": torch.ones(4, 4).t()[1:]}
    assert not_finite(tensors | {"eight": torch.zeros(4, dtype=torch.float8_e4m3fn)}) == []
    assert not_finite({}) == []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], None),
        (["a"], "a holds NaN or infinity"),
        (["a", "b", "c"], "a holds NaN or infinity, as 2 more tensors do"),
    ],
)
def test_the_first_is_named(names, said):
    assert clause_on(names) == said
