"""The loss on tables that are not trained on."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from fft.data.batches import MicroBatch
from fft.errors import UserError
from fft.planning.preflight import Plan
from fft.training.engine import StageEngine
from fft.training.feed import Feed
from fft.training.loss import PairMeanLoss
from fft.training.preference import MEASURES


class Evaluated(NamedTuple):
    """Of a table: the mean loss over a ``count`` of predicted tokens, or of pairs, and what is told of these."""

    loss: float
    count: int
    measures: dict[str, float]


def evaluated(engine: StageEngine, feed: Feed, plan: Plan, name: str) -> Evaluated:
    """The evaluation of the table of this name, the same on all ranks.

    Collective. Raises :class:`UserError` for a table in which nothing is predicted.
    """
    total, count = evaluate(engine, *feed.evaluation(name))
    if not count:
        table = plan.evaluations[name].tables[0].path
        raise UserError(f"--eval_data {table} holds nothing to predict: give documents of 2 tokens or more.")
    return Evaluated(total / count, count, measures(engine))


def evaluate(engine: StageEngine, batches: Iterable[MicroBatch], count: int) -> tuple[float, int]:
    """Sum of the losses of all predicted tokens, or pairs, and their number. Collective.

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
    return float(totals[0]), int(totals[1])


def measures(engine: StageEngine) -> dict[str, float]:
    """The means of what is told of pairs since it was last asked for; nothing in a run on tokens. Collective."""
    if not isinstance(engine.loss, PairMeanLoss):
        return {}
    taken = engine.loss.take_measures().to(engine.device)
    total = taken if engine.role.counts else torch.zeros_like(taken)
    dist.all_reduce(total)
    *sums, pairs = total.tolist()
    return {name: value / max(1.0, pairs) for name, value in zip(MEASURES, sums, strict=True)}
