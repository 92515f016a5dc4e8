"""Stages, mesh, schedules and initial weights: what every rank must derive alike."""

import itertools
import math

import pytest
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from fft.errors import UserError
from fft.models.causal_lm import StageBuilder
from fft.models.layers import canonical_parameters, pipeline_layers
from fft.models.spec import ModelSpec
from fft.models.supported import check_supported
from fft.parallel.mesh import mesh_sizes
from fft.parallel.role import StageRole
from fft.planning.costs import layer_costs
from fft.planning.partition import partition_balanced, partition_lowest, stage_bounds
from fft.training.schedule import lr_multiplier


def dearest(costs, bounds) -> float:
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
def test_balanced_partition_is_the_best(costs, data):
    stages = data.draw(st.integers(1, len(costs)))
    bounds = partition_balanced(costs, stages)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(costs), stages + 1)
    assert all(a < b for a, b in itertools.pairwise(bounds))
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    assert dearest(costs, bounds) == min(dearest(costs, [0, *cut, len(costs)]) for cut in cuts)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), min_size=1, max_size=8), st.data())
def test_the_lowest_partition_is_the_least_full_and_then_the_best(layers, data):
    """Held by all cuts: earlier stages hold more of the same layers, as they have more micro-batches in flight."""
    stages = data.draw(st.integers(1, len(layers)))
    costs, bytes_ = zip(*layers, strict=True)

    def held(stage: int, start: int, stop: int) -> float:
        return sum(bytes_[start:stop]) * (stages - stage)

    def fullest(bounds) -> float:
        return max(held(stage, *ends) for stage, ends in enumerate(itertools.pairwise(bounds)))

    cuts = [[0, *cut, len(costs)] for cut in itertools.combinations(range(1, len(costs)), stages - 1)]
    bounds = partition_lowest(costs, stages, held)
    least = min(map(fullest, cuts))
    assert least <= fullest(bounds) <= least * 1.001
    assert dearest(costs, bounds) == min(dearest(costs, cut) for cut in cuts if fullest(cut) <= fullest(bounds))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), min_size=2, max_size=8), st.data())
def test_fast_is_the_fastest_cut_that_fits(layers, data):
    """By all cuts; where none fits, the one that comes closest."""
    stages, limit = data.draw(st.integers(1, len(layers))), data.draw(st.integers(1, 400))
    costs, bytes_ = zip(*layers, strict=True)

    def held(stage: int, start: int, stop: int) -> float:
        return sum(bytes_[start:stop]) * (stages - stage)

    def fits(bounds) -> bool:
        return all(held(stage, *ends) <= limit for stage, ends in enumerate(itertools.pairwise(bounds)))

    cuts = [[0, *cut, len(costs)] for cut in itertools.combinations(range(1, len(costs)), stages - 1)]
    fitting = [dearest(costs, cut) for cut in cuts if fits(cut)]
    bounds = stage_bounds("fast", costs, bytes_, stages, held, limit)
    if fitting:
        assert fits(bounds)
        assert dearest(costs, bounds) == min(fitting)
    else:
        assert bounds == stage_bounds("mem", costs, bytes_, stages, held)


def test_partition_methods():
    flops, parameters = [0.0, 4, 4, 4, 4, 1, 8], [9, 1, 1, 1, 1, 1, 9]

    def held(stage: int, start: int, stop: int) -> float:
        return sum(parameters[start:stop]) * (2 - stage)

    assert stage_bounds("fast", flops, parameters, 2, held) == [0, 4, 7]
    assert stage_bounds("mem", flops, parameters, 2, held) == [0, 1, 7]
    assert stage_bounds("parameters", flops, parameters, 2, held) == [0, 3, 7]
    assert stage_bounds("uniform", flops, parameters, 7, held) == list(range(8))
    assert stage_bounds("5,2", flops, parameters, 2, held) == [0, 5, 7]


@pytest.mark.parametrize("method", ["5,3", "7", "0,7", "quick", "5,2,0"])
def test_impossible_partitions_are_refused(method):
    with pytest.raises(UserError, match="--partition_method"):
        stage_bounds(method, [1.0] * 7, [1] * 7, 2, max)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(UserError, match="--pipe_parallel_size 9 is more than the model's 7"):
        stage_bounds("fast", [1.0] * 7, [1] * 7, 9, max)


@given(st.integers(1, 64), st.integers(1, 8))
def test_mesh_uses_every_rank_or_refuses(world, pipe):
    if world % pipe:
        with pytest.raises(UserError, match="cannot be divided"):
            mesh_sizes(world, pipe, 1, 1)
    else:
        assert mesh_sizes(world, pipe, 1, 1).world == world


def test_schedules():
    cosine = lr_multiplier("cosine", warmup_steps=4, total_steps=20, floor=0.1)
    assert [cosine(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine(4) == 1.0
    assert cosine(12) == pytest.approx(0.55)
    assert cosine(20) == cosine(30) == pytest.approx(0.1)
    linear = lr_multiplier("linear", warmup_steps=0, total_steps=10, floor=0.0)
    assert [linear(step) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]
    assert lr_multiplier("constant", 0, 10, 0.0)(9) == 1.0
    wsd = lr_multiplier("wsd", warmup_steps=2, total_steps=20, floor=0.2, decay_ratio=0.25)
    assert [wsd(step) for step in (0, 1, 2, 15)] == [0.5, 1.0, 1.0, 1.0]
    assert [wsd(step) for step in (16, 18, 20, 25)] == pytest.approx([0.84, 0.52, 0.2, 0.2])
    assert [lr_multiplier("wsd", 0, 20, 0.0, 0.0)(step) for step in (0, 19)] == [1.0, 1.0]
    all_warm = lr_multiplier("wsd", 20, 20, 0.0, 1.0)
    assert [all_warm(step) for step in (0, 19)] == [1 / 20, 1.0]


def spec(**changes) -> ModelSpec:
    return ModelSpec(AutoConfig.for_model(**(SMALL | {"model_type": "llama"} | changes)), torch.float32, seed=5)


def weights(split: bool, keep: range | None = None) -> dict[str, torch.Tensor]:
    specs = pipeline_layers(StageBuilder(spec()), split)
    built = torch.nn.ModuleList(specs[i].build() for i in (keep or range(len(specs))))
    return {name: p.detach() for name, p in canonical_parameters(built).items()}


def test_initial_weights_do_not_depend_on_how_the_model_is_cut():
    whole = weights(split=False)
    assert set(whole) == set(AutoModelForCausalLM.from_config(spec().config).state_dict())
    pieces = {**weights(split=True, keep=range(0, 4)), **weights(split=True, keep=range(4, 9))}
    assert set(pieces) == set(whole)
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)
    assert whole["model.layers.0.self_attn.q_proj.weight"].std() == pytest.approx(0.2, rel=0.1)
    a, b = (whole[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    assert not torch.equal(a, b)


def test_layers_compute_what_transformers_computes():
    specs = pipeline_layers(StageBuilder(spec()))
    layers = [spec.build() for spec in specs]
    model = AutoModelForCausalLM.from_config(spec().config, dtype=torch.float32)
    model.load_state_dict(canonical_parameters(torch.nn.ModuleList(layers)))
    model.set_attn_implementation("eager")
    ids = torch.randint(SMALL["vocab_size"], (1, 9), dtype=torch.int32)
    activations = (ids, torch.tensor([0, *[9] * 9], dtype=torch.int32))
    for layer in layers:
        activations = layer(activations)
    hidden, head = activations
    torch.testing.assert_close(hidden @ head.t(), model(ids.long()).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_layer_costs_count_every_parameter_once(split, tied):
    made = spec(tie_word_embeddings=tied)
    costs = layer_costs(made, seq_len=64, split_dlayer=split)
    assert len(costs) == len(pipeline_layers(StageBuilder(made), split))
    assert sum(cost.parameters for cost in costs) == sum(p.numel() for p in made.skeleton.parameters())
    assert all(math.isfinite(cost.flops) for cost in costs)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"hidden_act": "zzz"}, "hidden_act 'zzz'"),
        ({"attention_dropout": 0.1}, "attention_dropout is not supported"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        check_supported(AutoConfig.for_model(**(SMALL | {"model_type": "llama"} | changes)), 64)


def test_every_rank_has_a_role_of_its_own():
    mesh = mesh_sizes(48, 3, 2, 4)
    roles = [StageRole.of(mesh, rank) for rank in range(mesh.world)]
    assert [mesh.rank(r.stage, r.replica, r.sequence, r.tensor) for r in roles] == list(range(mesh.world))
    for stage in range(mesh.pipe):
        of_stage = [r for r in roles if r.stage == stage]
        assert [r.shard for r in of_stage if r.writes] == list(range(4 * stage, 4 * stage + 4))
        assert {r.reads for r in of_stage} == {stage != 1}
    assert {r.shards for r in roles} == {12}
    # Each share of a replica's tokens is counted once, on the last stage.
    assert sorted((r.replica, r.sequence) for r in roles if r.counts) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(r.last and not r.first for r in roles if r.counts)


def test_expert_groups_are_neighbours_of_data_and_sequence():
    mesh = mesh_sizes(32, 2, 2, 2, 4)
    roles = [StageRole.of(mesh, rank) for rank in range(mesh.world)]
    assert mesh.expert_groups()[:3] == [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7]]
    assert mesh.expert_data_groups()[:4] == [[0, 8], [2, 10], [4, 12], [6, 14]]
    assert mesh.holder_groups() == [list(range(first, first + 8)) for first in range(0, 32, 8)]
    for groups in (mesh.expert_groups(), mesh.expert_data_groups(), mesh.holder_groups()):
        assert sorted(rank for group in groups for rank in group) == list(range(32))
        assert all(len({roles[rank].stage for rank in group}) == 1 for group in groups)
    assert all(len({roles[rank].place % 4 for rank in group}) == 1 for group in mesh.expert_data_groups())
    # Each of the first holders of a stage writes a file.
    assert [r.shard for r in roles if r.writes] == list(range(16))
    assert {r.shards for r in roles} == {16}


def test_experts_that_do_not_divide_the_replicas_are_refused():
    with pytest.raises(UserError, match=r"--expert_parallel_size 3 must divide the 4 rank\(s\) .* use 1 or 2 or 4"):
        mesh_sizes(8, 2, 2, 1, 3)
    with pytest.raises(UserError, match="--expert_parallel_size 0 must be at least 1"):
        mesh_sizes(8, 2, 2, 1, 0)
