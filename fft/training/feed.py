"""What a rank's stage is fed with: the ids that the first stage takes, the labels that the last one takes."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from fft.data.batches import BatchPlan, Loader, MicroBatch
from fft.data.image_batches import Chosen, ImageBatch
from fft.data.table import IGNORE
from fft.ops.documents import Documents
from fft.ops.sequence_parallel import SequenceParallel
from fft.parallel.role import StageRole
from fft.planning.preflight import Plan
from fft.training.run_folder import Start


class Feed:
    """Micro-batches of this rank: those of a run's steps, from where it begins, and those of its evaluations.

    With ``sequence`` the rank takes its share of every row's tokens. A stage in the middle opens no table, unless all
    ranks decode images, each those that are ``chosen``.
    """

    def __init__(
        self,
        plan: Plan,
        batches: BatchPlan,
        role: StageRole,
        sequence: SequenceParallel | None,
        start: Start,
        chosen: Chosen | None = None,
    ) -> None:
        self._batches, self._role, self._sequence = batches, role, sequence
        self._begin, self._end = start.step, plan.total_steps
        own = {"ids": role.first, "labels": role.last, "images": role.first or chosen is not None}
        self._training = plan.train and plan.train.for_stage(**own)
        self._evaluations = {name: reader.for_stage(**own) for name, reader in plan.evaluations.items()}
        self._chosen, self._reads = chosen, role.reads or chosen is not None
        self._loader: Loader | None = None
        if self._training is not None and self._reads and plan.total_steps:
            self._loader = Loader(self._training, batches, plan.total_samples, chosen)
            if start.checkpoint is not None:
                self._loader.load_state_dict(start.state["data"])

    def steps(self) -> Iterator[tuple[list[MicroBatch], float]]:
        """The micro-batches of every step, and the seconds that this rank waited for them."""
        if self._loader is None:
            yield from (([], 0.0) for _ in range(self._begin, self._end))
            return
        waited = 0.0
        for batches in self._loader:
            yield [own_share(batch, self._sequence) for batch in batches], self._loader.waited - waited
            waited = self._loader.waited

    def evaluation(self, name: str) -> tuple[Iterator[MicroBatch], int]:
        """An epoch of the evaluation of this name: this rank's micro-batches, and how many there are on ranks that read
        them.
        """
        reader, plan = self._evaluations[name], dataclasses.replace(self._batches, micro_batches=1)
        samples = reader.samples_per_epoch
        count = -(-samples // plan.global_batch)
        steps = Loader(reader, plan, samples, self._chosen) if self._reads else ()
        return (own_share(batch, self._sequence) for (batch,) in steps), count

    def state(self) -> dict[str, object] | None:
        """What :class:`Feed` goes on from, as it is kept in checkpoints; None where nothing is read."""
        return self._loader.state_dict() if self._loader else None


def own_share(batch: MicroBatch, sequence: SequenceParallel | None) -> MicroBatch:
    """A rank's share of a micro-batch: its tokens, and labels that were shifted before; all boundaries and images.

    Of tokens of images it says where they are in the share, and which of all features they take.
    """
    if sequence is None:
        return dataclasses.replace(batch, images=batch.images and _placed(batch.images, batch.labels.size))
    documents = Documents.from_padded(torch.from_numpy(batch.cu_seqlens))
    own = sequence.tokens(sequence.shards(documents.bounds))
    labels = batch.labels[own]
    trained, pairs = int(np.count_nonzero(labels != IGNORE)), batch.pairs
    if pairs is not None:
        trained = 0 if sequence.position else pairs.count  # all of a row's ranks have some of each: one counts them
        pairs = dataclasses.replace(pairs, documents=pairs.documents[own])
    datasets = batch.datasets
    if datasets is not None:
        datasets = dataclasses.replace(datasets, documents=datasets.documents[own])
    images = batch.images and _placed(batch.images, batch.labels.size, own)
    draws = None if batch.draws is None else batch.draws[own]
    return MicroBatch(batch.input_ids[:, own], labels, batch.cu_seqlens, trained, images, pairs, draws, datasets)


def _placed(images: ImageBatch, tokens: int, own: np.ndarray | slice = slice(None)) -> ImageBatch:
    """With positions, places and features of a rank's ``own`` of a row's tokens, as the pipeline takes them."""
    places = np.full(tokens, -1, np.int32)
    held = np.arange(tokens)[own]
    places[held] = np.arange(len(held))
    features = np.flatnonzero(np.append(places[images.index[:-1]] >= 0, True))
    index = np.stack([np.append(places[images.index[features[:-1]]], -1), features]).astype(np.int32)
    return dataclasses.replace(images, positions=np.ascontiguousarray(images.positions[:, own]), index=index)
