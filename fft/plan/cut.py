"""Cut layers into stages so that the slowest is as fast as can be, and none needs more memory than there is."""

from collections.abc import Callable, Sequence
from itertools import accumulate


def fastest_cut(
    times: Sequence[float], stages: int, fits: Callable[[int, int, int], bool] | None = None, tolerance: float = 1e-4
) -> tuple[int, ...] | None:
    """Bounds of ``stages`` stretches of layers with these ``times``; None where no cut fits.

    ``fits(stage, start, stop)`` says whether a stage can have layers ``start`` to ``stop``: fewer always fit, too.
    The least time of the slowest stage is found by bisection, to ``tolerance`` of it; each stage takes as many layers
    as it can, but leaves one to each of those after it. (:func:`fft.planning.partition.partition_balanced` finds the
    same exactly, in a time that a search of thousands of layouts does not have.)
    """
    ends = [0.0, *accumulate(times)]
    layers = len(times)
    if stages > layers:
        return None
    known: dict[tuple[int, int, int], bool] = {}

    def fit(stage: int, start: int, stop: int) -> bool:
        if fits is None:
            return True
        key = stage, start, stop
        if key not in known:
            known[key] = fits(stage, start, stop)
        return known[key]

    def cut(limit: float) -> tuple[int, ...] | None:
        bounds = [0]
        for stage in range(stages):
            start, most = bounds[-1], layers - (stages - 1 - stage)
            stop = start + 1
            while stop < most and ends[stop + 1] - ends[start] <= limit:
                stop += 1
            low = start  # the most that fits, by bisection
            if fit(stage, start, stop):
                low = stop
            else:
                high = stop
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if fit(stage, start, middle) else (low, middle)
            if low == start or ends[low] - ends[start] > limit:
                return None
            bounds.append(low)
        return tuple(bounds) if bounds[-1] == layers else None

    low, high = max(ends[-1] / stages, *times) * (1 - 1e-12), ends[-1] * (1 + 1e-12)
    best = cut(low * (1 + 1e-9))
    if best is not None:
        return best
    best = cut(high)
    if best is None:
        return None
    while high - low > tolerance * high:
        middle = (low + high) / 2
        found = cut(middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best
