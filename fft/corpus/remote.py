"""Inputs by URL: which files an engine is to read, found by pyarrow, so that no table is read loosely."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from pyarrow import fs

from fft.corpus.files import kind_of, look_through
from fft.data.delta import read_snapshot, split_name
from fft.data.known import LeftOut
from fft.data.lakes import check_not_inside
from fft.data.storage import Listing, Storage, reaching
from fft.errors import UserError

#: Schemes of Hadoop for stores that pyarrow knows under another.
SCHEMES = {"s3a": "s3", "s3n": "s3"}
#: Seconds for a store that would be asked for a quarter of an hour.
_PATIENCE = 10
_WILD = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class Remote:
    """What an engine is to read: ``urls`` of a kind ("parquet", "json" or "text"), or of a "table" the name alone.

    ``unseen`` is true where nothing but the engine can look, so that loose files may be those of a Delta table.
    """

    name: str
    kind: str
    urls: Sequence[str]
    unseen: bool = False


def find_remote(name: str, id_key: str, left_out: LeftOut) -> list[Remote]:
    """What there is to read behind a URL, which may have wild cards, or end in the version of a Delta table.

    Delta tables, there or anywhere below, are read by their log. What is not read is counted. Raises
    :class:`UserError` for Iceberg, Hudi, a folder without documents, a Delta table by whose partition ids are told, and
    where nothing answers for a table of which one version is asked.
    """
    name = name.rstrip("/")
    url, version = split_name(name)
    if version is not None:
        return [_delta(url, version, id_key, left_out)]
    try:
        places = _expand(url)
        found = [place for place in places for place in _look_at(place, id_key, left_out)]
    except _Unknown:
        # A file system that only the engine knows, or has the credentials for.
        return [Remote(name, kind_of(PurePosixPath(url)) or "parquet", (name,), unseen=True)]
    merged: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in found:
        merged[name if one.name in places else one.name, one.kind] += one.urls
    if not merged:
        raise UserError(f"`inputs` {name} holds no documents that are read here.")
    return [Remote(of, kind, urls) for (of, kind), urls in merged.items()]


class _Unknown(Exception):
    """Nothing answers here for a URL."""


def _storage(url: str) -> Storage:
    scheme, _, rest = url.partition("://")
    patience = f"?retry_limit_seconds={_PATIENCE}" if scheme in ("gs", "gcs") else ""
    try:
        found = Storage.at(f"{SCHEMES.get(scheme, scheme)}://{rest}{patience}")
        with reaching(url):
            found.filesystem.get_file_info(found.root)
    except UserError as error:
        raise _Unknown from error
    return Storage(url, found.root, found.filesystem)


def _look_at(url: str, id_key: str, left_out: LeftOut) -> Iterator[Remote]:
    storage = _storage(url)
    check_not_inside(storage)
    listing = storage.list()
    if "" in listing.sizes:
        yield Remote(url, kind_of(PurePosixPath(url)) or "parquet", (url,))
    elif "_delta_log" in listing.folders:
        yield _delta(url, None, id_key, left_out, listing)
    else:
        found = look_through(storage, listing, left_out)
        for table in found.tables:
            yield _delta(storage.shown(table), None, id_key, left_out)
        for kind, names in found.files.items():
            # A folder of nothing else is the engine's, which knows its partitions.
            alone = kind == "parquet" and len(found.files) == 1 and not found.tables
            yield Remote(url, kind, (url,) if alone else [storage.shown(name) for name in names])


def _delta(url: str, version: int | None, id_key: str, left_out: LeftOut, listing: Listing | None = None) -> Remote:
    try:
        table = _storage(url)
    except _Unknown as error:
        raise UserError(f"`inputs` {url}: its versions cannot be read here: {error.__cause__}") from error
    snapshot = read_snapshot(table, version, listing)
    for partition in snapshot.partitions.values():
        if id_key in partition:
            raise UserError(
                f"`inputs` {url} is partitioned by {id_key}, which its files lack: give a DataFrame of it, or another "
                "`id_key`."
            )
        for column in partition:
            left_out.add(f"partition column {column}")
    return Remote(f"{url}@v{snapshot.version}", "parquet", [table.shown(name) for name in snapshot.names])


def _expand(url: str) -> list[str]:
    """A URL with wild cards, as Spark takes them, as the URLs of what is there."""
    if not _WILD.search(url):
        return [url]
    scheme, _, rest = url.partition("://")
    found: list[str] = []
    for pattern in _alternatives(rest):
        parts = pattern.split("/")
        fixed = next((i for i, part in enumerate(parts) if _WILD.search(part)), len(parts))
        places = ["/".join(parts[:fixed])]
        for part in parts[fixed:]:
            places = [f"{place}/{name}" for place in places for name in _names_in(f"{scheme}://{place}", part)]
        found += places
    return [f"{scheme}://{place}" for place in dict.fromkeys(found)]


def _alternatives(pattern: str) -> list[str]:
    """``part-{1,2}`` as ``part-1`` and ``part-2``."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [one for middle in braces[1].split(",") for one in _alternatives(f"{before}{middle}{after}")]


def _names_in(url: str, pattern: str) -> list[str]:
    storage = _storage(url)
    with reaching(url):
        entries = storage.filesystem.get_file_info(fs.FileSelector(storage.root, allow_not_found=True))
    names = [entry.base_name for entry in entries]
    return sorted(name for name in names if fnmatchcase(name, pattern) and not name.startswith(("_", ".")))
