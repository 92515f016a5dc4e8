"""Raw inputs: which files there are, of which kind, what of them is left out, and how they are cut into parts."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from fft.corpus.readers import row_group_sizes, schema_of
from fft.corpus.splits import Span, chunk_size, cut_text
from fft.data.delta import is_delta, read_snapshot, split_version
from fft.data.known import COMPRESSIONS, KINDS, LeftOut, file_class, partition_of
from fft.data.lakes import check_not_inside, lake_tables, refuse_others
from fft.data.manifest import in_order, is_hidden
from fft.data.storage import Listing, Storage, check_names_utf8, printable
from fft.errors import UserError
from fft.text.records import RecordEncoder

#: Bytes of text in a byte of its compressed form, roughly: to deal files to parts.
_EXPANSION = 4
#: Classes of files that are left out are told one by one up to so many, the rarest together.
_CLASSES = 20


@dataclass(frozen=True)
class Source:
    """Files of one kind under one input path; ``ids`` are those of all documents of a file, from its partition."""

    path: Path
    kind: str
    files: tuple[Path, ...]
    ids: Mapping[Path, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def origin(self) -> dict[str, Any]:
        """What a table that is made of it says of it: which files, by their names and sizes, in a fingerprint."""
        folder = split_version(self.path)[0].absolute()
        facts = [(os.path.relpath(file.absolute(), folder), file.stat().st_size) for file in self.files]
        fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        sizes = {"files": len(facts), "bytes": sum(size for _, size in facts)}
        return {"input": str(self.path), "kind": self.kind, **sizes, "fingerprint": fingerprint}


@dataclass(frozen=True)
class Found:
    """What lies in a folder, by names relative to it: files of each kind, and Delta tables."""

    files: Mapping[str, Sequence[str]]
    tables: Sequence[str]


def kind_of(path: Path | PurePosixPath) -> str | None:
    """Kind by suffix, with a compression's suffix taken off; None when unknown."""
    stem, suffix = os.path.splitext(path.name.lower())
    if suffix in COMPRESSIONS:
        kind = KINDS.get(os.path.splitext(stem)[1])
        return kind if kind != "parquet" else None  # it is compressed inside
    return KINDS.get(suffix)


def look_through(storage: Storage, listing: Listing, left_out: LeftOut) -> Found:
    """What of a folder is read; the rest is counted. Raises :class:`UserError` for tables of Iceberg or Hudi in it.

    Passed over without being counted are hidden names that would be no documents anyway, and what a Delta table holds.
    """
    lakes = lake_tables(listing)
    for table, kind in lakes.items():
        refuse_others(storage.shown(table), kind, "`inputs` ")
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
    return Found(files, list(lakes))


def _named_by_links(listing: Listing) -> dict[str, str]:
    """Files whose own names do not say what they are, as those of a cache, and a link to each that does."""
    named: dict[str, str] = {}
    for link, other in sorted(listing.repeated.items()):
        name = PurePosixPath(link)
        if other in listing.sizes and kind_of(name) and not kind_of(PurePosixPath(other)) and not is_hidden(name):
            named.setdefault(other, link)
    return named


def find_sources(inputs: Sequence[Path], id_key: str = "id", left_out: LeftOut | None = None) -> list[Source]:
    """List the files of the inputs; what lies there and is not read is counted in ``left_out``.

    A Delta table is read by its log, also one that lies below a folder. Where files are in folders by ``id_key``
    (``id=7/``), as Spark partitions tables, that is the id of their documents. Raises :class:`UserError` for what is
    missing, empty, of no known kind or given twice, for names that are no UTF-8, and for tables of Iceberg or Hudi.
    """
    left_out = LeftOut() if left_out is None else left_out
    sources = [source for path in inputs for source in _sources_at(path, id_key, left_out)]
    for source in sources:
        check_names_utf8(map(str, source.files), "`inputs`: ")
    if len(inputs) > 1:
        _check_once(sources)
    return sources


def _sources_at(path: Path, id_key: str, left_out: LeftOut) -> Iterator[Source]:
    folder, version = split_version(path)
    if version is not None or is_delta(folder):
        yield _delta_source(Storage.at(folder), version, id_key, left_out)
        return
    if not path.exists():
        raise UserError(f"`inputs` {path} does not exist: give a file or a folder of JSON lines, parquet or text.")
    storage = Storage.at(path)
    check_not_inside(storage)
    if not path.is_dir():
        kind = kind_of(path)
        if kind is None:
            raise UserError(f"`inputs` {path} is of no known kind: its name must end in {_known()}.")
        if not path.is_file():
            raise UserError(f"`inputs` {path} is no file that can be read from any place: give a file or a folder.")
        yield Source(path, kind, (path,))
        return
    found = look_through(storage, storage.list(), left_out)
    for table in found.tables:
        yield _delta_source(Storage.at(path / table), None, id_key, left_out)
    for kind, names in found.files.items():
        ids = {}
        for name in names:
            partition = partition_of(name)
            own = partition.pop(id_key, None) if kind == "parquet" else None
            if own is not None:
                ids[path / name] = own
            _count_partitions(partition, left_out)
        yield Source(path, kind, tuple(path / name for name in names), ids)
    if not found.files and not found.tables:
        raise UserError(f"`inputs` {path} holds no documents: no file there ends in {_known()}.")


def _delta_source(table: Storage, version: int | None, id_key: str, left_out: LeftOut) -> Source:
    snapshot = read_snapshot(table, version)
    files, ids = {name: Path(table.path(name)) for name in snapshot.names}, {}
    for name, file in files.items():
        partition = dict(snapshot.partitions.get(name, {}))
        own = partition.pop(id_key, None)
        if own is not None:
            ids[file] = own
        _count_partitions(partition, left_out)
    return Source(Path(f"{table.name}@v{snapshot.version}"), "parquet", tuple(files.values()), ids)


def _count_partitions(partition: Iterable[str], left_out: LeftOut) -> None:
    for column in partition:
        left_out.add(f"partition column {printable(column)}")


def _check_once(sources: Sequence[Source]) -> None:
    seen: dict[str, Source] = {}
    for source in sources:
        for file in source.files:
            other = seen.setdefault(os.path.realpath(file), source)
            if other is not source:
                raise UserError(f"`inputs` gives {file} twice, by {other.path} and by {source.path}: give it once.")


def _known() -> str:
    return f"{', '.join(KINDS)} (and {', '.join(COMPRESSIONS)} of the text kinds)"


def spans_of(sources: Sequence[Source], record_encoder: RecordEncoder[Any]) -> list[Span]:
    """The inputs cut into spans that can be read on their own.

    Raises :class:`UserError` for unreadable parquet, and for columns that are missing or of another type.
    """
    weight = 1 + record_encoder.bytes_beside
    chunk = -(-chunk_size(weight * sum(source.bytes for source in sources)) // weight)
    spans = []
    for source in sources:
        name = str(source.path)
        for file in source.files:
            path, size = str(file.absolute()), file.stat().st_size
            if source.kind == "parquet":
                record_encoder.columns(schema_of(path), path)
                doc_id = source.ids.get(file)
                sizes = enumerate(row_group_sizes(path))
                spans += [Span(name, "parquet", path, i, i + 1, weight * s, doc_id) for i, s in sizes]
            elif file.suffix.lower() in COMPRESSIONS:
                spans.append(Span(name, source.kind, path, 0, 0, weight * size * _EXPANSION))
            else:
                cuts = cut_text(name, source.kind, path, size, chunk)
                spans += [replace(span, size=weight * span.size) for span in cuts]
    return spans
