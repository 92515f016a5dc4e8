"""Learning-rate schedules as multiples of the peak rate."""

import math
from collections.abc import Callable


def lr_multiplier(kind: str, warmup_steps: int, total_steps: int, floor: float) -> Callable[[int], float]:
    """Multiplier of the peak learning rate at optimizer step ``i`` (0-based), for ``LambdaLR``.

    Linear warm-up over ``warmup_steps`` (the first step already moves), then ``cosine``, ``linear`` or ``constant``
    until ``total_steps``, ending at ``floor`` (a fraction of the peak).
    """

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        if kind == "cosine":
            return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
        if kind == "linear":
            return 1 - (1 - floor) * progress
        return 1.0

    return multiplier
