"""Records of prompts, wherever they lie: JSON lines, parquet, text (one prompt a line), compressed or not; in folders,
Delta tables and object stores, by wild cards. What is read, left out and refused is that of the jobs' inputs."""

import glob
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fft.corpus.files import find_sources, kind_of
from fft.corpus.readers import naming, read_lines
from fft.corpus.remote import SCHEMES, find_remote
from fft.data.footer import check_names
from fft.data.known import LeftOut
from fft.data.manifest import in_order, is_hidden
from fft.data.storage import Storage, is_url, reaching
from fft.errors import UserError
from fft.text.records import Malformed, decode_record, load_json

#: Rows of a parquet file that are read at once.
_ROWS = 256


@dataclass(frozen=True)
class InputFile:
    """One file: what to call it, its kind ("json", "text" or "parquet"), and where it lies."""

    name: str
    kind: str
    storage: Storage

    def schema(self) -> pa.Schema:
        """Columns of a parquet file. Raises :class:`UserError` when it cannot be read, or two of them have one name."""
        with naming(self.name), self.storage.filesystem.open_input_file(self.storage.root) as stream:
            schema = pq.read_schema(stream)
        check_names(schema.names, self.name)
        return schema


@dataclass(frozen=True)
class PromptRecord:
    """A record: where it stands, its value (an object, a list, a text) or why it has none, and its bytes, by which one
    is told from another."""

    where: str
    value: Any
    raw: bytes


def find_inputs(inputs: Sequence[str], left_out: LeftOut) -> list[InputFile]:
    """The files of paths, folders, wild cards, Delta tables (``path@v12``) and URLs; what is not read is counted.

    Raises :class:`UserError` for what is missing, empty, of no known kind or out of reach.
    """
    found: list[InputFile] = []
    for name in inputs:
        if is_url(name):
            found += _remote_files(name, left_out)
            continue
        paths = [Path(name)]
        if not paths[0].exists() and glob.has_magic(name):
            paths = [Path(path) for path in sorted(glob.glob(name, recursive=True), key=in_order)]
            if not paths:
                raise UserError(f"`inputs` {name}: there is no file of such a name.")
        for source in find_sources(paths, "", left_out):
            found += [InputFile(str(file), source.kind, Storage.at(file.absolute())) for file in source.files]
    return found


def _remote_files(name: str, left_out: LeftOut) -> Iterator[InputFile]:
    for remote in find_remote(name, "", left_out):
        if remote.unseen:
            raise UserError(f"`inputs` {name} cannot be reached from here: copy it to a folder or an object store.")
        for url in remote.urls:
            scheme, _, rest = url.partition("://")
            storage = Storage.at(f"{SCHEMES.get(scheme, scheme)}://{rest}")
            sizes = storage.list().sizes
            for below in sorted(sizes, key=in_order):
                path = PurePosixPath(below)
                if not below or (kind_of(path) == remote.kind and not is_hidden(path)):
                    yield InputFile(
                        f"{url}/{below}" if below else url,
                        remote.kind,
                        Storage(url, storage.path(below), storage.filesystem),
                    )


def read_rows(files: Sequence[InputFile]) -> Iterator[PromptRecord]:
    """All records, file by file; blank lines are none. Raises :class:`UserError` for a file that cannot be read.

    Rows of parquet files are objects of Python values, maps as objects, texts of text files strings.
    """
    for file in files:
        yield from _parquet_rows(file) if file.kind == "parquet" else _line_rows(file)


def _line_rows(file: InputFile) -> Iterator[PromptRecord]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        where, value = f"{file.name}, line {number}", None
        try:
            text = decode_record(line)
            value = text if file.kind == "text" else load_json(text)
        except Malformed as error:
            value = error
        yield PromptRecord(where, value, line)


def _lines(file: InputFile) -> Iterator[bytes]:
    storage = file.storage
    if not is_url(storage.name):
        yield from read_lines(storage.root, 0, 0)
        return
    with reaching(file.name), naming(file.name), storage.filesystem.open_input_stream(storage.root) as stream:
        for number, line in enumerate(io.BufferedReader(stream)):
            yield (line if number else line.removeprefix(b"\xef\xbb\xbf")).rstrip(b"\r\n")


def _parquet_rows(file: InputFile) -> Iterator[PromptRecord]:
    number = 0
    with naming(file.name), file.storage.filesystem.open_input_file(file.storage.root) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(_ROWS, use_threads=False):
            for value in _values(batch):
                number += 1
                yield PromptRecord(f"{file.name}, row {number}", value, repr(value).encode(errors="surrogatepass"))


def _values(batch: pa.RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist(maps_as_pydicts="strict")
    except (UnicodeDecodeError, KeyError, ValueError):  # one row at a time, to find which one
        return [_value(batch.slice(row, 1)) for row in range(batch.num_rows)]


def _value(row: pa.RecordBatch) -> Any:
    try:
        return row.to_pylist(maps_as_pydicts="strict")[0]
    except UnicodeDecodeError as error:
        return Malformed(f"not valid UTF-8 at byte {error.start} of a text")
    except (KeyError, ValueError) as error:
        return Malformed(f"a value that Python has not: {error}")
