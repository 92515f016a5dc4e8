"""Cut a list of layers into pipeline stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from fft.errors import UserError

METHODS = ("fast", "mem", "uniform", "parameters")


def partition_balanced(
    costs: Sequence[float], stages: int, reach: Callable[[int, int], int] | None = None
) -> list[int]:
    """Cut ``costs`` into ``stages`` contiguous, non-empty stretches, the dearest of them as cheap as possible.

    ``reach``, if given, says where the stretch of a stage that begins at a layer may stop at the latest. Returns the
    bounds, ``stages + 1`` increasing indices. Dynamic programming, O(stages * layers^2); among equals the earliest cut
    wins. Raises ValueError when there are fewer layers than stages, or no stretches that reach.
    """
    n = len(costs)
    if not 1 <= stages <= n:
        raise ValueError(f"cannot cut {n} layers into {stages} stages")
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    worst: list[float] = [float("inf")] * (n + 1)
    worst[0] = 0.0
    cuts: list[list[int]] = []
    for stage in range(stages):
        best, cut = [float("inf")] * (n + 1), [0] * (n + 1)
        for start in range(stage, n):
            furthest = n if reach is None else reach(stage, start)
            for stop in range(start + 1, furthest + 1):
                value = max(worst[start], prefix[stop] - prefix[start])
                if value < best[stop]:
                    best[stop], cut[stop] = value, start
        worst = best
        cuts.append(cut)
    if worst[n] == float("inf"):
        raise ValueError("no cut reaches the end")
    bounds = [n]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return bounds[::-1]


def partition_lowest(
    costs: Sequence[float], stages: int, memory: Callable[[int, int, int], float], tolerance: float = 1e-3
) -> list[int]:
    """Cut so that the fullest stage holds as little as possible, and, as far as that allows, ``costs`` are balanced.

    ``memory(stage, start, stop)`` is what a stage of these layers holds, never less for more layers. The least limit
    that some cut keeps is found by bisection, to ``tolerance`` of it.
    """
    n = len(costs)

    def fits(limit: float) -> bool:
        # Not by taking as much as a stage can: the next must not be empty, and its first layer may be too large for it.
        starts = {0}
        for stage in range(stages):
            stops: set[int] = set()
            furthest = 0
            for start in sorted(starts):
                last = _reach(memory, limit, n, stage, start)  # never less for a later start
                stops.update(range(max(start, furthest) + 1, last + 1))
                furthest = last
            starts = stops
        return n in starts

    high = max(memory(stage, 0, n) for stage in range(stages))
    low = 0.0
    while high - low > tolerance * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return partition_balanced(costs, stages, partial(_reach, memory, high, n))


def _reach(memory: Callable[[int, int, int], float], limit: float, layers: int, stage: int, start: int) -> int:
    """The last stop that a stage from ``start`` can have below the limit; ``start`` itself if there is none."""
    low, high = start, layers
    while low < high:
        stop = (low + high + 1) // 2
        low, high = (stop, high) if memory(stage, start, stop) <= limit else (low, stop - 1)
    return low


def stage_bounds(
    method: str,
    times: Sequence[float],
    parameters: Sequence[int],
    stages: int,
    memory: Callable[[int, int, int], float],
    limit: float = 0.0,
    tower: int = 0,
    encoder: int = 0,
) -> list[int]:
    """Bounds of the stages by ``--partition_method``.

    ``times`` and ``parameters`` hold one number per pipeline layer, ``memory(stage, start, stop)`` is what a rank of a
    stage of such layers holds, in bytes, and may, if there is a ``limit``: ``fast`` is then the fastest cut that keeps
    it, or what ``mem`` is where none does. ``method`` is one of :data:`METHODS`, layers per stage as in ``5,4,4``
    (their sum must be the number of layers), or, of more than two stages, those of the first and the last, as in
    ``11,2``: what is between is cut by time. With ``encoder`` so many stages, the first, share the ``tower`` layers,
    which are the first, and ``method`` is for the others; a list may also name all stages. Raises :class:`UserError`.
    """
    layers, cut = len(times), _Cut(times, parameters, memory, limit)
    if layers < stages:
        raise UserError(
            f"--pipe_parallel_size {stages} is more than the model's {layers} pipeline layers: use at most {layers}."
        )
    _check_encoder(encoder, tower, stages, layers)
    sizes = None if method in METHODS else _sizes(method)
    begin, ends = 0, []
    if encoder and (sizes is None or len(sizes) != stages):
        begin, ends = tower, cut.by(method if sizes is None else "fast", 0, tower, range(encoder))
    if sizes is None:
        return [0, *ends, *cut.by(method, begin, layers, range(len(ends), stages))]
    count, left = stages - len(ends), layers - begin
    between = count - 2
    if len(sizes) == 2 < count and min(sizes) > 0 and sum(sizes) + between <= left:
        if tower and not encoder:
            raise UserError(
                f"--partition_method {method} names the layers of the decoder's first and last stage: say by "
                "--encoder_pipe_parallel_size how many stages the vision tower has, or name all stages."
            )
        first, last = begin + sizes[0], layers - sizes[1]
        return [0, *ends, first, *cut.by("fast", first, last, range(len(ends) + 1, stages - 1)), layers]
    if len(sizes) != count or sum(sizes) != left or min(sizes) < 1:
        what = "decoder stage" if ends else "stage"
        two = f", or those of the first and the last, which leave {between} or more" if between > 0 else ""
        raise UserError(
            f"--partition_method {method} must name {count} positive counts (one a {what}) that sum to {left} layers "
            f"(embedding, decoder layers or their halves, norm and head){two}."
        )
    bounds = [0, *ends, *(begin + size for size in accumulate(sizes))]
    if encoder and bounds[encoder] != tower:
        raise UserError(
            f"--partition_method {method}: the first {encoder} counts must sum to the vision tower's {tower} layers, "
            f"as --encoder_pipe_parallel_size {encoder} says."
        )
    return bounds


@dataclass(frozen=True)
class _Cut:
    """Cuts some of a model's layers into stages; fields are as in :func:`stage_bounds`."""

    times: Sequence[float]
    parameters: Sequence[int]
    memory: Callable[[int, int, int], float]
    limit: float

    def by(self, method: str, start: int, stop: int, stages: range) -> list[int]:
        """Where each of ``stages`` ends, of layers ``start`` to ``stop``."""
        times, count = self.times[start:stop], len(stages)

        def memory(stage: int, first: int, end: int) -> float:
            return self.memory(stages[stage], start + first, start + end)

        if method == "fast":
            reach = partial(_reach, memory, self.limit, len(times)) if self.limit else None
            try:
                bounds = partition_balanced(times, count, reach)
            except ValueError:
                bounds = partition_lowest(times, count, memory)
        elif method == "mem":
            bounds = partition_lowest(times, count, memory)
        else:
            costs = self.parameters[start:stop] if method == "parameters" else [1.0] * len(times)
            bounds = partition_balanced(costs, count)
        return [start + bound for bound in bounds[1:]]


def _check_encoder(encoder: int, tower: int, stages: int, layers: int) -> None:
    """That the first ``encoder`` stages can have the ``tower`` layers, and the others what remains."""
    if encoder > tower:
        raise UserError(f"--encoder_pipe_parallel_size {encoder} is more than the vision tower's {tower} layers.")
    if encoder and not 1 <= stages - encoder <= layers - tower:
        raise UserError(
            f"--encoder_pipe_parallel_size {encoder} counts within --pipe_parallel_size {stages}: leave the decoder "
            f"1 to {layers - tower} of the stages."
        )


def _sizes(method: str) -> list[int]:
    try:
        return [int(x) for x in method.split(",")]
    except ValueError:
        raise UserError(
            f"--partition_method {method!r} is none of {', '.join(METHODS)} and no list of layers per stage like 5,4,4."
        ) from None


def pipeline_bubble(
    stages: int, micro_batches: int, forward: Sequence[float] | None = None, backward: Sequence[float] | None = None
) -> float:
    """Share of a step that the stages of a 1F1B pipeline wait, in the mean, were sending free.

    ``forward`` and ``backward`` are the times of each stage for one micro-batch, in any unit; without them all stages
    are equally fast.
    """
    if forward is None or backward is None:
        return (stages - 1) / (micro_batches + stages - 1)
    busy = micro_batches * (sum(forward) + sum(backward))
    whole = _length_1f1b(forward, backward, micro_batches)
    return 1 - busy / (stages * whole) if whole else 0.0


def _length_1f1b(forward: Sequence[float], backward: Sequence[float], micro_batches: int) -> float:
    """How long a step takes: every stage does its passes in the order of 1F1B, each as soon as its input is there."""
    stages = len(forward)
    orders = [_order_1f1b(micro_batches, stages - stage) for stage in range(stages)]
    # When the forward, and the backward, of each micro-batch is done, by stage.
    done: list[tuple[list[float], list[float]]] = [([], []) for _ in range(stages)]
    now, at = [0.0] * stages, [0] * stages
    left = stages * 2 * micro_batches
    while left:
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                back = order[at[stage]]
                number = len(done[stage][back])
                source = stage + 1 if back else stage - 1
                before = done[source][back] if 0 <= source < stages else done[stage][0] if back else None
                if before is not None and len(before) <= number:
                    break
                begin = max(now[stage], before[number] if before is not None else 0.0)
                now[stage] = begin + (backward if back else forward)[stage]
                done[stage][back].append(now[stage])
                at[stage] += 1
                left -= 1
    return max(now)


def _order_1f1b(micro_batches: int, in_flight: int) -> list[bool]:
    """The passes of a stage, True for a backward: as many forwards as it may have in flight, then one of each."""
    ahead = min(micro_batches, in_flight)
    return [False] * ahead + [True, False] * (micro_batches - ahead) + [True] * ahead
