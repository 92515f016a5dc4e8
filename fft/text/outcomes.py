"""What became of each record of a batch: token rows, and a row without tokens for each that is empty or malformed.

Every output row says its ``outcome``, and which ``piece`` of its document it is: so one pass both writes and counts.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from fft.data.arrow_lists import INTS
from fft.text.encoder import Encoder

DOCUMENT, EMPTY, MALFORMED = 0, 1, 2


def with_outcomes(
    lists: Mapping[str, pa.ListArray],
    names: pa.StringArray,
    piece: np.ndarray,
    empty: int,
    malformed: int,
    encoder: Encoder,
    checked: int,
    **counts: np.ndarray,
) -> pa.RecordBatch:
    """Token rows (columns ``lists``, one document name and piece number each), then those without tokens.

    ``counts`` are further int columns, 0 where there are no tokens.
    """
    rows, rest = len(names), empty + malformed
    nothing = pa.nulls(rest)
    columns = {name: pa.concat_arrays([values, nothing.cast(INTS)]) for name, values in lists.items()}
    columns["doc_ids"] = pa.concat_arrays(
        [
            pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32)), names),
            nothing.cast(pa.list_(pa.string())),
        ]
    )
    columns["outcome"] = _int32([DOCUMENT] * rows + [EMPTY] * empty + [MALFORMED] * malformed)
    columns["piece"] = _int32(np.append(piece, np.zeros(rest)))
    columns["engine"] = _int32(np.full(rows + rest, encoder.engine or 0))
    columns["checked"] = _int32([checked] * (rows + rest > 0) + [0] * (rows + rest - 1))
    columns |= {name: _int32(np.append(values, np.zeros(rest))) for name, values in counts.items()}
    return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))


def _int32(values: Sequence[int] | np.ndarray) -> pa.Array:
    return pa.array(np.asarray(values, dtype=np.int32))
