"""Learning-rate schedules as multiples of the peak rate."""

import math
from collections.abc import Callable


def lr_multiplier(
    kind: str, warmup_steps: int, total_steps: int, floor: float, decay_ratio: float = 0.1
) -> Callable[[int], float]:
    """Multiplier of the peak learning rate at optimizer step ``i`` (0-based), for ``LambdaLR``.

    Linear warm-up over ``warmup_steps`` (the first step already moves), then ``cosine``, ``linear`` or ``constant``
    until ``total_steps``, ending at ``floor`` (a fraction of the peak); or ``wsd``, warmup-stable-decay: constant, but
    linear to ``floor`` over the last ``decay_ratio`` of all steps (MiniCPM, arXiv:2404.06395).
    """
    decay_from = max(warmup_steps, round(total_steps * (1 - decay_ratio)))

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        if kind == "cosine":
            return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
        if kind == "linear":
            return 1 - (1 - floor) * progress
        if kind == "wsd" and step >= decay_from:
            return 1 - (1 - floor) * min(1.0, (step - decay_from) / max(1, total_steps - decay_from))
        return 1.0

    return multiplier
