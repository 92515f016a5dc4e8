"""The loss on tables that are not trained on."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from fft.data.batches import MicroBatch
from fft.errors import UserError
from fft.planning.preflight import Plan
from fft.training.dataset_losses import DatasetSums
from fft.training.engine import StageEngine
from fft.training.feed import Feed
from fft.training.loss import PairMeanLoss
from fft.training.metric_sinks import dataset_keys
from fft.training.preference import MEASURES


class Evaluated(NamedTuple):
    """Of a table: the mean loss over a ``count`` of predicted tokens, or of pairs, and what is told of these; mean loss
    and count of each of its ``datasets``, where it has several.
    """

    loss: float
    count: int
    measures: dict[str, float]
    datasets: dict[str, tuple[float, int]]


def evaluated(engine: StageEngine, feed: Feed, plan: Plan, name: str) -> Evaluated:
    """The evaluation of the table of this name, the same on all ranks.

    Collective. Raises :class:`UserError` for a table in which nothing is predicted.
    """
    names = plan.evaluations[name].datasets
    total, count, by_dataset = evaluate(engine, *feed.evaluation(name), len(names))
    if not count:
        table = plan.evaluations[name].tables[0].path
        raise UserError(f"--eval_data {table} holds nothing to predict: give documents of 2 tokens or more.")
    told = zip(dataset_keys(names), by_dataset, strict=True)
    means = {key: (loss / held, int(held)) for key, (loss, held) in told if held}
    return Evaluated(total / count, count, measures(engine), means)


def evaluate(
    engine: StageEngine, batches: Iterable[MicroBatch], count: int, datasets: int
) -> tuple[float, int, list[tuple[float, float]]]:
    """Sum of the losses of all predicted tokens, or pairs, and their number; both of each of so many datasets, where
    micro-batches say of which their documents are. Collective.

    ``batches`` are this rank's of the ``count`` micro-batches of its replica, none on a rank that reads nothing. The
    result is the same on all ranks and, but for rounding, on every layout.
    """
    trained, found = 0, DatasetSums(engine.loss, datasets)

    def counted() -> Iterator[MicroBatch]:
        nonlocal trained
        for batch in batches:
            trained += batch.trained
            found.note(batch)
            yield batch

    with found.recording():
        loss = engine.sum_losses(counted(), count)
    totals = engine.total_of(torch.from_numpy(np.concatenate([[loss, trained], found.sums().ravel()])))
    (total, number), (losses, counts) = totals[:2].tolist(), totals[2:].view(2, datasets).tolist()
    return total, int(number), [*zip(losses, counts, strict=True)]


def measures(engine: StageEngine) -> dict[str, float]:
    """The means of what is told of pairs since it was last asked for; nothing in a run on tokens. Collective."""
    if not isinstance(engine.loss, PairMeanLoss):
        return {}
    *sums, pairs = engine.total_of(engine.loss.take_measures()).tolist()
    return {name: value / max(1.0, pairs) for name, value in zip(MEASURES, sums, strict=True)}
