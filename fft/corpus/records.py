"""Records of a split, a few megabytes at a time, and the first one of a file that holds no document."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fft.corpus.files import kind_of
from fft.corpus.readers import READERS, footer_of, read_row_groups, schema_of
from fft.corpus.splits import MOST_BYTES, Split
from fft.text.records import Malformed, RecordEncoder

_BATCH_RECORDS, _BATCH_BYTES = 4096, 8 << 20


def read_records(
    split: Split, record_encoder: RecordEncoder[Any], unused: Counter[str]
) -> Iterator[list[tuple[bytes | None, str | None]]]:
    """Records (a JSON line or a text as bytes; an id if it stands beside) of a split, a few megabytes at a time.

    The rows of parquet columns that are not read are counted in ``unused``.
    """
    if split.kind == "parquet":
        schema = schema_of(split.path)
        columns = record_encoder.columns(schema, split.path)
        for batch in read_row_groups(split.path, split.start, split.stop, columns):
            unused.update(dict.fromkeys(set(schema.names).difference(columns), batch.num_rows))
            rows = record_encoder.rows(batch)
            yield [(record, split.doc_id if doc_id is None else doc_id) for record, doc_id in rows]
        return
    waiting, size = [], 0
    for record in READERS[split.kind](split.path, split.start, split.stop, split.most):
        if split.kind == "json" and not record.strip():
            continue  # blank lines between records are none
        waiting.append((record, None))
        size += len(record)
        if len(waiting) == _BATCH_RECORDS or size >= _BATCH_BYTES:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def first_malformed(path: str, record_encoder: RecordEncoder[Any], most: int = MOST_BYTES) -> tuple[str, str] | None:
    """A file's first malformed record by line or row, and what is wrong with it; None where records have no number.

    Lines have fewer than ``most`` bytes.
    """
    kind = kind_of(Path(path))
    if kind is None or kind == "text":
        return None
    what = "row" if kind == "parquet" else "line"
    for number, (record, doc_id) in enumerate(_numbered(path, kind, record_encoder, most), 1):
        if kind == "json" and not (record or b"").strip():
            continue
        try:
            record_encoder.parse(kind, record, doc_id)
        except Malformed as error:
            return f"{path}, {what} {number}", str(error)
    return None


def _numbered(
    path: str, kind: str, record_encoder: RecordEncoder[Any], most: int
) -> Iterator[tuple[bytes | None, str | None]]:
    if kind == "json":
        yield from ((line, None) for line in READERS["json"](path, 0, 0, most))
        return
    schema, sizes = footer_of(path)
    for batch in read_row_groups(path, 0, len(sizes), record_encoder.columns(schema, path)):
        yield from record_encoder.rows(batch)
