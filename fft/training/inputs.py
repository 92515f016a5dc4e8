"""Micro-batches on their way to the device, as DeepSpeed's engine takes them."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from fft.data.batches import MicroBatch
from fft.data.table import IGNORE
from fft.models.causal_lm import Known
from fft.ops.documents import UnderWay
from fft.training.shared_tower import SharedTower

#: Inputs of the first stage, and targets of the last.
Sent = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class Sender:
    """Sends micro-batches to ``device``, whose boundaries ``under_way`` is told, without waiting for it.

    Where a tower is ``shared``, they come with the features of their images.
    """

    def __init__(self, under_way: UnderWay[Known], device: torch.device, shared: SharedTower | None) -> None:
        self._under_way, self._device, self._shared = under_way, device, shared

    def send(self, batches: Iterable[MicroBatch]) -> Iterator[Sent]:
        """All of a step, or of an evaluation, as they are asked for. Collective where a tower is shared."""
        self._under_way.start()
        if self._shared is None:
            return map(self._to_device, batches)
        batches = list(batches)
        images = [batch.images for batch in batches if batch.images is not None]
        features = self._shared.encode(images, together=torch.is_grad_enabled())
        return map(self._to_device, batches, features or repeat(()))

    def _to_device(self, batch: MicroBatch, features: Sequence[Tensor] | None = None) -> Sent:
        """With ``features`` of its images the first stage gets these, not the images."""
        self._under_way.expect(batch.cu_seqlens.tolist())
        inputs, trained = (batch.input_ids, batch.cu_seqlens), np.flatnonzero(batch.labels != IGNORE)
        if (images := batch.images) is not None:
            inputs = *inputs, images.positions, images.index
            inputs = inputs if features is not None else (images.patches, *inputs, images.grids)
        inputs = inputs if batch.draws is None else (*inputs, batch.draws)
        sent = *(features or ()), *map(self._sent, inputs)
        targets = [trained, batch.labels[trained]]
        if (pairs := batch.pairs) is not None:
            targets += [np.bincount(pairs.documents[trained], minlength=len(pairs.reference)), pairs.reference]
        elif (datasets := batch.datasets) is not None:
            targets += [np.bincount(datasets.documents[trained], minlength=len(datasets.numbers))]
        return sent, tuple(map(self._sent, targets))

    def _sent(self, array: np.ndarray) -> Tensor:
        """On the device already, so that the engine's own copies stay there."""
        x = torch.from_numpy(array)
        return x if self._device.type == "cpu" else x.pin_memory(self._device.type).to(self._device, non_blocking=True)
