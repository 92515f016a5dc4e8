"""Iceberg tables of parquet files: the files of the newest snapshot, through ``pyiceberg`` where that is installed.

Read without a catalog, the newest metadata file is the table; where names do not tell which that is, and where files
alone do not say the rows (deletes, columns that were renamed), an engine has to read it.
"""

import importlib.util
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from fft.data.delta import Snapshot
from fft.data.known import ICEBERG
from fft.data.lakes import EngineOnly
from fft.data.listing import Listing
from fft.data.manifest import in_order
from fft.data.storage import SCHEMES, Storage
from fft.errors import StorageError, one_line

if TYPE_CHECKING:
    from pyiceberg.table.metadata import TableMetadata

#: The number of a metadata file, in both ways of naming them: ``v3.metadata.json``, ``00003-<uuid>.metadata.json``.
_NUMBER = re.compile(r"v?(\d+)(?:-[^/]*)?(?:\.gz)?" + re.escape(ICEBERG[1]))


def reads_iceberg() -> bool:
    """Whether :func:`read_iceberg` can be asked."""
    return importlib.util.find_spec("pyiceberg") is not None


def read_iceberg(table: Storage, listing: Listing) -> Snapshot:
    """The files of the newest snapshot, by the ``listing`` of what lies there; its version is the snapshot's id.

    Raises :class:`EngineOnly` where they are not all that decides the rows, or which is the newest cannot be told, and
    :class:`UserError` where the table cannot be read.
    """
    newest = _newest(table, listing)
    with _reading(table.shown(newest)):
        from pyiceberg.table import StaticTable

        opened = StaticTable.from_metadata(table.below(newest).location)
        tasks = list(opened.scan().plan_files())
    if (why := _beside_files(table, opened.metadata)) is not None:
        raise EngineOnly(table.name, "Iceberg", None, why)
    root = opened.metadata.location.rstrip("/")
    sizes: dict[str, int] = {}
    for task in tasks:
        path = task.file.file_path
        if task.delete_files:
            raise EngineOnly(table.name, "Iceberg", None, "has deleted rows, which are not read here")
        if not path.endswith(".parquet") or not path.startswith(f"{root}/"):
            raise EngineOnly(table.name, "Iceberg", None, f"has {path}, which is no parquet file in its folder")
        sizes[path.removeprefix(f"{root}/")] = task.file.file_size_in_bytes
    return Snapshot(
        opened.metadata.current_snapshot_id or 0, tuple(sorted(sizes, key=in_order)), None, partitions={}, sizes=sizes
    )


def _newest(table: Storage, listing: Listing) -> str:
    """The name of the newest metadata file."""
    names = [PurePosixPath(name) for name in listing.sizes]
    numbered = {
        str(name): int(found[1])
        for name in names
        if str(name.parent) == ICEBERG[0] and (found := _NUMBER.fullmatch(name.name))
    }
    newest = [name for name, number in numbered.items() if number == max(numbered.values())]
    if len(newest) != 1:
        why = f"has {len(newest)} newest metadata files, of which only its catalog knows the right one"
        raise EngineOnly(table.name, "Iceberg", None, why)
    return newest[0]


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # pydantic's, pyarrow's, and whatever Avro makes of bytes that are none
        raise StorageError(f"{name} cannot be read ({one_line(error)}): is the Iceberg table whole?") from error


def _beside_files(table: Storage, metadata: "TableMetadata") -> str | None:
    """What decides the rows beside the files, if anything does."""
    if _same_name(metadata.location) != _same_name(table.location):
        return f"was moved or copied here from {metadata.location}"
    named = {(field.field_id, field.name) for schema in metadata.schemas for field in schema.fields}
    for what in (_repeated(number for number, _ in named), _repeated(name for _, name in named)):
        if what is not None:
            return "had a column renamed, or dropped and made anew"
    return None


def _repeated(values: Iterable[object]) -> object | None:
    seen: set[object] = set()
    return next((value for value in values if value in seen or seen.add(value)), None)


def _same_name(place: str) -> str:
    """One of the names of a place."""
    scheme, _, rest = place.removeprefix("file://").rstrip("/").partition("://")
    return f"{SCHEMES.get(scheme, scheme)}://{rest}"
