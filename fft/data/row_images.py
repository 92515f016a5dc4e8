"""The images of a decoded row group: which row each is of, and where its tokens are. Checked as they are read."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fft.data.arrow_lists import list_values
from fft.data.known import GRIDS, IMAGES
from fft.errors import UserError
from fft.images.grids import ImageError, are_grids
from fft.images.pixels import patches_of
from fft.images.positions import image_begins
from fft.images.rules import ImageRules

_AGAIN = "write the table again"


@dataclass(frozen=True)
class RowImages:
    """Images of a row group, ``where``: those of row ``i`` are ``offsets[i]`` to ``offsets[i + 1]`` of all.

    ``grids`` int32 [images, 3]; ``begins`` int64 [images], the tokens of the row group with which they begin; ``files``
    are their bytes, or None where these were not asked for.
    """

    where: str
    offsets: np.ndarray
    grids: np.ndarray
    begins: np.ndarray
    files: pa.ChunkedArray | None

    @classmethod
    def read(
        cls, loaded: pa.Table, where: str, ids: np.ndarray, offsets: np.ndarray, ends: np.ndarray, rules: ImageRules
    ) -> "RowImages | None":
        """Of a decoded row group, ``where``, whose rows begin at ``offsets`` of ``ids`` and whose documents end at
        ``ends`` of them. None for a table that has no images.

        Raises :class:`UserError` naming row group and row when images and tokens do not belong together.
        """
        held = ids == rules.image_token
        if GRIDS not in loaded.column_names:
            if held.any():
                raise UserError(
                    f"{where}, row {int(offsets.searchsorted(held.argmax(), 'right')) - 1} has tokens of images (id "
                    f"{rules.image_token}), but no images: take them out of the texts and {_AGAIN}."
                )
            return None
        found = np.append(0, np.cumsum(held))[offsets]
        values, at = list_values(loaded, GRIDS, where)
        _check_rows(np.diff(at) % 3 == 0, where, f"has {GRIDS} of which not all are three numbers")
        grids, at = values.astype(np.int64).reshape(-1, 3), at // 3
        rows = np.repeat(np.arange(len(at) - 1), np.diff(at))
        right = are_grids(grids, rules)
        _check_rows(np.bincount(rows[~right], minlength=len(at) - 1) == 0, where, f"has {GRIDS} that are none")
        counts = grids.prod(1) // rules.merge**2
        expected = np.append(0, np.cumsum(counts))[at]
        _check_rows(
            np.diff(found) == np.diff(expected), where, f"has another number of tokens of images than its {GRIDS}"
        )
        begins = _begins(ids, offsets, counts, at, rules.image_token, where)
        # The document in which an image begins must be the one in which it ends.
        whole = ends.searchsorted(begins, "right") == ends.searchsorted(begins + counts - 1, "right")
        _check_rows(
            np.bincount(rows[~whole], minlength=len(at) - 1) == 0, where, "has a document that ends in an image"
        )
        files = _files(loaded, where, at) if IMAGES in loaded.column_names else None
        return cls(where, at, grids.astype(np.int32), begins, files)

    def among(self, start: int, stop: int) -> range:
        """The images that begin in tokens [start, stop) of the row group."""
        return range(*self.begins.searchsorted((start, stop)).tolist())

    def decode(self, image: int, rules: ImageRules, into: np.ndarray) -> None:
        """Write an image's patches, uint8 [patches, 3 * patch * patch]. Raises :class:`UserError` naming it when its
        bytes, which must be there, are none of an image."""
        if self.files is None:
            raise ValueError(f"{self.where} was read without the bytes of its images")
        tiles, high, wide = self.grids[image].tolist()
        try:
            patches_of(self.files[image].as_py(), (tiles, high, wide), rules, into)
        except ImageError as error:
            row = int(self.offsets.searchsorted(image, "right")) - 1
            raise UserError(
                f"{self.where}, row {row}: image {image - int(self.offsets[row]) + 1} {error}: {_AGAIN} without it."
            ) from error


def _check_rows(right: np.ndarray, where: str, what: str) -> None:
    if not right.all():
        raise UserError(f"{where}, row {int(right.argmin())} {what}: {_AGAIN}.")


def _begins(
    ids: np.ndarray, offsets: np.ndarray, counts: np.ndarray, at: np.ndarray, image_token: int, where: str
) -> np.ndarray:
    try:
        return image_begins(ids, counts, image_token)
    except ValueError:
        for row in range(len(at) - 1):  # which is it?
            try:
                image_begins(ids[offsets[row] : offsets[row + 1]], counts[at[row] : at[row + 1]], image_token)
            except ValueError as error:
                raise UserError(f"{where}, row {row}: {error}: {_AGAIN}.") from error
        raise


def _files(loaded: pa.Table, where: str, offsets: np.ndarray) -> pa.ChunkedArray:
    lists = loaded.column(IMAGES)
    files = pc.list_flatten(lists)
    if lists.null_count or files.null_count:
        raise UserError(f"{where}: column {IMAGES} holds nulls: {_AGAIN} without them.")
    counts = pc.list_value_length(lists).to_numpy()
    _check_rows(counts == np.diff(offsets), where, f"has another number of {IMAGES} than of {GRIDS}")
    return files
