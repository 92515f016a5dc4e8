"""Begin and finish a table: its mark, then its manifest, which is the commit. See :mod:`fft.data.manifest`."""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from fft.data.manifest import MANIFEST_NAME, REPLACING, WRITING_NAME, Manifest
from fft.data.storage import Storage
from fft.files import atomic_file, sync, write_file
from fft.redaction import redact_all

Place = str | os.PathLike[str] | Storage


def begin_writing(table: Place, lineage: dict) -> None:
    """Mark the folder, which is made, as being written; a manifest that was there no longer holds and is removed."""
    storage = Storage.at(table)
    storage.make()
    storage.write(WRITING_NAME, json.dumps(redact_all(lineage), indent=1, sort_keys=True))
    storage.delete([MANIFEST_NAME])


def begin_replacing(table: Place, lineage: dict, ending: str) -> None:
    """Mark the folder, whose table stays until :func:`commit_all`. ``ending`` is that of the names of the new files."""
    Storage.at(table).write(
        WRITING_NAME, json.dumps({**redact_all(lineage), REPLACING: ending}, indent=1, sort_keys=True)
    )


def commit(table: Place, manifest: Manifest) -> None:
    """Publish the table: the manifest appears whole or not at all, then the writing mark goes."""
    commit_all([(table, manifest)])
    Storage.at(table).delete([WRITING_NAME])


def commit_all(tables: Sequence[tuple[Place, Manifest]]) -> None:
    """Publish tables whose files are there: each manifest appears whole or not at all, in the place of an older one.

    On a disk all are there before the first appears, so that a full one stops them all. Marks stay. Raises
    :class:`OSError`.
    """
    places = [(Storage.at(table), manifest) for table, manifest in tables]
    for table, manifest in places:
        write_list(table, manifest)
    with ExitStack() as staged:
        for table, manifest in places:
            if table.is_local:
                aside = staged.enter_context(atomic_file(Path(table.path(MANIFEST_NAME))))
                write_file(aside, manifest.own_json())
                sync(aside)
    for table, manifest in places:
        if not table.is_local:
            table.write(MANIFEST_NAME, manifest.own_json())


def write_list(table: Storage, manifest: Manifest) -> None:
    """Have the list of a manifest's files there, if it has one, before the manifest. Raises :class:`OSError`."""
    if manifest.beside is not None:
        table.write(*manifest.beside)
