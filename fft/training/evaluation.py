"""The loss on tables that are not trained on."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from fft.data.batches import MicroBatch
from fft.data.by_dataset import dataset_names, summed
from fft.data.table import IGNORE
from fft.errors import UserError
from fft.parallel.groups import told_by_first
from fft.planning.preflight import Plan
from fft.training.engine import StageEngine
from fft.training.feed import Feed
from fft.training.loss import PairMeanLoss
from fft.training.metric_sinks import dataset_keys
from fft.training.preference import MEASURES

#: Datasets of a table whose losses are told, at most.
_MOST = 64


class Evaluated(NamedTuple):
    """Of a table: the mean loss over a ``count`` of predicted tokens, or of pairs, and what is told of these; mean loss
    and count of each of its ``datasets``, where it has several.
    """

    loss: float
    count: int
    measures: dict[str, float]
    datasets: dict[str, tuple[float, int]]


def with_datasets(plan: Plan, control: dist.ProcessGroup, log: Callable[[str], None]) -> Plan:
    """The plan of a run whose evaluations are told by dataset, where their tables have several.

    ``control`` is a group of all ranks that sends what is in host memory. Collective. Raises :class:`UserError` where a
    table's column of datasets holds no names.
    """
    evaluations = dict(plan.evaluations)
    for name, reader in evaluations.items():
        found = dataset_names(reader.table) if dist.get_rank() == 0 else []
        count, names = told_by_first([len(found), found[:_MOST]], control)
        if count > _MOST:
            log(f"warning: {reader.table.path} has {count:,} datasets: losses are told by dataset of at most {_MOST}")
        elif count > 1:
            evaluations[name] = reader.with_datasets(names)
    return dataclasses.replace(plan, evaluations=evaluations)


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
    trained, numbers, held = 0, [np.empty(0, np.int32)], [np.empty(0, np.int64)]

    def counted() -> Iterator[MicroBatch]:
        nonlocal trained
        for batch in batches:
            trained += batch.trained
            if batch.datasets is not None:
                numbers.append(batch.datasets.numbers if batch.pairs is None else batch.datasets.numbers[::2])
                held.append(_predicted(batch))
            yield batch

    recorded = engine.loss.recorded_losses = [] if datasets else None
    loss = engine.sum_losses(counted(), count)
    engine.loss.recorded_losses = None
    sums = np.zeros((2, datasets))
    if recorded:
        losses = torch.cat(recorded).cpu().numpy()
        sums[:] = [summed(of, np.concatenate(numbers), datasets) for of in (losses, np.concatenate(held))]
    own = np.concatenate([[loss, trained], sums.ravel()])
    totals = torch.from_numpy(own if engine.role.counts else np.zeros_like(own)).to(engine.device)
    dist.all_reduce(totals)
    (total, number), (losses, counts) = totals[:2].tolist(), totals[2:].view(2, datasets).tolist()
    return total, int(number), [*zip(losses, counts, strict=True)]


def _predicted(batch: MicroBatch) -> np.ndarray:
    """How much is predicted of each of a micro-batch's documents or, of pairs, whether this rank counts them: each."""
    if batch.datasets is None:
        raise ValueError("a micro-batch comes without the datasets of its documents")
    if batch.pairs is not None:
        return np.full(batch.pairs.count, min(1, batch.trained))
    return np.bincount(batch.datasets.documents[batch.labels != IGNORE], minlength=len(batch.datasets.numbers))


def measures(engine: StageEngine) -> dict[str, float]:
    """The means of what is told of pairs since it was last asked for; nothing in a run on tokens. Collective."""
    if not isinstance(engine.loss, PairMeanLoss):
        return {}
    taken = engine.loss.take_measures().to(engine.device)
    total = taken if engine.role.counts else torch.zeros_like(taken)
    dist.all_reduce(total)
    *sums, pairs = total.tolist()
    return {name: value / max(1.0, pairs) for name, value in zip(MEASURES, sums, strict=True)}
