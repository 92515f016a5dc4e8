"""Parts: what one task does. Workers read their splits of files and write parquet files themselves.

Spark decides where work runs and moves rows between workers; it neither parses the input nor writes the output. So a
table has the same bytes on every engine, and lists of ids never become rows of the JVM one number at a time.

A part is a numbered output file. Batches carry its number in a column ``part``, and a task gets all of a part.
"""

import contextlib
import json
import posixpath
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fft.data.asking import NewFile
from fft.data.known import GRIDS, IMAGES
from fft.data.manifest import FileInfo
from fft.data.row_tallies import tally_rows
from fft.data.storage import Storage, is_url
from fft.data.worker_notes import WRITING, WorkerNotes
from fft.errors import StorageError, UserError, one_line
from fft.files import sync, utf8

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
    """Where workers write the parts of one table: an absolute path or a URL, and notes to the driver, which all of a
    job's tables share.

    On a disk, files have hidden names while they are written, with the ``tag`` of the notes, which is the job's, and
    one of the try: no two jobs and no two tries write the same file. Finished parts are ``part-NNNNN{suffix}.parquet``:
    without a suffix in a folder that holds no other table, so that the same table has the same names everywhere; else
    with the job's tag, since the older table stays until the new one is whole.

    Where files cannot be renamed, in a store or one that is mounted, parts are ``direct``: files have their final names
    from the beginning, ``part-NNNNN-TRY{suffix}.parquet``. Which of them are the table, its manifest says.

    With ``kept``, a folder in this one, finished parts outlive their job: files under hidden names wait there, and the
    same work finds them when its job was interrupted, see ``spark_jobs.token_table.kept``.
    """

    folder: Path | str
    notes: WorkerNotes
    suffix: str = ""
    kept: str = ""
    direct: bool = False

    @property
    def storage(self) -> Storage:
        """The folder, as this machine reaches it."""
        return Storage.at(self.folder)

    @property
    def tag(self) -> str:
        """See the class."""
        return self.notes.tag

    @property
    def waits(self) -> str:
        """Where parts lie until they are published, relative to the folder."""
        return "" if self.direct else self.kept

    @property
    def parts(self) -> Path:
        """The same on a disk."""
        return Path(self.folder) / self.waits

    def new_name(self, part: int, ending: str) -> str:
        """A name for a file of a part that no other try has."""
        if self.direct:
            return f"part-{part:05d}-{uuid.uuid4().hex[:8]}{self.suffix}{ending}"
        return f".part-{part:05d}{self.tag}.{uuid.uuid4().hex}{WRITING}"

    def own(self) -> list[str]:
        """Files that carry this job's tag: on a disk those under hidden names, which are not published, and what failed
        tries and notes left; else all."""
        pattern = f"part-*{self.tag}.*" if self.direct else f".part-*{self.tag}.*{WRITING}"
        storage = self.storage
        aside = [posixpath.join(QUARANTINE, name) for name in storage.below(QUARANTINE).here()]
        return [name for name in (*storage.here(), *aside) if fnmatchcase(posixpath.basename(name), pattern)]


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
def writing_to(folder: Path | str) -> Iterator[None]:
    """Raise what a file system cannot do as a :class:`StorageError` that names the folder."""
    try:
        yield
    except OSError as error:
        remedy = "make room there, or have it permitted, and run the job again."
        if isinstance(error, FileNotFoundError) and not is_url(folder):
            remedy = (
                "`output` must lie under this path on all machines of the cluster, and stay there while the job runs."
            )
        raise StorageError(f"{folder} cannot be written to ({one_line(error)}): {remedy}") from error


class PartFile:
    """A parquet file that appears in the ``target`` under a name that nobody reads yet; see :func:`name_parts`.

    Row groups are filled up to :data:`ROW_GROUP_ROWS` rows, :data:`ROW_GROUP_TOKENS` tokens or, of images,
    :data:`ROW_GROUP_IMAGE_BYTES` whatever the batches are.
    The rows are token rows; other kinds say in a class of their own what their tokens are, and what is counted of them.
    """

    def __init__(self, target: PartFolder, part: int) -> None:
        self.part, self.name = part, target.new_name(part, ".parquet")
        self._target = target
        self._file: NewFile | None = None
        self._sink: pq.ParquetWriter | None = None
        self._waiting: list[pa.RecordBatch] = []
        self._finished = False
        self._rows = self._tokens = self._waiting_rows = self._waiting_tokens = self._waiting_bytes = 0
        self._counts: Counter[str] = Counter()

    def tokens_of(self, batch: pa.RecordBatch) -> np.ndarray:
        """Tokens of each row."""
        return batch.column("input_ids").value_lengths().to_numpy(zero_copy_only=False)

    def tally(self, rows: pa.Table) -> Counter[str]:
        """What is counted of a row group."""
        return tally_rows(rows)

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        lengths, first = self.tokens_of(batch), 0
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
        if self._sink is None or self._file is None:
            return Part(self.part, "", 0, 0, 0, dict(tallies), rejects)
        with writing_to(self._target.folder):
            self._sink.close()
            size = self._file.close()
        self._finished = True
        return Part(self.part, self.name, self._rows, self._tokens, size, {**tallies, **self._counts}, rejects)

    def __enter__(self) -> "PartFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and not self._finished:  # the task fails
            if self._sink is not None:
                with contextlib.suppress(OSError, pa.ArrowException):  # of a full disk, which it has said already
                    self._sink.close()
            self._file.discard()

    def _flush(self) -> None:
        if not self._waiting:
            return
        table = pa.Table.from_batches(self._waiting).combine_chunks()  # so bytes do not depend on how rows came
        self._counts.update(self.tally(table))
        with writing_to(self._target.folder):
            if self._file is None:
                self._file = self._target.storage.create(posixpath.join(self._target.waits, self.name))
            if self._sink is None:
                # Without Arrow's own schema: engines name the items of lists differently.
                options = {"compression": COMPRESSION, "store_schema": False}
                self._sink = pq.ParquetWriter(self._file.stream, table.schema, **options)
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
    """JSON lines of what could not be used, {file, reason, record}, in :data:`QUARANTINE`, named as parts are."""

    def __init__(self, target: PartFolder, part: int) -> None:
        self._target, self._name = target, target.new_name(part, ".json")
        self._file: NewFile | None = None

    def add(self, file: str, reason: str, record: bytes | None) -> None:
        """Set one record aside."""
        text = None if record is None else record.decode("utf-8", "backslashreplace")
        with writing_to(self._target.folder):
            if self._file is None:
                place = self._target.storage.below(self._target.waits or QUARANTINE)
                place.make()
                self._file = place.create(self._name)
            line = json.dumps({"file": file, "reason": reason, "record": text}, ensure_ascii=False) + "\n"
            self._file.stream.write(utf8(line))

    def finish(self) -> str:
        """The file's name, once it is there for good; "" when there is none."""
        if self._file is None:
            return ""
        with writing_to(self._target.folder):
            self._file.close()
        return self._name

    def __enter__(self) -> "RejectFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._file is not None:  # the task fails
            self._file.discard()


def name_parts(target: PartFolder, parts: Sequence[Part]) -> tuple[list[Part], dict[str, str]]:
    """All parts in order under their final names, those without rows too; and which files have to be renamed to what.

    Raises :class:`UserError` when a file cannot be seen from here as its task has left it.
    """
    ordered = sorted(parts, key=lambda p: p.part)
    aside = target.waits or QUARANTINE
    sizes, rejected = (target.storage.below(name).here() for name in (target.waits, aside))
    for part in ordered:
        if part.name:
            _check_seen(target.storage.shown(posixpath.join(target.waits, part.name)), sizes.get(part.name), part.bytes)
        if part.rejects:
            _check_seen(target.storage.shown(f"{aside}/{part.rejects}"), rejected.get(part.rejects))
    if target.direct:
        return ordered, {}
    named, renames = [], {}
    for part in ordered:
        name, rejects = f"part-{part.part:05d}{target.suffix}.parquet", f"part-{part.part:05d}{target.suffix}.json"
        if part.name:
            renames[posixpath.join(target.waits, part.name)] = name
        if part.rejects:
            renames[f"{aside}/{part.rejects}"] = f"{QUARANTINE}/{rejects}"
        named.append(replace(part, name=name if part.name else "", rejects=rejects if part.rejects else ""))
    return named, renames


def _check_seen(file: str, found: int | None, size: int | None = None) -> None:
    if found is None or size not in (None, found):
        what = "is not there" if found is None else f"has {found} bytes, not {size},"
        raise UserError(
            f"{file}, which a worker wrote, {what} for the driver: `output` must lie on storage that all machines of "
            "the cluster mount alike, or be a URL that all can write to (s3://bucket/table)."
        )


def publish_files(target: PartFolder, renames: Mapping[str, str], parts: Sequence[Part]) -> None:
    """Give files their final names, for good once this returns; and drop what failed tries left beside ``parts``."""
    storage, own = target.storage, {*own_files(parts)}
    for folder in {posixpath.dirname(final) for final in renames.values()}:
        storage.below(folder).make()
    for source, final in renames.items():
        storage.move(source, final)
    storage.delete([name for name in target.own() if name not in own])
    quarantine = storage.below(QUARANTINE)
    if not any(part.rejects for part in parts):
        quarantine.delete_empty()
    if renames and storage.is_local:
        for folder in (Path(quarantine.root), Path(storage.root)):
            if folder.exists():
                sync(folder)


def own_files(parts: Sequence[Part]) -> set[str]:
    """The names of all files of parts, those of what is set aside, too, relative to the table."""
    return {name for p in parts for name in (p.name, p.rejects and f"{QUARANTINE}/{p.rejects}") if name}


def publish_parts(target: PartFolder, parts: Sequence[Part]) -> list[Part]:
    """:func:`name_parts` and :func:`publish_files`: the parts under their final names. Raises as the former."""
    named, renames = name_parts(target, parts)
    publish_files(target, renames, named)
    return named


def files_of(parts: Sequence[Part]) -> tuple[FileInfo, ...]:
    """Manifest entries of the parts that have rows."""
    return tuple(FileInfo(p.name, p.rows, p.tokens, p.bytes) for p in parts if p.name)


def sum_tallies(parts: Sequence[Part]) -> Counter[str]:
    """Tallies of all parts together."""
    sums: Counter[str] = Counter()
    for part in parts:
        sums.update(part.tallies)
    return sums
