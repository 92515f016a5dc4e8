"""What tasks count of token rows while they write them: documents by their length, trained tokens, datasets, images."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from fft.data.document_ids import as_many
from fft.data.image_tallies import image_tally_names, tally_images
from fft.data.known import DATASET, IGNORE
from fft.data.lengths import document_lengths, documents_by_row, tally_lengths

#: The tally of tokens that a loss counts. Rows of tokens always have it, be it 0.
TRAINED = "trained"
_ROWS, _TOKENS = "rows of ", "tokens of "


def tally_rows(rows: pa.Table) -> Counter[str]:
    """The tallies of rows of a token table, whose lists hold no nulls."""
    lengths = document_lengths(rows)
    tallies = tally_lengths(lengths) + tally_images(rows)
    tallies[TRAINED] = count_trained(rows, lengths)
    if DATASET in rows.column_names:
        tallies.update(_tally_datasets(rows, lengths))
    return tallies


def row_tally_names(images: bool, datasets: Sequence[str] = ()) -> list[str]:
    """All names of such tallies, of rows with ``images`` or without, of these ``datasets``."""
    own = [name for dataset in datasets for name in dataset_tallies(dataset, 0, 0)]
    return [TRAINED, *tally_lengths(1 << np.arange(31)), *(image_tally_names() if images else ()), *own]


def dataset_tallies(name: str, rows: int, tokens: int) -> dict[str, int]:
    """Tallies of what a part has of a dataset: rows with some of it, and its tokens."""
    return {f"{_ROWS}{name}": rows, f"{_TOKENS}{name}": tokens}


def by_dataset(names: Sequence[str], tallies: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Rows and tokens of each dataset, from tallies."""
    return {n: {"rows": tallies.get(f"{_ROWS}{n}", 0), "tokens": tallies.get(f"{_TOKENS}{n}", 0)} for n in names}


def datasets_of(tallies: Mapping[str, int]) -> list[str]:
    """The names of the datasets of which some rows were counted, in order."""
    return sorted(name.removeprefix(_ROWS) for name, count in tallies.items() if name.startswith(_ROWS) and count)


def _tally_datasets(rows: pa.Table, lengths: np.ndarray) -> Counter[str]:
    lists = rows.column(DATASET).combine_chunks()
    documents = documents_by_row(rows)
    found = as_many(lists, documents, pa.array([""] * len(lists), pa.string())).flatten().dictionary_encode()
    names, codes = found.dictionary.to_pylist(), found.indices.to_numpy()
    tokens = np.bincount(codes, lengths, len(names)).astype(np.int64).tolist()
    held = np.unique(np.repeat(np.arange(len(lists)), documents) * len(names) + codes) % max(1, len(names))
    counts = np.bincount(held, minlength=len(names)).tolist()
    tallies: Counter[str] = Counter()
    for name, own_rows, own_tokens in zip(names, counts, tokens, strict=True):
        tallies.update(dataset_tallies(name, own_rows, own_tokens))
    return tallies


def count_trained(rows: pa.Table, lengths: np.ndarray) -> int:
    """Tokens of rows with documents of these ``lengths`` that the loss counts: those with a label, all where rows have
    no labels, but never a document's first, which nothing predicts."""
    full = lengths > 0
    if "labels" not in rows.column_names:
        return int(lengths.sum()) - int(np.count_nonzero(full))
    trained = rows.column("labels").combine_chunks().flatten().to_numpy() != IGNORE
    first = (np.cumsum(lengths) - lengths)[full]
    return int(np.count_nonzero(trained)) - int(np.count_nonzero(trained[first]))
