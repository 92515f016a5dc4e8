"""Which files of a folder are a table that is no Delta table."""

import posixpath
import re
from pathlib import PurePosixPath

from fft.data.listing import Listing
from fft.data.manifest import (
    MANIFEST_NAME,
    UNFINISHED,
    WRITING_NAME,
    Manifest,
    in_order,
    is_hidden,
    manifest_of,
    replacing,
)
from fft.data.storage import Storage
from fft.errors import UserError

#: What a task in a store has written, and nobody named: a try that failed, or ended when its job was over.
_TRY = re.compile(r"part-\d{5,}-[0-9a-f]{8}-[0-9a-f]{12}\.parquet")
#: What says of a folder that it is a table by itself.
_MARKS = (MANIFEST_NAME, WRITING_NAME, "_delta_log")


def parquet_files(storage: Storage, listing: Listing) -> tuple[list[str], Manifest | None]:
    """The files of a table in name order, and its manifest if it has one.

    Folders may be named like files: Spark users write ``corpus.parquet``. With a manifest, its files are the table.
    Others are passed over where they belong to a table of their own, to a task that failed in a store, or to a job that
    is replacing this one (or was interrupted, which its mark tells); else they are refused by name, and so are an
    unfinished table, and folders whose subfolders are tables of ours. Raises :class:`UserError`.
    """
    if "" in listing.sizes:
        return [""], None
    content, mark = (storage.read(name) if name in listing.sizes else None for name in (MANIFEST_NAME, WRITING_NAME))
    ending = replacing(mark)
    there = listing.sizes.keys() | listing.folders
    manifest = manifest_of(storage.name, content, mark, UNFINISHED & there, storage.read)
    found = [name for name in listing.sizes if name.endswith(".parquet") and not is_hidden(PurePosixPath(name))]
    names = sorted(found, key=in_order)
    folders = sorted({posixpath.dirname(name) for name in names} - {""}, key=in_order)
    tables = [folder for folder in folders if any(f"{folder}/{name}" in there for name in _MARKS)]
    if manifest is not None:
        known = {info.path for info in manifest.files}
        strays = [
            name
            for name in names
            if name not in known and posixpath.dirname(name) not in tables and not _TRY.fullmatch(name)
        ]
        if strays and mark is None:
            file = storage.shown(strays[0])
            raise UserError(f"{file} is not in the manifest of {storage.name}: remove it or write the table again.")
        return sorted(known, key=in_order), manifest
    if ending is not None:
        return [n for n in names if not n.endswith(ending) and posixpath.dirname(n) not in tables], None
    if tables:
        raise UserError(f"{storage.name} is a folder of tables ({', '.join(tables)}), not one table: name one of them.")
    return names, None


def untagged(name: str) -> str:
    """A file's name without the ids of the job, and of the try, that wrote it."""
    return re.sub(r"(part-\d{5,})(-[0-9a-f]{8})?-[0-9a-f]{12}\.parquet$", r"\1.parquet", name)


def check_against_manifest(storage: Storage, listing: Listing, manifest: Manifest) -> None:
    """Raise :class:`UserError` where a file of the manifest is missing, or has another size."""
    for info in manifest.files:
        size, file = listing.sizes.get(info.path), storage.shown(info.path)
        if size is None:
            raise UserError(f"{file} is in the table's manifest but is missing: restore it or write the table again.")
        if size != info.bytes:
            raise UserError(
                f"{file} has {size} bytes, its manifest says {info.bytes}: the table was changed after "
                "it was written; write it again."
            )
