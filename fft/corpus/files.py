"""Raw inputs: which files there are, of which kind, what of them is left out, and how they are cut into parts."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import fs

from fft.corpus.readers import footer_of
from fft.corpus.splits import Span, chunk_size, cut_text
from fft.corpus.urls import Unreached, expand_url
from fft.data.delta import read_snapshot, split_name
from fft.data.footer import Each, each_of
from fft.data.iceberg import read_iceberg, reads_iceberg
from fft.data.known import COMPRESSIONS, KINDS, LeftOut, file_class, partition_of
from fft.data.lakes import EngineOnly, check_not_inside, lake_tables, refuse_others
from fft.data.listing import Listing
from fft.data.manifest import in_order, is_hidden
from fft.data.storage import SCHEMES, Storage, check_names_utf8, is_url, printable, reaching, whole
from fft.errors import UserError
from fft.text.records import RecordEncoder

#: Bytes of text in a byte of its compressed form, roughly: to deal files to parts.
_EXPANSION = 4
#: What is said of a path at which there is neither a file nor a folder.
_NOTHING = {
    fs.FileType.NotFound: "does not exist: give a file or a folder of JSON lines, parquet or text.",
    fs.FileType.Unknown: "is no file that can be read from any place: give a file or a folder.",
}
#: Classes of files that are left out are told one by one up to so many, the rarest together.
_CLASSES = 20


@dataclass(frozen=True)
class SourceFile:
    """A file as tasks open it, by an absolute path or a URL; its bytes; and the id of all its documents, if the
    partition in which it lies says one."""

    path: str
    size: int
    doc_id: str | None = None


@dataclass(frozen=True)
class Source:
    """Files of one kind under one input, which is called ``name``; ``folder`` is where they lie, or the file itself."""

    name: str
    kind: str
    files: tuple[SourceFile, ...]
    folder: str

    @classmethod
    def of_file(cls, path: Path, kind: str) -> "Source":
        """A local file. Raises :class:`OSError` where there is none."""
        return cls(str(path), kind, (SourceFile(str(path.absolute()), path.stat().st_size),), str(path.absolute()))

    @property
    def bytes(self) -> int:
        """Size where they lie."""
        return sum(file.size for file in self.files)

    @property
    def origin(self) -> dict[str, Any]:
        """What a table that is made of it says of it: which files, by their names and sizes, in a fingerprint."""
        facts = [(os.path.relpath(file.path, self.folder), file.size) for file in self.files]
        fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        sizes = {"files": len(facts), "bytes": self.bytes}
        return {"input": self.name, "kind": self.kind, **sizes, "fingerprint": fingerprint}


@dataclass(frozen=True)
class Found:
    """What lies in a folder, by names relative to it: files of each kind, and the tables with a log, each with what it
    is."""

    files: Mapping[str, Sequence[str]]
    tables: Mapping[str, str]


def kind_of(path: Path | PurePosixPath) -> str | None:
    """Kind by suffix, with a compression's suffix taken off; None when unknown."""
    stem, suffix = os.path.splitext(path.name.lower())
    if suffix in COMPRESSIONS:
        kind = KINDS.get(os.path.splitext(stem)[1])
        return kind if kind != "parquet" else None  # it is compressed inside
    return KINDS.get(suffix)


def look_through(listing: Listing, left_out: LeftOut) -> Found:
    """What of a folder is read; the rest is counted.

    Passed over without being counted are hidden names that would be no documents anyway, and what a table holds.
    """
    lakes = lake_tables(listing)
    files: dict[str, list[str]] = defaultdict(list)
    others: dict[str, list[int]] = defaultdict(list)
    named = _named_by_links(listing)
    for name in sorted({*listing.sizes, *listing.dead, *listing.repeated}, key=in_order):
        path, size = PurePosixPath(name), listing.sizes.get(name, 0)
        if any(str(above) in lakes or (str(above) == "." and "" in lakes) for above in path.parents):
            continue
        kind = kind_of(path)
        if is_hidden(path):
            if kind is not None:
                left_out.add("files of hidden names (_ or .)", size)
        elif name in listing.dead:
            left_out.add("links to nothing, and what is no file", 0)
        elif name in named:
            continue
        elif name in listing.repeated and name not in named.values():
            left_out.add("links to what is read under another name", 0)
        elif kind is None:
            others[file_class(path)].append(size)
        else:
            files[kind].append(name)
    ranked = sorted(others, key=lambda what: (-len(others[what]), what))
    for rank, what in enumerate(ranked):
        for size in others[what]:
            left_out.add(what if rank < _CLASSES else "other files", size)
    return Found(files, lakes)


def _named_by_links(listing: Listing) -> dict[str, str]:
    """Files whose own names do not say what they are, as those of a cache, and a link to each that does."""
    named: dict[str, str] = {}
    for link, other in sorted(listing.repeated.items()):
        name = PurePosixPath(link)
        if other in listing.sizes and kind_of(name) and not kind_of(PurePosixPath(other)) and not is_hidden(name):
            named.setdefault(other, link)
    return named


def find_sources(
    inputs: Sequence[str | Path],
    id_key: str = "id",
    left_out: LeftOut | None = None,
    for_engine: list[EngineOnly] | None = None,
) -> list[Source]:
    """List the files of the inputs, paths or URLs, these also with wild cards; what is not read is counted in
    ``left_out``.

    A Delta table is read by its log, also one that lies below a folder. Where files are in folders by ``id_key``
    (``id=7/``), as Spark partitions tables, that is the id of their documents. What only an engine can read is added to
    ``for_engine``; without it, :class:`EngineOnly` is raised. Raises :class:`UserError` for what is missing, empty, of
    no known kind or given twice, and for names that are no UTF-8.
    """
    check_names_utf8(map(str, inputs), "`inputs`: ")
    finder = _Finder(id_key, LeftOut() if left_out is None else left_out, for_engine)
    sources = [source for given in inputs for source in finder.sources_at(given)]
    for source in sources:
        check_names_utf8((file.path for file in source.files), "`inputs`: ")
    if len(inputs) > 1:
        _check_once(sources)
    return sources


@dataclass(frozen=True)
class _Finder:
    id_key: str
    left_out: LeftOut
    for_engine: list[EngineOnly] | None

    def sources_at(self, given: str | Path) -> Iterator[Source]:
        """Tables first, then files by their kinds."""
        name, version = split_name(str(given).rstrip("/") or "/")
        try:
            name = whole(name) if is_url(name) else name
            folder, places = expand_url(name) if is_url(name) else _local(name)
        except Unreached as error:
            format_ = "" if version is None else "Delta"
            unread = EngineOnly(name, format_, version, f"cannot be reached from here ({error})", "`inputs` ")
            self._leave(unread, error)
            return
        if version is not None:
            yield from self._tables(Storage(name, folder.root, folder.filesystem), "Delta", version)
            return
        found: dict[str, list[SourceFile]] = defaultdict(list)
        seen = 0
        checked: set[str] = set()
        for place, info in places:
            if info.type in _NOTHING:
                raise UserError(f"`inputs` {name} {_NOTHING[info.type]}")
            if os.path.dirname(place.root) not in checked:
                check_not_inside(place)
                checked.add(os.path.dirname(place.root))
            if info.type == fs.FileType.Directory:
                there = place.list()
                inside = look_through(there, self.left_out)
                for table, kind in inside.tables.items():
                    seen += 1
                    yield from self._tables(place.below(table), kind, None, None if table else there)
                for kind, names in inside.files.items():
                    found[kind] += [self._file(folder, place.below(one), kind, there.sizes[one]) for one in names]
            elif (kind := kind_of(PurePosixPath(place.root))) is not None:
                found[kind].append(self._file(folder, place, kind, info.size))
            elif place is folder:
                raise UserError(f"`inputs` {name} is of no known kind: its name must end in {_known()}.")
            else:
                self.left_out.add(file_class(PurePosixPath(place.root)), info.size)
        if not found and not seen:
            raise UserError(f"`inputs` {name} holds no documents: no file there ends in {_known()}.")
        for kind, files in found.items():
            yield Source(name, kind, tuple(files), folder.location)

    def _file(self, folder: Storage, file: Storage, kind: str, size: int) -> SourceFile:
        own = None
        if kind == "parquet":
            partition = partition_of(file.root.removeprefix(folder.root))
            own = partition.pop(self.id_key, None)
            self._count_partitions(partition)
        return SourceFile(file.location, size, own)

    def _tables(
        self, table: Storage, kind: str, version: int | None, listing: Listing | None = None
    ) -> Iterator[Source]:
        try:
            if kind == "Iceberg" and reads_iceberg():
                snapshot = read_iceberg(table, listing or table.list())
            else:
                refuse_others(table.name, kind, "`inputs` ")
                snapshot = read_snapshot(table, version, listing)
        except EngineOnly as error:
            self._leave(error)
            return
        files = []
        for name in snapshot.names:
            partition = dict(snapshot.partitions.get(name, {}))
            own = partition.pop(self.id_key, None)
            self._count_partitions(partition)
            files.append(SourceFile(table.below(name).location, snapshot.sizes[name], own))
        name = f"{table.name}@{'v' if kind == 'Delta' else ''}{snapshot.version}"
        yield Source(name, "parquet", tuple(files), table.location)

    def _leave(self, unread: EngineOnly, cause: Exception | None = None) -> None:
        if self.for_engine is None:
            raise unread from cause
        self.for_engine.append(unread)

    def _count_partitions(self, partition: Iterable[str]) -> None:
        for column in partition:
            self.left_out.add(f"partition column {printable(column)}")


def _local(name: str) -> tuple[Storage, list[tuple[Storage, fs.FileInfo]]]:
    """A path, as a URL is expanded."""
    storage = Storage.at(name)
    with reaching(name):
        return storage, [(storage, storage.info())]


def _check_once(sources: Sequence[Source]) -> None:
    seen: dict[str, Source] = {}
    for source in sources:
        for file in source.files:
            other = seen.setdefault(_one_name(file.path), source)
            if other is not source:
                raise UserError(
                    f"`inputs` gives {file.path} twice, by {other.name} and by {source.name}: give it once."
                )


def _one_name(path: str) -> str:
    """The same of all names of a file."""
    scheme, _, rest = path.partition("://")
    return f"{SCHEMES.get(scheme, scheme)}://{rest}" if is_url(path) else os.path.realpath(path)


def _known() -> str:
    return f"{', '.join(KINDS)} (and {', '.join(COMPRESSIONS)} of the text kinds)"


def spans_of(sources: Sequence[Source], record_encoder: RecordEncoder[Any], each: Each = each_of) -> list[Span]:
    """The inputs cut into spans that can be read on their own; ``each`` reads the footers of parquet files.

    Raises :class:`UserError` for unreadable parquet, and for columns that are missing or of another type.
    """
    weight = 1 + record_encoder.bytes_beside
    chunk = -(-chunk_size(weight * sum(source.bytes for source in sources)) // weight)
    spans = []
    for source in sources:
        footers = iter(each(footer_of, [file.path for file in source.files if source.kind == "parquet"]))
        for file in source.files:
            if source.kind == "parquet":
                schema, sizes = next(footers)
                record_encoder.columns(schema, file.path)
                groups = [(i, weight * size) for i, size in enumerate(sizes)]
                spans += [Span(source.name, "parquet", file.path, i, i + 1, s, file.doc_id) for i, s in groups]
            elif file.path.lower().endswith(COMPRESSIONS):
                spans.append(Span(source.name, source.kind, file.path, 0, 0, weight * file.size * _EXPANSION))
            else:
                cuts = cut_text(source.name, source.kind, file.path, file.size, chunk)
                spans += [replace(span, size=weight * span.size) for span in cuts]
    return spans
