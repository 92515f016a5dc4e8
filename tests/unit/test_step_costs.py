"""What a step asks of a device may not grow: launches, bytes and host reads, counted on the product's own code.

Sizes are Llama-3-8B's, a micro-batch has 8,192 tokens (benchmarks/step_costs.py); instructions are those of a small run
of two stages. A change that adds a pass, a launch or a read fails here; one that saves some lowers the bound.
"""

import json

import pytest
from forked import run_ranks

from benchmarks import step_costs
from benchmarks.step_costs import HIDDEN, VOCABULARY

#: Most launches and most GB, those of matrix products and attention left out, of a micro-batch in a decoder layer.
LAYER = {
    "layer, plain operators: forward": (38, 4.85),
    "layer, plain operators: backward": (71, 10.7),
    "layer, fused operators: forward": (14, 1.6),
    "layer, fused operators: backward": (26, 2.8),
    "layer, fused operators, recomputed selectively: forward": (14, 1.6),
    "layer, fused operators, recomputed selectively: backward": (31, 4.2),
}
#: Most GB that such a layer keeps for its backward: as it is, or as a graph, whose partition into what is kept and
#: what is computed again is the compiler's, or that of selective recomputation: (compiled, selective).
KEPT = {(False, False): 1.65, (True, False): 1.15, (True, True): 0.78}
#: Most launches a piece, most bytes a logit, of the loss: (by the kernel, cap, shards of the vocabulary).
LOSS = {
    (True, None, 1): (8, 12.1),
    (True, 30.0, 1): (8, 12.1),
    (True, None, 8): (20, 12.1),  # all that is there once for one piece
    (False, None, 1): (21, 22.1),
}
#: Most launches and bytes a parameter of a gradient's way to its sum.
SUMS = {"one gradient": (1, 10), "an embedding's": (3, 1)}
#: What the host reads in an instruction of a step of two micro-batches, all recomputed, on the stages of a pipeline.
READS = {
    "LoadMicroBatch": ({}, {}),
    "ForwardPass": ({}, {}),
    "BackwardPass": ({}, {}),
    # Whether gradients are finite: a step is taken or not.
    "OptimizerStep": ({"_local_scalar_dense": 1}, {"_local_scalar_dense": 1}),
}
#: Most launches of the optimizer's step, and bytes a parameter: norm 4, AdamW 32, of which 4 write gradients, the copy
#: in bf16 6, sums that are zeroed 4.
OPTIMIZER = (33, 46.1)


@pytest.mark.parametrize(("fused", "selective"), [(False, False), (True, False), (True, True)])
def test_a_layer_launches_and_moves_no_more(fused, selective):
    for part in step_costs.layer(fused, selective):
        launches, gigabytes = LAYER[part.name]
        assert len(part.counts.launches) <= launches, part.counts.by_operator()
        assert part.counts.bytes <= gigabytes * 1e9, part.counts.by_operator()
        assert not part.counts.reads


@pytest.mark.parametrize(("compiled", "selective"), KEPT)
@pytest.mark.filterwarnings("ignore")
def test_a_layer_keeps_no_more(compiled, selective):
    assert step_costs.kept_by_layer(compiled, selective) <= KEPT[compiled, selective] * 1e9


@pytest.mark.parametrize(("fused", "cap", "shards"), LOSS)
def test_the_loss_moves_a_logit_a_few_times(fused, cap, shards):
    launches, bytes_ = LOSS[fused, cap, shards]
    part, pieces = step_costs.loss(fused, cap, shards=shards)
    assert len(part.counts.launches) <= launches * pieces, part.counts.by_operator()
    assert step_costs.logit_bytes(part, VOCABULARY // shards) <= bytes_
    assert not part.counts.reads
    # Of what is as large as the head there is the sum, to which a product adds by itself.
    assert all(x.product for x in part.counts.launches if x.elements == VOCABULARY // shards * HIDDEN)


@pytest.mark.parametrize("embedding", [False, True])
def test_a_gradient_gets_to_its_sum_in_one_pass(embedding):
    launches, bytes_ = SUMS["an embedding's" if embedding else "one gradient"]
    counts = step_costs.gradient_sums(embedding).counts
    assert len(counts.launches) <= launches, counts.by_operator()
    assert counts.bytes <= bytes_ * VOCABULARY * HIDDEN


@pytest.fixture(scope="module")
def ran():
    """What each of two stages counted in a step."""
    done = run_ranks(2, "-", "--role", "counts", module="benchmarks.step")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_host_reads_nothing_that_it_could_know(ran):
    for name, allowed in READS.items():
        for stage, reads in enumerate(allowed):
            assert ran[stage]["parts"].get(name, {"reads": {}})["reads"] == reads, (name, stage)


def test_the_optimizer_s_step_moves_a_parameter_a_few_times(ran):
    launches, bytes_ = OPTIMIZER
    for own in ran:
        assert own["parts"]["OptimizerStep"]["launches"] <= launches
        assert own["parts"]["OptimizerStep"]["bytes"] <= bytes_ * own["parameters"]
