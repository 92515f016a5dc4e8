"""Records of prompts, wherever they lie: JSON lines, parquet, text (one prompt a line), compressed or not; in folders,
Delta tables and object stores, by wild cards. What is read, left out and refused is that of the jobs' inputs."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fft.corpus.files import find_sources
from fft.corpus.readers import naming, open_parquet, read_lines, schema_of
from fft.data.known import LeftOut
from fft.data.lakes import EngineOnly
from fft.data.manifest import in_order
from fft.data.storage import is_url
from fft.errors import UserError
from fft.text.records import Malformed, decode_record, load_json

#: Rows of a parquet file that are read at once.
_ROWS = 256


@dataclass(frozen=True)
class InputFile:
    """One file: its path or URL, and its kind ("json", "text" or "parquet")."""

    name: str
    kind: str

    def schema(self) -> pa.Schema:
        """Columns of a parquet file. Raises :class:`UserError` when it cannot be read, or two of them have one name."""
        return schema_of(self.name)


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
        paths = [name]
        if not is_url(name) and not Path(name).exists() and glob.has_magic(name):
            paths = sorted(glob.glob(name, recursive=True), key=in_order)
            if not paths:
                raise UserError(f"`inputs` {name}: there is no file of such a name.")
        unread: list[EngineOnly] = []
        for source in find_sources(paths, "", left_out, unread):
            found += [InputFile(file.path, source.kind) for file in source.files]
        for one in unread:
            if one.format:
                raise one
            raise UserError(f"`inputs` {name} cannot be reached from here: copy it to a folder or an object store.")
    return found


def read_rows(files: Sequence[InputFile]) -> Iterator[PromptRecord]:
    """All records, file by file; blank lines are none. Raises :class:`UserError` for a file that cannot be read.

    Rows of parquet files are objects of Python values, maps as objects, texts of text files strings.
    """
    for file in files:
        yield from _parquet_rows(file) if file.kind == "parquet" else _line_rows(file)


def _line_rows(file: InputFile) -> Iterator[PromptRecord]:
    for number, line in enumerate(read_lines(file.name, 0, 0), 1):
        if not line.strip():
            continue
        where, value = f"{file.name}, line {number}", None
        try:
            text = decode_record(line)
            value = text if file.kind == "text" else load_json(text)
        except Malformed as error:
            value = error
        yield PromptRecord(where, value, line)


def _parquet_rows(file: InputFile) -> Iterator[PromptRecord]:
    number = 0
    with naming(file.name), open_parquet(file.name) as opened:
        for batch in opened.iter_batches(_ROWS, use_threads=False):
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
