"""The loss on a table that is not trained on."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from fft.data.batches import MicroBatch
from fft.training.engine import StageEngine
from fft.training.feed import Feed


def evaluate(engine: StageEngine, feed: Feed) -> tuple[float, int]:
    """Sum of the losses of all predicted tokens of the evaluation's table, and their number. Collective.

    They are the same on all ranks and, but for rounding, on every layout.
    """
    micro_batches, batches = feed.evaluation()
    trained = 0

    def counted() -> Iterator[MicroBatch]:
        nonlocal trained
        for batch in batches:
            trained += batch.trained
            yield batch

    loss = engine.sum_losses(counted(), micro_batches)
    own = [loss, float(trained)] if engine.role.counts else [0.0, 0.0]
    totals = torch.tensor(own, dtype=torch.float64).to(engine.device)
    dist.all_reduce(totals)
    return float(totals[0]), int(totals[1])
