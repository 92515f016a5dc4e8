"""What tasks count of token rows while they write them: documents by their length, trained tokens, images."""

from collections import Counter

import numpy as np
import pyarrow as pa

from fft.data.image_tallies import image_tally_names, tally_images
from fft.data.known import IGNORE
from fft.data.lengths import document_lengths, tally_lengths

#: The tally of tokens that a loss counts. Rows of tokens always have it, be it 0.
TRAINED = "trained"


def tally_rows(rows: pa.Table) -> Counter[str]:
    """The tallies of rows of a token table, whose lists hold no nulls."""
    lengths = document_lengths(rows)
    tallies = tally_lengths(lengths) + tally_images(rows)
    tallies[TRAINED] = count_trained(rows, lengths)
    return tallies


def row_tally_names(images: bool) -> list[str]:
    """All names of such tallies, of rows with ``images`` or without."""
    return [TRAINED, *tally_lengths(1 << np.arange(31)), *(image_tally_names() if images else ())]


def count_trained(rows: pa.Table, lengths: np.ndarray) -> int:
    """Tokens of rows with documents of these ``lengths`` that the loss counts: those with a label, all where rows have
    no labels, but never a document's first, which nothing predicts."""
    full = lengths > 0
    if "labels" not in rows.column_names:
        return int(lengths.sum()) - int(np.count_nonzero(full))
    trained = rows.column("labels").combine_chunks().flatten().to_numpy() != IGNORE
    first = (np.cumsum(lengths) - lengths)[full]
    return int(np.count_nonzero(trained)) - int(np.count_nonzero(trained[first]))
