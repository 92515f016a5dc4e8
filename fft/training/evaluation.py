"""The loss on a table that is not trained on."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from fft.data.batches import MicroBatch
from fft.training.engine import StageEngine
from fft.training.loss import PairMeanLoss
from fft.training.preference import MEASURES


def evaluate(engine: StageEngine, batches: Iterable[MicroBatch], count: int) -> tuple[float, int, dict[str, float]]:
    """Sum of the losses of all predicted tokens, or pairs, their number, and what :func:`measures` tells. Collective.

    ``batches`` are this rank's of the ``count`` micro-batches of its replica, none on a rank that reads nothing. The
    result is the same on all ranks and, but for rounding, on every layout.
    """
    trained = 0

    def counted() -> Iterator[MicroBatch]:
        nonlocal trained
        for batch in batches:
            trained += batch.trained
            yield batch

    loss = engine.sum_losses(counted(), count)
    own = [loss, float(trained)] if engine.role.counts else [0.0, 0.0]
    totals = torch.tensor(own, dtype=torch.float64).to(engine.device)
    dist.all_reduce(totals)
    return float(totals[0]), int(totals[1]), measures(engine, "eval_")


def measures(engine: StageEngine, prefix: str = "") -> dict[str, float]:
    """The means of what is told of pairs since it was last asked for; nothing in a run on tokens. Collective."""
    if not isinstance(engine.loss, PairMeanLoss):
        return {}
    taken = engine.loss.take_measures().to(engine.device)
    total = taken if engine.role.counts else torch.zeros_like(taken)
    dist.all_reduce(total)
    *sums, pairs = total.tolist()
    return {f"{prefix}{name}": value / max(1.0, pairs) for name, value in zip(MEASURES, sums, strict=True)}
