"""Memory of other trainers' runs, estimated: for published peaks. Of ours :mod:`fft.planning.memory` knows more."""

from itertools import pairwise

from fft.plan.run import PlannedRun
from fft.plan.shape import Block
from fft.plan.step import even_bounds

#: What a device's context and its communication library hold, and the share that an allocator cannot use.
_CONTEXT, _UNUSED = 1.5e9, 0.1


def others_memory(run: PlannedRun) -> float:
    """Bytes of the fullest device at most: states of the parameters, activations in flight, logits."""
    sides, layers = run.sides, run.shape.layers
    bounds = run.bounds or even_bounds(len(layers), sides.pipe * sides.chunks)
    stretches = list(pairwise(bounds))
    fullest = 0.0
    for rank in range(sides.pipe):
        own = [range(*ends) for ends in stretches[rank :: sides.pipe]]
        blocks = [layers[index - 1] for stretch in own for index in stretch if 1 <= index <= len(layers)]
        held = sum(_held(run, block) for block in blocks)
        ends = run.shape.vocab * run.shape.hidden / sides.tensor
        held += ends * ((rank == 0) + (rank == sides.pipe - 1)) - (ends if run.shape.tied and sides.pipe == 1 else 0)
        in_flight = min(run.accumulated, sides.pipe - rank)
        if sides.chunks > 1:
            in_flight = min(run.accumulated, in_flight + (sides.chunks - 1) * sides.pipe / sides.chunks)
        kept = sum(_kept(run, block) for block in blocks) * in_flight
        working = max((_whole(run, block) for block in blocks), default=0.0) if run.again.products == 1 else 0.0
        last = rank == sides.pipe - 1
        logits = run.tokens * run.shape.vocab / sides.tensor * 10 if last else 0.0
        fullest = max(fullest, _states(run, held, blocks) + kept + max(working, logits))
    return fullest * (1 + _UNUSED) + _CONTEXT


def _held(run: PlannedRun, block: Block) -> float:
    return sum(p.parameters / (run.sides.expert if p.experts > 1 else 1) for p in block.products) / run.sides.tensor


def _states(run: PlannedRun, held: float, blocks: list[Block]) -> float:
    """Weights, gradients, masters and moments of what a rank has."""
    stack, replicas = run.stack, run.replica_group.size
    moments = 8 if stack.step < 30 else 12
    if stack.zero == 3:
        layer = max((_held(run, block) for block in blocks), default=0.0)
        return held * (moments + 4) / replicas + 2 * layer * (stack.gathered + stack.reduced)
    if stack.zero == 2:
        return held * 2 + held * (moments + stack.reduced) / replicas
    gradients = max(stack.reduced, 4.0 if run.accumulated > 1 and stack.zero == 0 else 2.0)
    return held * (2 + gradients) + held * moments / (replicas if stack.zero else 1)


def _whole(run: PlannedRun, block: Block) -> float:
    """Bytes that a layer keeps of a micro-batch, if it keeps all that backward needs."""
    hidden, tensor, stack = run.shape.hidden, run.sides.tensor, run.stack
    shared = tensor if stack.split_norms else 1
    query = run.shape.heads * run.shape.head_size
    outside = hidden * (8 + (2 if stack.dropout else 0) + (0 if stack.fused_norms else 16)) / shared
    inside = block.qkv * (2 if stack.fused_inner else 4) + 2 * query + block.active * (6 if block.gated else 4)
    inside += 0 if stack.fused_inner or not block.gated else 2 * block.active
    scores = 0.0
    if stack.attention == "unfused":
        scores = run.document * run.shape.heads * (5 if stack.dropout else 4)
    return run.tokens * (outside + (inside + scores) / tensor)


def _kept(run: PlannedRun, block: Block) -> float:
    """Bytes that a layer keeps between forward and backward."""
    again, states = run.again, 2 * run.tokens * run.shape.hidden
    if again.products == 1:
        return states / (run.sides.tensor if run.stack.split_norms else 1)
    whole = _whole(run, block)
    if again.products:  # some layers, or some products, are kept
        return states + whole * (1 - again.products) * (0.6 if again.attention == 0 else 1.0)
    if again.attention:  # all but the scores
        plain = run.tokens * run.document * run.shape.heads * (5 if run.stack.dropout else 4) / run.sides.tensor
        return whole - plain
    if again.others:
        return 0.65 * whole
    return whole
