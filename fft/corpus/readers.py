"""Read the records of a span of a file, in a worker, a few megabytes at a time."""

import bz2
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from fft.corpus.read_ahead import ReadAhead
from fft.corpus.splits import MOST_BYTES
from fft.corpus.urls import storage_of
from fft.data.asking import asking, of_storage
from fft.data.footer import check_names
from fft.data.storage import is_url
from fft.errors import StorageError, UserError

_BLOCK = 4 << 20
#: How many times its size on disk a row group may have in memory, where that is more than a process should hold.
_MOST_SWOLLEN, _SWOLLEN = 1000, 1 << 30
#: Between documents of a plain text: one blank line or more, with any line ends.
_BLANK_LINES = re.compile(rb"\n(?:[ \t]*\r?\n)+")
_BLANK_TO_THE_END = re.compile(rb"[ \t]*\r?\Z")
#: Any longer run of blank lines still has a separator in its last bytes.
_LONGEST_SEPARATOR = 4096
#: What some programs write at the beginning of a text; it is no part of it.
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


#: What zstd says of a file that was compressed with a larger window than it takes here (`zstd --long=28`, say).
_LARGE_WINDOW = "requires too much memory"


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Around the reading of a file. Raises :class:`UserError`, naming it, for whatever goes wrong there."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        kind = StorageError if of_storage(error) else UserError
        raise kind(f"{path} cannot be read ({reason}): {_remedy(path, error)}") from error


def _remedy(path: str, error: Exception) -> str:
    if is_url(path) and isinstance(error, OSError):
        return "it must stay there while the job runs, and all machines of the cluster must be permitted to read it."
    if isinstance(error, FileNotFoundError):
        return "it must lie under this path on all machines of the cluster, and stay there while the job runs."
    if isinstance(error, PermissionError):
        return "have its reading permitted to the user of the job, on all machines of the cluster."
    if _LARGE_WINDOW in str(error):
        return "its zstd window is larger than 128 MB: compress it again without --long or --ultra."
    return "is it whole? Restore or remove it."


def open_text(path: str, until: int = 0) -> io.BufferedIOBase:
    """The bytes of a plain or compressed text file, by a path or a URL; those from ``until`` on are read if need be."""
    suffix = PurePosixPath(path).suffix.lower()
    source = _open_url(path, until) if is_url(path) else path
    if suffix == ".gz":
        return gzip.open(source, "rb")
    if suffix == ".bz2":
        return bz2.BZ2File(source)
    if suffix == ".zst":
        return io.BufferedReader(pa.input_stream(source, compression="zstd"), _BLOCK)
    return open(source, "rb") if isinstance(source, str) else source


def _open_url(url: str, until: int) -> io.BufferedReader:
    storage = storage_of(url)
    file = asking(partial(storage.filesystem.open_input_file, storage.root))
    return io.BufferedReader(ReadAhead(file, until), _BLOCK)


def open_parquet(path: str) -> pq.ParquetFile:
    """A parquet file by a path or a URL. Of a store, a row group's columns are asked for at once."""
    if not is_url(path):
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    storage = storage_of(path)
    return asking(partial(pq.ParquetFile, storage.root, filesystem=storage.filesystem, pre_buffer=True))


def _unmarked(record: bytes, begin: int) -> bytes:
    """A record that begins at this byte of a file, without the byte order mark with which the file begins."""
    return record if begin else record.removeprefix(_BYTE_ORDER_MARK)


def read_lines(path: str, start: int, stop: int, most: int = MOST_BYTES) -> Iterator[bytes]:
    """Lines that begin in bytes [start, stop) of a file, without their ends; to the file's end if ``stop`` is 0.

    Raises :class:`UserError` for what cannot be read, and for a line of ``most`` bytes or without an end.
    """
    with naming(path), open_text(path, stop) as stream:
        at = start
        if start:
            stream.seek(start - 1)
            at += len(stream.readline(most)) - 1
        for line in iter(partial(stream.readline, most), b""):
            if stop and at >= stop:
                return
            begin, at = at, at + len(line)
            if len(line) == most:
                raise _too_long(path, begin, most)
            yield _unmarked(line, begin).rstrip(b"\r\n")


def read_documents(path: str, start: int, stop: int, most: int = MOST_BYTES) -> Iterator[bytes]:
    """Documents between blank lines that begin in bytes [start, stop) of a file; to its end if ``stop`` is 0.

    Raises :class:`UserError` for what cannot be read, and for a document of ``most`` bytes or without an end.
    """
    with naming(path), open_text(path, stop) as stream:
        at, buffer = start, b""
        if start:  # the separator before a document that begins at ``start`` lies before it
            at = max(0, start - _LONGEST_SEPARATOR)
            stream.seek(at)
        ended, begun = False, start == 0
        while not ended:
            block = stream.read(max(_BLOCK, len(buffer)))  # of a long one ever more, or it would be searched all over
            ended = not block
            buffer += block
            first = 0
            for found in _BLANK_LINES.finditer(buffer):
                if not ended and _BLANK_TO_THE_END.match(buffer, found.end()):
                    break  # it may go on in the next block
                if begun:
                    if stop and at + first >= stop:
                        return
                    yield _unmarked(buffer[first : found.start()], at + first)
                first = found.end()
                begun = begun or at + first >= start
            at, buffer = at + first, buffer[first:]
            if len(buffer) >= most:
                raise _too_long(path, at, most)
        buffer = _unmarked(buffer, at)
        if begun and buffer.strip() and not (stop and at >= stop):
            yield buffer


def _too_long(path: str, begin: int, most: int) -> UserError:
    return UserError(
        f"{path} has a document of {most:,} bytes or more, which begins at byte {begin:,} of its text: split it, leave "
        "the file out, or have spark_jobs/tokenize.py take it with a larger `max_document_bytes`."
    )


def read_row_groups(path: str, first: int, last: int, columns: list[str], rows: int = 256) -> Iterator[pa.RecordBatch]:
    """Rows of row groups [first, last) of a parquet file."""
    with naming(path), open_parquet(path) as file:
        for group in range(first, last):
            yield from file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


def footer_of(path: str) -> tuple[pa.Schema, list[int]]:
    """Columns of a parquet file, and the compressed bytes of its row groups.

    Raises :class:`UserError` when it cannot be read, two columns have one name, or a row group is made to fill memory.
    """
    with naming(path):
        if is_url(path):
            storage = storage_of(path)
            metadata = asking(partial(pq.read_metadata, storage.root, filesystem=storage.filesystem))
        else:
            metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    check_names(schema.names, path)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    sizes = [sum(g.column(c).total_compressed_size for c in range(g.num_columns)) for g in groups]
    for number, (group, size) in enumerate(zip(groups, sizes, strict=True), 1):
        if group.total_byte_size > max(_SWOLLEN, _MOST_SWOLLEN * size):
            raise UserError(
                f"{path}: row group {number} has {size:,} bytes and {group.total_byte_size:,} in memory, as no text "
                "has: leave the file out, or write it again with smaller row groups."
            )
    return schema, sizes


def schema_of(path: str) -> pa.Schema:
    """Columns of a parquet file. Raises :class:`UserError` when it cannot be read, or two of them have one name."""
    return footer_of(path)[0]


READERS: dict[str, Callable[[str, int, int, int], Iterator[bytes]]] = {"json": read_lines, "text": read_documents}
