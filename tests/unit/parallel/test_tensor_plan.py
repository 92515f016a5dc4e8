"""Which part of a parameter a rank holds: every element somewhere, heads whole, and places looked up both ways."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from fft.errors import UserError
from fft.parallel.tensor_plan import (
    Shard,
    check_expert_parallel,
    check_tensor_parallel,
    expert_shard,
    plan_of,
    shard_of,
    style_of,
)

HEADS = (8, 2)
#: Names within the decoder, the whole shape, and what the first of two ranks holds of it.
PARTS = [
    ("embed_tokens.weight", (101, 16), (50, 16)),
    ("lm_head.weight", (101, 16), (50, 16)),
    ("layers.3.self_attn.q_proj.weight", (64, 16), (32, 16)),
    ("layers.3.self_attn.q_proj.bias", (64,), (32,)),
    ("layers.3.self_attn.k_proj.weight", (16, 16), (8, 16)),
    ("layers.3.self_attn.q_norm.weight", (8,), None),
    ("layers.3.self_attn.o_proj.weight", (16, 64), (16, 32)),
    ("layers.3.mlp.gate_proj.weight", (41, 16), (20, 16)),
    ("layers.3.mlp.down_proj.weight", (16, 41), (16, 20)),
    ("layers.3.mlp.gate.weight", (4, 16), None),
    ("layers.3.mlp.experts.gate_up_proj", (4, 24, 16), (4, 12, 16)),
    ("layers.3.mlp.experts.down_proj", (4, 16, 12), (4, 16, 6)),
    ("layers.3.mlp.shared_expert.up_proj.weight", (40, 16), (20, 16)),
    ("layers.3.input_layernorm.weight", (16,), None),
    ("norm.weight", (16,), None),
]


@pytest.fixture(scope="module")
def plan():
    return plan_of(AutoConfig.for_model("qwen3_moe"))


@pytest.mark.parametrize(("name", "shape", "first"), PARTS)
def test_parts_of_all_ranks_make_the_parameter(name, shape, first, plan):
    value = torch.randn(shape)
    for size in (1, 2, 4):
        shards = [shard_of(name, shape, plan, HEADS, rank, size) for rank in range(size)]
        if size == 1 or first is None:
            assert shards == [None] * size
            continue
        again, times = torch.full(shape, float("nan")), torch.zeros(shape)
        for shard in shards:
            part = shard.of(value)
            assert tuple(part.shape) == shard.local_shape
            if shard.copy == 0:
                shard.put(again, part)
                shard.put(times, torch.ones(shard.local_shape) + shard.of(times))
        assert torch.equal(again, value)
        assert torch.equal(times, torch.ones(shape))
        if size == 2:
            assert shards[0].local_shape == first


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, shape, _ in PARTS if ".experts." in name])
def test_parts_of_experts_make_the_parameter(name, shape, tensor, plan):
    """Those of expert-parallel ranks, each cut for tensor-parallel ranks or not."""
    value, again, expert = torch.randn(shape), torch.full(shape, float("nan")), 2
    for rank in range(expert * tensor):
        within = shard_of(name, shape, plan, HEADS, rank % tensor, tensor)
        shard = expert_shard(shape, rank // tensor, expert, within)
        part = shard.of(value)
        assert tuple(part.shape) == shard.local_shape
        assert torch.equal(part, (value if within is None else within.of(value))[2 * (rank // tensor) :][:2])
        assert (shard.flat_start is None) == (tensor > 1)
        shard.put(again, part)
    assert torch.equal(again, value)


def test_key_heads_are_copied_where_ranks_outnumber_them(plan):
    shards = [shard_of("layers.0.self_attn.v_proj.weight", (16, 5), plan, HEADS, rank, 8) for rank in range(8)]
    assert [(s.spans, s.copies, s.copy) for s in shards] == [
        *((((0, 8),), 4, copy) for copy in range(4)),
        *((((8, 16),), 4, copy) for copy in range(4)),
    ]


@settings(deadline=None)
@given(st.data())
def test_places_are_found_both_ways(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted(data.draw(st.sets(st.integers(0, shape[dim]), min_size=2, max_size=4)) | {0, shape[dim]})
    spans = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    first = data.draw(st.integers(0, shape[0] - 1)) if dim else 0
    shard = Shard(shape, dim, spans, experts=(first, data.draw(st.integers(first + 1, shape[0]))) if dim else None)
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    part = shard.of(whole).flatten()
    assert torch.equal(shard.flat(torch.arange(len(part))), part)
    found = shard.locate(whole.flatten())
    assert torch.equal(found[part], torch.arange(len(part)))
    assert int((found >= 0).sum()) == len(part)
    if shard.flat_start is not None:
        assert torch.equal(part, torch.arange(shard.flat_start, shard.flat_start + len(part)))


def test_heads_that_cannot_be_shared_out_are_refused_with_the_sizes_that_can():
    config = AutoConfig.for_model("llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=4)
    check_tensor_parallel(config, 4)
    check_tensor_parallel(config, 12)  # three ranks to a key/value head
    with pytest.raises(UserError, match="12 attention and 4 key/value heads: use 1, 2, 4, 12"):
        check_tensor_parallel(config, 3)


def test_experts_too_narrow_to_be_shared_out_are_refused():
    config = AutoConfig.for_model("qwen3_moe", num_attention_heads=8, num_key_value_heads=4, moe_intermediate_size=48)
    check_tensor_parallel(config, 2)
    with pytest.raises(UserError, match="multiple of 8 for each rank"):
        check_tensor_parallel(config, 4)


def test_experts_that_cannot_be_shared_out_by_number_are_refused():
    experts = AutoConfig.for_model("mixtral", num_local_experts=8)
    check_expert_parallel(experts, 8)
    with pytest.raises(UserError, match="--expert_parallel_size 16 cannot share out 8 experts: use 1, 2, 4, 8"):
        check_expert_parallel(experts, 16)
    with pytest.raises(UserError, match="--expert_parallel_size 2: model type 'llama' has no experts"):
        check_expert_parallel(AutoConfig.for_model("llama"), 2)


def test_a_bias_behind_a_sum_is_whole():
    plan = plan_of(AutoConfig.for_model("llama"))
    assert shard_of("layers.0.self_attn.o_proj.bias", (16,), plan, HEADS, 0, 2) is None


def test_layer_numbers_are_stars(plan):
    assert style_of("layers.11.self_attn.o_proj", plan) == "rowwise"
    assert style_of("layers.11.input_layernorm", plan) is None
