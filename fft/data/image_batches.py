"""The images of micro-batches, in two steps: which they are and where they go, which is cheap; then their pixels.

The first step makes :class:`EncodedImages`: positions, places, grids, and the bytes of files. The second,
:class:`StepDecoding`, makes patches of those images of a step that this rank needs, in threads. Which images these are
may be chosen of the grids of the whole step, so that ranks share them out by what they cost; all ranks of a replica see
the same grids, whatever they decode.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import numpy as np

from fft.data.row_images import RowImages
from fft.data.table import Table
from fft.errors import UserError
from fft.images.grids import blank_grid
from fft.images.positions import positions_of
from fft.images.rules import GRIDS, ImageRules

#: Of the grids, int32 [images, 3], of each of a step's micro-batches, without the blank ones: the numbers of those
#: images of each micro-batch that this rank decodes, rising.
Chosen = Callable[[list[np.ndarray]], list[Sequence[int]]]


def run_rules(tables: Sequence[Table]) -> ImageRules | None:
    """The rules of the images of a run that reads these tables; None where no table has any.

    :func:`fft.images.rules.check_rules` compares them with a model's.
    Raises :class:`UserError` when those of a table are not known, or not those of another.
    """
    found: list[tuple[str, ImageRules]] = []
    for table in tables:
        if table.has_images and table.rules is None:
            raise UserError(
                f"{table.path} has images and no manifest that says what their grids mean: make the table with "
                "spark_jobs/tokenize.py --image_path."
            )
        if table.rules is not None:
            found.append((table.path, table.rules))
    for path, rules in found[1:]:
        first, own = found[0][1].facts(), rules.facts()
        differs = next((name for name in own if own[name] != first[name]), None)
        if differs is not None:
            raise UserError(
                f"{path} was made with {differs} = {own[differs]} of images, {found[0][0]} with {first[differs]}: "
                "make both tables with the same settings."
            )
    return found[0][1] if found else None


@dataclass(frozen=True)
class ImageBatch:
    """The images of a micro-batch of T tokens, and where they go. The last image is blank: no micro-batch is without.

    ``positions`` int32 [3, T], see :mod:`fft.images.positions`: they begin at 0 at every boundary of ``cu_seqlens``,
    and where the tokens begin that round T up; those of families of one axis are the same three times. ``index`` int32
    [N + 1]: where in the row the N tokens of images are, in order; the last entry is -1, for the blank image, of which
    the row has no tokens. ``grids`` int32 [I + 1, 3]: of the images in the row's order, and of the blank one.
    ``patches`` uint8 [P, 3 * patch * patch]: of those images that this rank decodes, by default all, in order, and of
    the blank one, whose are 0.
    """

    positions: np.ndarray
    index: np.ndarray
    grids: np.ndarray
    patches: np.ndarray


@dataclass(frozen=True)
class EncodedImages:
    """An :class:`ImageBatch` before its images are decoded: ``files`` says where the bytes of each are, as (row group,
    number in it); it is empty where these were not read."""

    positions: np.ndarray
    index: np.ndarray
    grids: np.ndarray
    files: list[tuple[RowImages, int]]


@dataclass
class RowLayout:
    """The images of a row that is being laid out, in its order."""

    grids: list[np.ndarray] = field(default_factory=list)
    files: list[tuple[RowImages, int]] = field(default_factory=list)

    def add(self, images: RowImages, start: int, stop: int) -> None:
        """Those of tokens [start, stop) of a row group."""
        own = images.among(start, stop)
        self.grids.append(images.grids[own.start : own.stop])
        if images.files is not None:
            self.files += [(images, number) for number in own]

    def encoded(self, ids: np.ndarray, ends: np.ndarray, rules: ImageRules) -> EncodedImages:
        """Of the finished row, whose documents, its unfilled tokens among them, end at ``ends``."""
        grids = np.concatenate([*self.grids, np.empty((0, 3), np.int32)])
        if rules.family in GRIDS:
            positions = positions_of(ids, ends.tolist(), grids, rules.image_token, rules.merge)
        else:
            begins = np.append(0, ends)
            counted = np.arange(len(ids)) - np.repeat(begins[:-1], np.diff(begins))
            positions = np.tile(counted.astype(np.int32), (3, 1))
        index = np.append(np.flatnonzero(ids == rules.image_token), -1).astype(np.int32)
        return EncodedImages(
            positions, index, np.concatenate([grids, [blank_grid(rules)]]).astype(np.int32), self.files
        )


class StepDecoding:
    """The images of a step's micro-batches on their way to patches: those that are ``chosen``, or all.

    ``pool`` decodes them, or, without one, whoever asks for them. Threads write where the patches will be read, so that
    nothing is copied afterwards.
    """

    def __init__(
        self,
        step: Sequence[EncodedImages],
        rules: ImageRules,
        chosen: Chosen | None = None,
        pool: Executor | None = None,
    ) -> None:
        self._step, self._rules, self._pool = step, rules, pool
        own = [range(len(one.files)) for one in step] if chosen is None else chosen([one.grids[:-1] for one in step])
        self._patches: list[np.ndarray] = []
        self._waiting: list[tuple[np.ndarray, RowImages, int]] = []
        for one, numbers in zip(step, own, strict=True):
            sizes = one.grids[[*numbers, -1]].astype(np.int64).prod(1)
            ends = np.cumsum(sizes).tolist()
            patches = np.empty((ends[-1], 3 * rules.patch**2), np.uint8)
            patches[ends[-1] - int(sizes[-1]) :] = 0
            self._patches.append(patches)
            for number, end, size in zip(numbers, ends, sizes.tolist(), strict=False):
                self._waiting.append((patches[end - size : end], *one.files[number]))
        self._waiting.reverse()  # the first is taken from the end
        self._running: list[Future[None]] = []

    def begin(self, most: int) -> None:
        """Begin to decode, from the first image on, those whose patches have ``most`` bytes in all."""
        while self._pool is not None and self._waiting and (most := most - self._waiting[-1][0].nbytes) >= 0:
            self._running.append(self._pool.submit(self._decode, *self._waiting.pop()))

    def batches(self) -> list[ImageBatch]:
        """All of them, decoded. Raises :class:`UserError` naming file, row group, row and image for bytes of none."""
        while self._waiting:
            task = self._waiting.pop()
            if self._pool is None:
                self._decode(*task)
            else:
                self._running.append(self._pool.submit(self._decode, *task))
        for running in self._running:
            running.result()
        return [
            ImageBatch(one.positions, one.index, one.grids, patches)
            for one, patches in zip(self._step, self._patches, strict=True)
        ]

    def _decode(self, into: np.ndarray, images: RowImages, number: int) -> None:
        images.decode(number, self._rules, into)
