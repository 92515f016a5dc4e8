"""Rows of answers: JSON lines that every reader takes, kept while they are written, a file at the end.

``.NAME.partial`` beside the output has a line a row, in the input's order, and ``.NAME.partial.json`` says of what:
model, input, settings. What is in there survives whatever ends the process; a run of the same goes on behind it. At the
end it becomes the output, by one rename.
"""

import base64
import contextlib
import datetime
import decimal
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fft.data.storage import is_url
from fft.errors import UserError
from fft.files import atomic_file, hidden, new_file, own_file, remove_file, sync, write_atomically
from fft.json_text import json_value
from fft.redaction import redact_all

#: Seconds between two times that what is written is brought to the disk.
_SYNC_EVERY = 5.0
#: Ends of names that an output may have; all but parquet are JSON lines.
PARQUET, SUFFIXES = ".parquet", (".jsonl", ".ndjson", ".json", ".txt", ".parquet")
#: Characters at which some readers end a line, and halves of characters, which UTF-8 has not.
_ESCAPED = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
#: Rows of parquet that are written at once.
_ROWS = 1024


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON: no number is NaN or infinite (they become null), bytes are base64, times ISO 8601,
    decimals texts; no character in it ends a line for anybody."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        text = json.dumps(_finite(row), ensure_ascii=False, default=lambda value: _finite(_plain(value)))
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode() + b"\n"


def _plain(value: object) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_output(name: str, overwrite: bool) -> Path:
    """The file of this name. Raises :class:`UserError` where what takes hours could not be written at its end."""
    path = Path(name)
    if is_url(name):
        raise UserError(f"`output` {name}: answers are written to a local or mounted folder: name one.")
    if path.is_dir():
        raise UserError(f"`output` {path} is a folder: name a file.")
    if path.suffix not in SUFFIXES:
        raise UserError(f"`output` {path}: answers are written as JSON lines (.jsonl) or .parquet: name such a file.")
    if path.exists() and not overwrite:
        raise UserError(f"`output` {path} exists: choose another file or add `overwrite=True`.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = hidden(path, f"{secrets.token_hex(8)}.probe")
        os.close(new_file(probe))
        remove_file(probe)
    except OSError as error:
        raise UserError(f"`output` {path} cannot be made ({error.strerror}): choose another place.") from error
    return path


class Partial:
    """The rows that are there, for the output ``path``; ``done`` tells how many a run before has left.

    ``is_parquet`` says that they are answers alone: what the input has beside is read again at the end. ``about`` is
    what they depend on, as JSON has it. With ``resume``, they are gone on with, else begun again. Raises
    :class:`UserError` where what is there is of something else, naming what.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], resume: bool) -> None:
        self.path, self._output, self.done = hidden(path, "partial"), path, 0
        self.is_parquet = path.suffix == PARQUET
        self._header = hidden(path, "partial.json")
        before, known = self._before() if resume else None, json.dumps(redact_all(about), indent=1)
        if before is not None:
            if found := list(_differences(before, json.loads(known))):
                raise UserError(
                    f"{self.path} has answers of an interrupted run of something else ({', '.join(found[:3])}): repeat "
                    'that run, or give `resume="no"` to begin again.'
                )
            self.done = _cut_torn(self.path)
        else:
            remove_file(self.path)
            write_atomically(self._header, known)
        self._file = own_file(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._synced = time.monotonic()

    def _before(self) -> Mapping[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            return dict(json_value(self._header.read_text(encoding="utf-8")))
        return None

    def add(self, row: Mapping[str, Any]) -> None:
        """Write the next row. Raises :class:`UserError` where there is no room."""
        line = json_line(row)
        try:
            while line:
                line = line[os.write(self._file, line) :]
            if time.monotonic() - self._synced > _SYNC_EVERY:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}): make room and run again.") from error

    def close(self) -> None:
        """Bring what is written to the disk."""
        if self._file >= 0:
            with contextlib.suppress(OSError):  # it has been told when it was written
                os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def become_lines(self) -> None:
        """Be the output."""
        self.close()
        os.replace(self.path, self._output)
        sync(self._output.parent)
        remove_file(self._header)

    def become_parquet(self, shown: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
        """Write the output as parquet, of these columns: each row is what ``shown`` has of it, and its answer here."""
        self.close()
        with atomic_file(self._output) as aside, open(self.path, "rb") as lines:
            rows = ({**one, **json_value(line)} for one, line in zip(shown, lines, strict=True))
            with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
                for batch in _batches(rows):
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        remove_file(self.path)
        remove_file(self._header)


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    waiting: list[dict[str, Any]] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == _ROWS:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _cut_torn(path: Path) -> int:
    """How many whole lines a file has; what a crash left behind the last of them is cut off."""
    count = end = 0
    if path.exists():
        with open(own_file(path, os.O_RDWR), "rb+") as stream:
            for line in stream:
                if not line.endswith(b"\n") or not line.startswith(b"{"):
                    break
                count, end = count + 1, end + len(line)
            stream.truncate(end)
    return count


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name in sorted({*before, *now}):
        a, b = before.get(name), now.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, f"{above}{name}.")
        elif a != b:
            yield f"{above}{name}: {a!r}, now {b!r}"
