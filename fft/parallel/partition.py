"""Cut a list of layers into pipeline stages."""

from collections.abc import Sequence

from fft.errors import UserError

METHODS = ("fast", "uniform", "parameters")


def partition_balanced(costs: Sequence[float], stages: int) -> list[int]:
    """Cut ``costs`` into ``stages`` contiguous, non-empty pieces so that the dearest piece is as cheap as possible.

    Returns the bounds, ``stages + 1`` increasing indices. Dynamic programming, O(stages * layers^2); among equals the
    earliest cut wins. Raises ValueError when there are fewer layers than stages.
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
    for stage in range(1, stages + 1):
        best, cut = [float("inf")] * (n + 1), [0] * (n + 1)
        for stop in range(stage, n + 1):
            for start in range(stage - 1, stop):
                value = max(worst[start], prefix[stop] - prefix[start])
                if value < best[stop]:
                    best[stop], cut[stop] = value, start
        worst = best
        cuts.append(cut)
    bounds = [n]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return bounds[::-1]


def stage_bounds(method: str, flops: Sequence[float], parameters: Sequence[int], stages: int) -> list[int]:
    """Bounds of the stages by ``--partition_method``.

    ``flops`` and ``parameters`` hold one number per pipeline layer. ``method`` is one of :data:`METHODS` or layers per
    stage as in ``5,4,4`` (their sum must be the number of layers). Raises :class:`UserError`.
    """
    layers = len(flops)
    if layers < stages:
        raise UserError(
            f"--pipe_parallel_size {stages} is more than the model's {layers} pipeline layers: use at most {layers}."
        )
    if method == "fast":
        return partition_balanced(flops, stages)
    if method == "parameters":
        return partition_balanced(parameters, stages)
    if method == "uniform":
        return partition_balanced([1.0] * layers, stages)
    try:
        sizes = [int(x) for x in method.split(",")]
    except ValueError:
        raise UserError(
            f"--partition_method {method!r} is none of {', '.join(METHODS)} and no list of layers per stage like 5,4,4."
        ) from None
    if len(sizes) != stages or sum(sizes) != layers or min(sizes) < 1:
        raise UserError(
            f"--partition_method {method} must name {stages} positive counts (one a stage) that sum to {layers} layers "
            "(embedding, decoder layers or their halves, norm and head)."
        )
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return bounds
