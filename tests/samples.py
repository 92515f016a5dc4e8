"""Samples and records by themselves, for tests that look at one; the trainer only makes micro-batches of them."""

from dataclasses import dataclass

import numpy as np

from fft.data.batches import micro_batch
from fft.data.samples import Samples
from fft.text.records import Keys


@dataclass(frozen=True)
class Sample:
    """``seq_len`` tokens: ids, labels aligned with the position that predicts them, boundaries from 0 to seq_len."""

    input_ids: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray


def read_sample(reader: Samples, index: int) -> Sample:
    """Sample ``index`` counted from the start of epoch 0."""
    batch = micro_batch(reader, [index], index + 1)
    return Sample(batch.input_ids[0], batch.labels, np.unique(batch.cu_seqlens))


class TextKeys(Keys):
    """Keys of texts, as far as finding and reading inputs asks the task."""

    bytes_beside = 0
