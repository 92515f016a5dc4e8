"""Sums over the trained tokens of micro-batches by dataset: which token is of which, and what that adds up to."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from fft.data.known import DATASET, IGNORE
from fft.data.samples import Samples
from fft.data.table import Table
from fft.data.trace import document_names

#: Row groups whose names are held, as many as there may be lanes.
_HELD = 256


class DatasetNames:
    """The dataset of every token of a reader's samples: what the column ``dataset`` says, else the path of the table.

    For one thread; it reads by itself, not through the reader that it is given.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples.for_stage(ids=False, labels=True)
        self._known: OrderedDict[tuple[str, int], list[list[str]]] = OrderedDict()

    def stretches(self, indices: Sequence[int], total_samples: int, stride: int) -> list[tuple[str, int, int]]:
        """(dataset, first token, last + 1) of the documents of a micro-batch of samples, in their order, as
        :func:`fft.data.batches.micro_batch` lays them out: each sample begins ``stride`` tokens after the one before
        or, if that is 0 as where it is ragged, where that ended. Samples from ``total_samples`` on are blank.

        Raises :class:`UserError` for rows that cannot be read.
        """
        found: list[tuple[str, int, int]] = []
        at = 0
        for number, index in enumerate(index for index in indices if index < total_samples):
            at = number * stride if stride else at
            member, own = self._samples.member(index)
            (spans,) = member.samples([own])
            for span, rows in spans:
                names = self._names(member.table, span.group)
                ends = rows.document_ends(span.row, 0, int(rows.offsets[span.row + 1] - rows.offsets[span.row]))
                for document, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                    length = min(end, span.stop) - max(begin, span.start)
                    if length > 0:
                        name = names[span.row][document] if names else ""
                        found.append((name or member.table.path, at, at + length))
                        at += length
        return found

    def _names(self, table: Table, group: int) -> list[list[str]]:
        key = (table.source, group)
        if key not in self._known:
            self._known[key] = document_names(table, group, DATASET)
            while len(self._known) > _HELD:
                self._known.popitem(last=False)
        return self._known[key]


def sums_by_dataset(
    losses: np.ndarray, labels: np.ndarray, stretches: Sequence[tuple[str, int, int]]
) -> dict[str, tuple[float, int]]:
    """Sum of the losses, and number, of each dataset's trained tokens, of a micro-batch's ``losses`` [T] and ``labels``
    [T], which stand where :class:`fft.data.batches.MicroBatch` has them: the loss at a token is that of the next one.

    Sums of several micro-batches, and of ranks, add up; a dataset's loss is its sum by its number.
    """
    trained = labels != IGNORE
    sums: dict[str, tuple[float, int]] = {}
    for name, begin, end in stretches:
        before, count = sums.get(name, (0.0, 0))
        own = trained[begin:end]
        sums[name] = before + float(losses[begin:end][own].sum(dtype=np.float64)), count + int(own.sum())
    return sums
