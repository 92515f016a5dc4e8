"""Parts: what one task does. Workers read their splits of files and write parquet files themselves.

Spark decides where work runs and moves rows between workers; it neither parses the input nor writes the output. So a
table has the same bytes on every engine, and lists of ids never become rows of the JVM one number at a time.

A part is a numbered output file. Batches carry its number in a column ``part``, and a task gets all of a part.
"""

import contextlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fft.data.image_tallies import tally_images
from fft.data.known import GRIDS, IMAGES
from fft.data.lengths import document_lengths, tally_lengths
from fft.data.manifest import FileInfo
from fft.data.worker_notes import WRITING, WorkerNotes
from fft.errors import UserError
from fft.files import sync

#: A row group is what a reader decodes at once: this many rows, or fewer when they are long (4 MB of ids).
ROW_GROUP_ROWS, ROW_GROUP_TOKENS = 1024, 1 << 20
#: The same of the bytes of images: about a hundred.
ROW_GROUP_IMAGE_BYTES = 16 << 20
#: Decodes a quarter faster than zstd, for a fifth more bytes.
COMPRESSION = "snappy"

#: Folder, inside a table's, of records set aside.
QUARANTINE = "_quarantine"


@dataclass(frozen=True)
class PartFolder:
    """Where workers write the parts of one table: an absolute path, and notes to the driver, which all of a job's
    tables share.

    While they are written, files have hidden names with the ``tag`` of the notes, which is the job's, and one of the
    try: no two jobs and no two tries write the same file. Finished parts are ``part-NNNNN{suffix}.parquet``: without a
    suffix in a folder that holds no other table, so that the same table has the same names everywhere; else with the
    job's tag, since the older table stays until the new one is whole.

    With ``kept``, a folder in this one, finished files wait there under their hidden names; the same work finds them
    when its job was interrupted, see ``spark_jobs.token_table.kept``.
    """

    folder: Path
    notes: WorkerNotes
    suffix: str = ""
    kept: str = ""

    @property
    def tag(self) -> str:
        """See the class."""
        return self.notes.tag

    @property
    def parts(self) -> Path:
        """Where parts lie until they are published."""
        return self.folder / self.kept

    @property
    def rejects(self) -> Path:
        """The same of records set aside."""
        return self.folder / (self.kept or QUARANTINE)

    def unfinished(self) -> Iterator[Path]:
        """What this job has under hidden names: parts that are not published, and what failed tries and notes left."""
        for where in (self.folder, self.folder / QUARANTINE):
            yield from where.glob(f".part-*{self.tag}.*{WRITING}")


@dataclass(frozen=True)
class Part:
    """A finished file, first under a temporary ``name``, and sums over its rows; ``rejects`` likewise, if any."""

    part: int
    name: str
    rows: int
    tokens: int
    bytes: int
    tallies: dict[str, int]
    rejects: str = ""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raise what a file system cannot do as a :class:`UserError` that names the folder."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} cannot be written to ({error}): `output` must lie under this path on all machines of the "
            "cluster, and stay there while the job runs."
        ) from error
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error}): make room there, or have it permitted, and run the job again."
        ) from error


class PartFile:
    """A parquet file that appears in the ``target`` under a hidden temporary name; see :func:`name_parts`.

    Row groups are filled up to :data:`ROW_GROUP_ROWS` rows, :data:`ROW_GROUP_TOKENS` tokens or, of images,
    :data:`ROW_GROUP_IMAGE_BYTES` whatever the batches are.
    The rows are token rows; other kinds say in a class of their own what their tokens are, and what is counted of them.
    """

    def __init__(self, target: PartFolder, part: int) -> None:
        self.part, self.name = part, hidden_name(target, part)
        self._path, self._meter = target.parts / self.name, target.notes.meter("written")
        self._sink: pq.ParquetWriter | None = None
        self._waiting: list[pa.RecordBatch] = []
        self._finished = False
        self._rows = self._tokens = self._waiting_rows = self._waiting_tokens = self._waiting_bytes = 0
        self._counts: Counter[str] = Counter()

    def tokens_of(self, batch: pa.RecordBatch) -> np.ndarray:
        """Tokens of each row."""
        return batch.column("input_ids").value_lengths().to_numpy(zero_copy_only=False)

    def tally(self, rows: pa.Table) -> Counter[str]:
        """What is counted of a row group, see :mod:`fft.data.lengths` and :mod:`fft.data.image_tallies`."""
        return tally_lengths(document_lengths(rows)) + tally_images(rows)

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        lengths, first = self.tokens_of(batch), 0
        self._meter.add(batch.num_rows, int(lengths.sum()))
        sizes = _image_bytes(batch) if {IMAGES, GRIDS} <= {*batch.schema.names} else None
        while first < batch.num_rows:
            window = slice(first, first + ROW_GROUP_ROWS - self._waiting_rows)
            ends = lengths[window].cumsum() + self._waiting_tokens
            fitting = int((ends <= ROW_GROUP_TOKENS).sum())
            held = None if sizes is None else sizes[window].cumsum() + self._waiting_bytes
            if held is not None:
                fitting = min(fitting, int((held <= ROW_GROUP_IMAGE_BYTES).sum()))
            if not fitting and not self._waiting:
                fitting = 1  # one row longer than a row group is one by itself
            if fitting:
                self._waiting.append(batch.slice(first, fitting))
                self._waiting_rows += fitting
                self._waiting_tokens = int(ends[fitting - 1])
                self._waiting_bytes = 0 if held is None else int(held[fitting - 1])
            first += fitting
            if first < batch.num_rows or self._waiting_rows == ROW_GROUP_ROWS:
                self._flush()

    def finish(self, tallies: Mapping[str, int], rejects: str = "") -> Part:
        """Close the file; without rows there is none. ``rejects`` names the part's :class:`RejectFile`, if any.

        What :meth:`tally` has counted is added to the tallies.
        """
        self._flush()
        self._meter.add(parts=1)
        if self._sink is None:
            return Part(self.part, "", 0, 0, 0, dict(tallies), rejects)
        with writing_to(self._path.parent):
            self._sink.close()
            sync(self._path)
            size = self._path.stat().st_size
        self._finished = True
        return Part(self.part, self.name, self._rows, self._tokens, size, {**tallies, **self._counts}, rejects)

    def __enter__(self) -> "PartFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._sink is not None and not self._finished:  # the task fails
            with contextlib.suppress(OSError, pa.ArrowException):  # of a full disk, which it has said already
                self._sink.close()
            self._path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._waiting:
            return
        table = pa.Table.from_batches(self._waiting).combine_chunks()  # so bytes do not depend on how rows came
        self._counts += self.tally(table)
        with writing_to(self._path.parent):
            if self._sink is None:
                # Without Arrow's own schema: engines name the items of lists differently.
                self._sink = pq.ParquetWriter(self._path, table.schema, compression=COMPRESSION, store_schema=False)
            self._sink.write_table(table, row_group_size=table.num_rows)
        self._rows, self._tokens = self._rows + self._waiting_rows, self._tokens + self._waiting_tokens
        self._waiting, self._waiting_rows, self._waiting_tokens, self._waiting_bytes = [], 0, 0, 0


def _image_bytes(batch: pa.RecordBatch) -> np.ndarray:
    """Bytes of each row's images, int64."""
    images = batch.column(IMAGES)
    ends = np.append(0, np.cumsum(pc.binary_length(images.flatten()).to_numpy(), dtype=np.int64))
    bounds = np.append(0, np.cumsum(images.value_lengths().to_numpy()))
    return np.diff(ends[bounds])


class RejectFile:
    """JSON lines of what could not be used, {file, reason, record}, in :data:`QUARANTINE` under a hidden name."""

    def __init__(self, target: PartFolder, part: int) -> None:
        self._path = target.rejects / hidden_name(target, part)

    def add(self, file: str, reason: str, record: bytes | None) -> None:
        """Set one record aside."""
        text = None if record is None else record.decode("utf-8", "backslashreplace")
        with writing_to(self._path.parent):
            self._path.parent.mkdir(exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as stream:  # rejects are few: open it for each
                stream.write(json.dumps({"file": file, "reason": reason, "record": text}, ensure_ascii=False) + "\n")

    def finish(self) -> str:
        """The file's name, once it is on the disk; "" when there is none."""
        if not self._path.exists():
            return ""
        with writing_to(self._path.parent):
            sync(self._path)
        return self._path.name

    def __enter__(self) -> "RejectFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # the task fails
            self._path.unlink(missing_ok=True)


def hidden_name(target: PartFolder, part: int) -> str:
    """A name for a file of a part that no other try has."""
    return f".part-{part:05d}{target.tag}.{uuid.uuid4().hex}{WRITING}"


def name_parts(target: PartFolder, parts: Sequence[Part]) -> tuple[list[Part], dict[Path, Path]]:
    """All parts in order under their final names, those without rows too; and which files have to be renamed to what.

    Raises :class:`UserError` when a file cannot be seen from here as its task has left it.
    """
    named, renames = [], {}
    for part in sorted(parts, key=lambda p: p.part):
        name, rejects = f"part-{part.part:05d}{target.suffix}.parquet", f"part-{part.part:05d}{target.suffix}.json"
        if part.name:
            _check_seen(target.parts / part.name, part.bytes)
            renames[target.parts / part.name] = target.folder / name
        if part.rejects:
            _check_seen(target.rejects / part.rejects)
            renames[target.rejects / part.rejects] = target.folder / QUARANTINE / rejects
        named.append(replace(part, name=name if part.name else "", rejects=rejects if part.rejects else ""))
    return named, renames


def _check_seen(file: Path, size: int | None = None) -> None:
    try:
        found = file.stat().st_size
    except FileNotFoundError:
        found = None
    if found is None or size not in (None, found):
        what = "is not there" if found is None else f"has {found} bytes, not {size},"
        raise UserError(
            f"{file}, which a worker wrote, {what} for the driver: "
            "`output` must lie on storage that all machines of the cluster mount alike."
        )


def publish_files(target: PartFolder, renames: Mapping[Path, Path]) -> None:
    """Give files their final names, for good once this returns; and drop what failed tries left."""
    for folder in {final.parent for final in renames.values()}:
        folder.mkdir(exist_ok=True)
    for source, final in renames.items():
        os.replace(source, final)
    for leftover in target.unfinished():
        leftover.unlink(missing_ok=True)
    quarantine = target.folder / QUARANTINE
    with contextlib.suppress(OSError):
        quarantine.rmdir()  # if nothing is set aside
    for folder in (quarantine, target.folder):
        if folder.exists():
            sync(folder)


def publish_parts(target: PartFolder, parts: Sequence[Part]) -> list[Part]:
    """:func:`name_parts` and :func:`publish_files`: the parts under their final names. Raises as the former."""
    named, renames = name_parts(target, parts)
    publish_files(target, renames)
    return named


def dataset_tallies(name: str, rows: int, tokens: int) -> dict[str, int]:
    """Tallies of what a part has of a dataset."""
    return {f"rows of {name}": rows, f"tokens of {name}": tokens}


def by_dataset(names: Sequence[str], tallies: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Rows and tokens of each dataset, from tallies."""
    return {n: {"rows": tallies.get(f"rows of {n}", 0), "tokens": tallies.get(f"tokens of {n}", 0)} for n in names}


def files_of(parts: Sequence[Part]) -> tuple[FileInfo, ...]:
    """Manifest entries of the parts that have rows."""
    return tuple(FileInfo(p.name, p.rows, p.tokens, p.bytes) for p in parts if p.name)


def sum_tallies(parts: Sequence[Part]) -> Counter[str]:
    """Tallies of all parts together."""
    sums: Counter[str] = Counter()
    for part in parts:
        sums.update(part.tallies)
    return sums
