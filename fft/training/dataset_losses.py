"""The loss by dataset: of a table that is evaluated, and of what a step trains on."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from fft.data.batches import MicroBatch
from fft.data.by_dataset import counted_names, dataset_names, summed, whole_datasets
from fft.data.table import IGNORE
from fft.parallel.groups import told_by_first
from fft.planning.preflight import Plan
from fft.training.engine import StageEngine
from fft.training.loss import MeanLoss, PairMeanLoss
from fft.training.metric_sinks import dataset_keys

#: Datasets of a table whose losses are told, at most.
_MOST = 64


def with_datasets(plan: Plan, control: dist.ProcessGroup, log: Callable[[str], None]) -> Plan:
    """The plan of a run whose losses are told by dataset, where its tables have several.

    A table that is evaluated is read for their names; of one that is trained on they are those that its manifest
    counts, or, of several, each is a dataset. ``control`` is a group of all ranks that sends what is in host memory.
    Collective. Raises :class:`UserError` where the column of datasets of a table that is evaluated holds no names.
    """
    evaluations = dict(plan.evaluations)
    for name, reader in evaluations.items():
        found = dataset_names(reader.table) if dist.get_rank() == 0 else []
        count, names = told_by_first([len(found), found[:_MOST]], control)
        if _told(count, reader.table.path, log):
            evaluations[name] = reader.with_datasets(names)
    if (train := plan.train) is not None:
        tables, whole = train.tables, whole_datasets(train.tables)
        found = sorted({*whole.values(), *(name for table in tables for name in counted_names(table))})
        count, names, whole = told_by_first([len(found), found[:_MOST], whole], control)
        if _told(count, ", ".join(table.path for table in tables), log):
            train = train.with_datasets(names, whole)
    return dataclasses.replace(plan, evaluations=evaluations, train=train)


def _told(count: int, place: str, log: Callable[[str], None]) -> bool:
    """Whether the losses of so many datasets are told."""
    if count > _MOST:
        log(f"warning: {place} has {count:,} datasets: losses are told by dataset of at most {_MOST}")
    return 1 < count <= _MOST


class DatasetSums:
    """Losses of documents, or pairs, and how much is predicted of them, by dataset."""

    def __init__(self, loss: MeanLoss, datasets: int) -> None:
        self._loss, self._datasets = loss, datasets
        self._numbers, self._held = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        self._recorded: list[torch.Tensor] = []

    def note(self, batch: MicroBatch) -> None:
        """Of which datasets its documents are; nothing of one that does not say."""
        if (datasets := batch.datasets) is None:
            return
        numbers = datasets.numbers
        if batch.pairs is not None:  # whose losses are of two documents; whether this rank counts them: each
            self._numbers.append(numbers[::2])
            self._held.append(np.full(batch.pairs.count, min(1, batch.trained)))
        else:
            self._numbers.append(numbers)
            self._held.append(np.bincount(datasets.documents[batch.labels != IGNORE], minlength=len(numbers)))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """In this block the losses of the micro-batches that were noted, or are, are computed, in their order."""
        self._loss.recorded_losses = self._recorded if self._datasets else None
        try:
            yield
        finally:
            self._loss.recorded_losses = None

    def sums(self) -> np.ndarray:
        """The sums of losses, and of what is predicted, of this rank: float64 [2, datasets]."""
        if not self._recorded:
            return np.zeros((2, self._datasets))
        losses, numbers = torch.cat(self._recorded).cpu().numpy(), np.concatenate(self._numbers)
        return np.stack([summed(of, numbers, self._datasets) for of in (losses, np.concatenate(self._held))])


def step_by_dataset(
    engine: StageEngine, batches: Sequence[MicroBatch], names: Sequence[str]
) -> tuple[float, dict[str, float]]:
    """Take a step, as :meth:`StageEngine.step`: its mean loss, and that of each of the datasets of these ``names`` as
    ``loss/NAME``, over ``tokens/NAME`` or ``pairs/NAME``, where something of it is trained on. Collective.
    """
    if not names:
        return engine.step(batches), {}
    found = DatasetSums(engine.loss, len(names))
    for batch in batches:
        found.note(batch)
    with found.recording():
        loss = engine.step(batches)
    totals = engine.total_of(torch.from_numpy(found.sums()))
    unit = "pairs" if isinstance(engine.loss, PairMeanLoss) else "tokens"
    values: dict[str, float] = {}
    for key, its_loss, held in zip(dataset_keys(names), *totals.tolist(), strict=True):
        if held:
            values |= {f"loss/{key}": its_loss / held, f"{unit}/{key}": held}
    return loss, values
