"""Training state cut in any two ways: what one set of ranks wrote, another reads."""

import json
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fft.checkpoint.fragments import FRAGMENTS, Fragment, SavedFragments, rank_file
from fft.errors import UserError
from fft.parallel.tensor_plan import expert_shard, shard_of

PLAN = {"column": "colwise", "row": "rowwise", "packed": "packed_colwise"}
SHAPES = {"column.weight": (7, 5), "row.weight": (5, 9), "packed": (3, 8, 5), "norm.weight": (6,)}


def layout(tensor, zero, expert=1):
    """Fragments of every parameter in a layout: tensor- and expert-parallel ranks, ZeRO's ranges of what each holds."""
    for rank in range(tensor * expert):
        for name, shape in SHAPES.items():
            shard = shard_of(name, shape, PLAN, (4, 4), rank % tensor, tensor)
            if name == "packed" and expert > 1:
                shard = expert_shard(shape, rank // tensor, expert, shard)
            elif rank >= tensor or (shard is None and rank):
                continue
            size = prod(shape if shard is None else shard.local_shape)
            cuts = [size * i // zero for i in range(zero + 1)]
            for part in range(zero):
                if cuts[part] < cuts[part + 1]:
                    yield rank * zero + part, name, shard, cuts[part], cuts[part + 1]


def value_of(name, shard):
    whole = torch.arange(prod(SHAPES[name]), dtype=torch.float32).view(SHAPES[name])
    return (whole if shard is None else shard.of(whole)).flatten()


def write(folder, tensor, zero, expert=1):
    files = {}
    for rank, name, shard, start, stop in layout(tensor, zero, expert):
        tensors, fragments = files.setdefault(rank, ({}, {}))
        tensors[f"exp_avg/{name}"] = value_of(name, shard)[start:stop].clone()
        fragments[name] = Fragment.of(start, stop, shard).to_list()
    for rank, (tensors, fragments) in files.items():
        save_file(tensors, folder / rank_file(rank), metadata={FRAGMENTS: json.dumps(fragments)})


#: Tensor-parallel ranks, parts that ZeRO makes, expert-parallel ranks.
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(3, 50))
def test_any_layout_reads_what_any_other_wrote(tmp_path_factory, sizes, new_sizes, chunk):
    folder = tmp_path_factory.mktemp("training")
    write(folder, *sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fft.checkpoint.fragments._CHUNK", chunk)
        saved = SavedFragments(folder)
        for _, name, shard, start, stop in layout(*new_sizes):
            target = torch.full((stop - start,), -1.0)
            saved.fill(target, name, "exp_avg", start, shard)
            assert torch.equal(target, value_of(name, shard)[start:stop])


def test_what_is_missing_is_counted(tmp_path):
    write(tmp_path, 2, 1)
    (tmp_path / rank_file(1)).unlink()
    with pytest.raises(UserError, match=r"holds 20 of 45 values of exp_avg of row.weight"):
        SavedFragments(tmp_path).fill(torch.empty(45), "row.weight", "exp_avg", 0)
