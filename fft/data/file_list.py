"""The files of a table in its manifest: one by one, or, of many, as a parquet file beside it.

A manifest of a million files as JSON takes a driver, and each rank of a trainer, a quarter of a minute and gigabytes.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

#: So many files are named in the manifest itself.
INLINE = 10_000
#: How the name of the file beside it begins; a hash of what it holds follows, so that no two manifests share one.
LIST_PREFIX = "_fft_files-"


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One parquet file; ``path`` is relative to the table, sizes in rows, tokens and bytes."""

    path: str
    rows: int
    tokens: int
    bytes: int


def pack_list(files: Sequence[FileInfo]) -> tuple[str, bytes]:
    """Name and content of a parquet file of columns as :class:`FileInfo` has fields, in the same order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, integers = FileInfo.__slots__, pa.int64()
    columns = [pa.array([file.path for file in files], pa.string())]
    columns += [pa.array([getattr(file, name) for file in files], integers) for name in names[1:]]
    stream = BytesIO()
    pq.write_table(pa.table(columns, list(names)), stream, compression="zstd", store_schema=False)
    content = stream.getvalue()
    return f"{LIST_PREFIX}{hashlib.sha256(content).hexdigest()[:16]}.parquet", content


def is_list_name(name: object) -> bool:
    """Whether it is one that :func:`pack_list` gives, and thus of a file beside the manifest."""
    return isinstance(name, str) and re.fullmatch(rf"{re.escape(LIST_PREFIX)}[0-9a-f]{{16}}\.parquet", name) is not None


def unpack_list(content: bytes) -> tuple[FileInfo, ...]:
    """Inverse of :func:`pack_list`. Raises :class:`ValueError` for what it has not made."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(content))
        return tuple(map(FileInfo, *(table.column(name).to_pylist() for name in FileInfo.__slots__)))
    except (pa.ArrowException, KeyError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"no list of files: {error}") from error
