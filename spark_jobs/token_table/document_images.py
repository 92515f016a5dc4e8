"""Images of documents that are packed: which document each belongs to, and how they follow it into its row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fft.data.arrow_lists import int_lists, unpack_bytes, values_of_bytes
from fft.data.known import GRIDS, IMAGES
from fft.data.packing import DocumentSpans
from fft.errors import UserError
from fft.images.positions import image_begins
from fft.images.rules import ImageRules


@dataclass(frozen=True)
class DocumentImages:
    """Images of documents: those of document ``d`` are ``offsets[d]`` to ``offsets[d + 1]`` of ``grids``, int32
    [images, 3], and of ``files``, their bytes."""

    offsets: np.ndarray
    grids: np.ndarray
    files: pa.BinaryArray

    @classmethod
    def read(
        cls, batch: pa.RecordBatch, ids: np.ndarray, row_offsets: np.ndarray, offsets: np.ndarray, rules: ImageRules
    ) -> "DocumentImages":
        """Of a batch of rows at ``row_offsets`` of ``ids``, whose documents begin at ``offsets``.

        Raises :class:`UserError` when the rows' images are not those of their tokens.
        """
        lists = unpack_bytes(batch.column(IMAGES))
        grids, _ = values_of_bytes(batch.column(GRIDS))
        grids = grids.reshape(-1, 3)
        rows = np.repeat(np.arange(batch.num_rows), lists.value_lengths().to_numpy())
        try:
            begins = image_begins(ids, grids.astype(np.int64).prod(1) // rules.merge**2, rules.image_token)
            if (begins < row_offsets[rows]).any() or (begins >= row_offsets[rows + 1]).any():
                raise ValueError("tokens of an image are in another row than its grid")
        except ValueError as error:
            raise UserError(
                f"images and tokens do not belong together ({error}): write the input table again."
            ) from error
        documents = offsets.searchsorted(begins, side="right") - 1
        return cls(documents.searchsorted(np.arange(len(offsets))), grids, lists.flatten())

    @classmethod
    def join(cls, several: Sequence["DocumentImages"]) -> "DocumentImages":
        """Documents end to end."""
        shifts = np.cumsum([0, *(len(one.grids) for one in several)])
        offsets = [one.offsets[:-1] + shift for one, shift in zip(several, shifts, strict=False)]
        return cls(
            np.append(np.concatenate(offsets), shifts[-1]),
            np.concatenate([one.grids for one in several]),
            pa.concat_arrays([one.files for one in several]),
        )

    def check_whole(self, spans: DocumentSpans, lengths: np.ndarray, ids: pa.StringArray, max_len: int) -> None:
        """Raise :class:`UserError` for a document with images, of those with these ``lengths``, that is cut."""
        cut = (spans.length < lengths[spans.document]) & (np.diff(self.offsets)[spans.document] > 0)
        if cut.any():
            document = int(spans.document[cut.argmax()])
            raise UserError(
                f"document {ids[document].as_py()} has images and {lengths[document]} tokens, which rows of at most "
                f"{max_len} would cut: give a larger max_len, or tokenize with it."
            )

    def columns(self, spans: DocumentSpans) -> dict[str, pa.Array]:
        """The columns of rows that are made of whole documents."""
        counts = np.diff(self.offsets)[spans.document]
        ends = np.append(0, np.cumsum(counts))
        order = np.repeat(self.offsets[spans.document] - ends[:-1], counts) + np.arange(ends[-1])
        row_offsets = np.append(0, ends[spans.row_ends])
        files = pa.ListArray.from_arrays(pa.array(row_offsets.astype(np.int32)), self.files.take(pa.array(order)))
        return {GRIDS: int_lists(self.grids[order].reshape(-1), 3 * row_offsets), IMAGES: files}
