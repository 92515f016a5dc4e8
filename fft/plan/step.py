"""A whole step: the pipeline played through, then gradients, the optimizer, weights."""

from dataclasses import dataclass
from itertools import pairwise
from math import log2

from fft.plan.exchanges import gather_time, group_of, reduce_time, scatter_time, send_time
from fft.plan.kernels import moving_time
from fft.plan.layers import Parts, PassTimes, block_times, embedding_times, head_times
from fft.plan.run import PlannedRun
from fft.plan.schedule import Played, play_blocking, play_eager

_ZERO = PassTimes(Parts(), Parts())
#: B/s between a device and its host, and parameters a second that a device's share of the host's cores steps: assumed.
_HOST_LINK, _HOST_STEP = 20e9, 0.6e9
#: Micro-batches for each stage after which a schedule repeats itself.
_WHOLE = 3


@dataclass(frozen=True)
class Prediction:
    """``seconds`` of a step of ``tokens``; ``parts`` of the mean device's, exchanges between stages and waits left out.

    ``sends`` seconds of messages between stages, ``bubble`` those that a device waits in the mean, ``gradients``
    those of reducing what backward does not hide, ``optimizer`` those of the update with its gathers.
    """

    seconds: float
    tokens: int
    parts: Parts
    sends: float
    bubble: float
    gradients: float
    optimizer: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def even_bounds(layers: int, stretches: int) -> tuple[int, ...]:
    """As Megatron cuts: decoder layers evenly, the embedding to the first, norm and head to the last.

    Layers that are left over go to stretches in the middle.
    """
    each, left = divmod(layers, stretches)
    first = (stretches - left) // 2
    sizes = [each + (first <= stretch < first + left) for stretch in range(stretches)]
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return (0, *(bound + 1 for bound in bounds[1:-1]), layers + 2)


def layer_times(run: PlannedRun) -> list[PassTimes]:
    """Of the embedding, every decoder layer, and the head with the norm."""
    known = {id(block): block_times(run, block) for block in {id(b): b for b in run.shape.layers}.values()}
    return [embedding_times(run), *(known[id(block)] for block in run.shape.layers), head_times(run)]


def stage_times(run: PlannedRun) -> list[PassTimes]:
    """Of every stretch of layers, in the order of the pipeline."""
    layers = layer_times(run)
    bounds = run.bounds or even_bounds(len(layers) - 2, run.sides.pipe * run.sides.chunks)
    return [sum(layers[begin:end], _ZERO) for begin, end in pairwise(bounds)]


def play(run: PlannedRun, stages: list[PassTimes], micros: int) -> Played:
    """A step's passes of so many micro-batches."""
    pipe, chunks = run.sides.pipe, run.sides.chunks
    states = run.tokens * run.shape.hidden * 2
    if run.stack.blocking:
        send = [send_time(run.machine, states, run.pipe_stride, run.at)] * (pipe - 1)
        forward = [stage.forward.seconds for stage in stages]
        backward = [stage.backward.seconds for stage in stages]
        return play_blocking(forward, backward, send, micros, run.stack.paired)
    # Tensor ranks send their share, and gather it beyond.
    shared = states / run.sides.tensor
    each = send_time(run.machine, shared, run.pipe_stride, run.at)
    each += gather_time(run.machine, run.tensor_group, states, run.at) if not run.stack.split_norms else 0.0
    own = [[stages[chunk * pipe + rank] for chunk in range(chunks)] for rank in range(pipe)]
    return play_eager(
        [[stage.forward.seconds for stage in rank] for rank in own],
        [[stage.backward.seconds for stage in rank] for rank in own],
        [each] * max(1, pipe),
        micros,
    )


def pipeline_seconds(run: PlannedRun, stages: list[PassTimes]) -> float:
    """Of all passes. A schedule of many micro-batches repeats itself, turn by turn of as many as there are stages."""
    pipe = run.sides.pipe
    if pipe == 1:
        whole = stages[0]
        for more in stages[1:]:
            whole = whole + more
        return run.accumulated * (whole.forward.seconds + whole.backward.seconds)
    turns = run.accumulated // pipe
    if turns <= _WHOLE:
        return play(run, stages, run.accumulated).seconds
    rest = run.accumulated % pipe
    short = play(run, stages, (_WHOLE - 1) * pipe + rest).seconds
    long = play(run, stages, _WHOLE * pipe + rest).seconds
    return long + (turns - _WHOLE) * (long - short)


def predict(run: PlannedRun) -> Prediction:
    """A step of a run."""
    stages = stage_times(run)
    passes = pipeline_seconds(run, stages)
    pipe, micros = run.sides.pipe, run.accumulated
    parts = sum((stage.forward + stage.backward for stage in stages), Parts()).times(micros / pipe)
    sends = 0.0
    if pipe > 1:
        states = run.tokens * run.shape.hidden * 2
        one = send_time(run.machine, states / (1 if run.stack.blocking else run.sides.tensor), run.pipe_stride, run.at)
        twice = run.stack.blocking and not run.stack.paired  # a message takes both ranks, one after the other
        sends = 2 * micros * run.sides.chunks * one * (pipe - 1) / pipe * (2 if twice else 1)
    gradients, optimizer = _update(run, stages)
    seconds = (passes + gradients + optimizer) * _lateness(run)
    bubble = max(0.0, seconds - parts.seconds - sends - gradients - optimizer)
    return Prediction(seconds, run.step_tokens, parts, sends, bubble, gradients, optimizer)


def update_seconds(run: PlannedRun) -> float:
    """Of reducing gradients and of the optimizer, where no backward hides anything."""
    return sum(_update(run, []))


def _lateness(run: PlannedRun) -> float:
    """How much longer all wait for the slowest of many."""
    return 1 + run.at.straggler * log2(max(1, run.sides.world / run.machine.node))


def _update(run: PlannedRun, stages: list[PassTimes]) -> tuple[float, float]:
    """Seconds of reducing gradients that backward does not hide, and of the optimizer."""
    held = run.shape.parameters / run.sides.pipe / run.sides.tensor
    if run.sides.expert > 1:
        spread = sum(p.parameters for block in run.shape.layers for p in block.products if p.experts > 1)
        held -= spread * (1 - 1 / run.sides.expert) / run.sides.pipe / run.sides.tensor
    replicas, stack = run.replica_group, run.stack
    device = run.machine.device
    own = held / replicas.size if stack.zero else held
    step = moving_time(device, own * stack.step, 20, run.at)
    everybody = group_of(run.machine, run.sides.world, 1)
    told = stack.numbers * reduce_time(run.machine, everybody, 8, run.at)
    if run.offload:
        # Gradients go to the host in fp32, weights come back in 16 bits.
        step = own * (4 + 2) / _HOST_LINK + own / _HOST_STEP
    step += told
    if replicas.size == 1:
        return 0.0, step
    if stack.zero >= 2:  # reduced layer by layer
        gather = gather_time(run.machine, replicas, held * 2, run.at) if stack.zero == 2 else 0.0
        return 0.0, step + gather
    reduced = held * stack.reduced
    # A distributed optimizer scatters, as ours does; DeepSpeed's ZeRO-1 reduces.
    scatters = stack.overlapped or (stack.scattered and run.sides.expert == 1)  # ours but where ranks share experts out
    scatter = stack.zero == 1 and scatters
    by_messages = scatter_time if stack.scattered == "messages" else gather_time
    reduce = (by_messages if scatter else reduce_time)(run.machine, replicas, reduced, run.at)
    gather = gather_time(run.machine, replicas, held * 2, run.at) if stack.zero else 0.0
    if stack.overlapped and stages:
        last = max(stage.backward.seconds for stage in stages)
        first = max(stage.forward.seconds for stage in stages)
        reduce = max(0.0, reduce - last) + run.at.beside * min(reduce, last)
        gather = max(0.0, gather - first) + run.at.beside * min(gather, first)
    return reduce + moving_time(device, 8 * held, 5, run.at), step + gather
