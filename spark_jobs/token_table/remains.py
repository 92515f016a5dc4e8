"""What lies in the folders of an output: tables that stay until newer ones are whole, and what is left of jobs."""

import os
import posixpath
import re
from collections.abc import Collection, Iterable

from pyarrow import fs

from fft.data.commits import begin_writing
from fft.data.delta import read_snapshot, split_name
from fft.data.file_list import LIST_PREFIX
from fft.data.manifest import MANIFEST_NAME, WRITING_NAME, Manifest, replacing
from fft.data.owner import OWNER_NAME
from fft.data.part_files import QUARANTINE
from fft.data.replaceable import Kind, stranger_in
from fft.data.storage import Storage, address_of, reaching
from fft.data.store_owner import OWNERS
from fft.data.worker_notes import WRITING
from fft.errors import UserError
from spark_jobs.token_table.kept import FINISHED, Settled, drop_all, settle_parts

SPLITS = ("train", "validation")
INFO_NAME = "_data.info"

_OURS = "|".join(rf"\.?{re.escape(name)}(\.\w+)*" for name in (MANIFEST_NAME, WRITING_NAME, INFO_NAME, OWNER_NAME))
#: Spark's files, and parts that nobody has published.
_FILES = rf".*\.parquet|\..*\.crc|_SUCCESS|\.part-.*{re.escape(WRITING)}"
_REJECTS = Kind("what a table has set aside", rf".*\.json|{_FILES}")
#: What may be removed from an output folder: nothing that Spark or these jobs did not put there.
TABLE = Kind(
    "a table",
    f"{_FILES}|{_OURS}",
    {
        r".*\.parquet": Kind("a table", _FILES),
        QUARANTINE: _REJECTS,
        FINISHED: Kind("parts that wait", "", {".*": _REJECTS}),
        OWNERS: Kind("marks", r".*\.(json|now)"),
        "_temporary": None,
        "|".join(SPLITS): None,
    },
)
_REMOVED = re.compile("|".join((TABLE.files, r".*\.parquet", QUARANTINE, OWNERS, "_temporary")))
#: What of it is no sign of a table: what a job has beside its parts, and parts that nobody has published.
_NO_TABLE = re.compile(
    rf"{LIST_PREFIX}.*|\.part-.*{re.escape(WRITING)}|{QUARANTINE}|{FINISHED}|{OWNERS}|"
    + "|".join(rf"\.?{re.escape(name)}(\.\w+)*" for name in (WRITING_NAME, OWNER_NAME))
)
#: What says who writes, and that somebody does.
_MARKS = {OWNER_NAME, OWNERS, WRITING_NAME}


def is_folder(place: Storage) -> bool:
    """Whether there is a folder. Raises :class:`UserError` when that cannot be told."""
    with reaching(place.name):
        return place.info().type == fs.FileType.Directory


def is_delta_at(place: Storage) -> bool:
    """Whether a Delta log lies there. Raises as :func:`is_folder`."""
    return is_folder(place.below("_delta_log"))


def check_no_links(output: Storage) -> None:
    """Raise :class:`UserError` where an output on a disk has a link for a folder that jobs write into, and clear."""
    if not output.is_local:
        return
    inside = (FINISHED, QUARANTINE, "_delta_log")
    for name in (*SPLITS, *inside, *(f"{split}/{folder}" for split in SPLITS for folder in inside)):
        if os.path.islink(output.path(name)):
            raise UserError(
                f"`output` {output.name} has a link {name}, and what links lead to is neither written to nor removed: "
                "remove it, or give another folder."
            )


def tables_at(output: Storage) -> list[Storage]:
    """The folders in which an output has, or may have, its tables: itself, and those of a split."""
    return [place for place in (output, *(output.below(split) for split in SPLITS)) if is_folder(place)]


def holds_table(place: Storage) -> bool:
    """Whether a folder that is there holds what has to stay until a newer table is whole: a table, whoever wrote it.

    What an interrupted job has left of a first try is none.
    """
    here = place.here()
    if MANIFEST_NAME in here or is_delta_at(place):
        return True
    if WRITING_NAME in here and replacing(place.read(WRITING_NAME)) is None and _believed(place, here):
        return False
    return any(not _NO_TABLE.fullmatch(name) and not (name in SPLITS and size is None) for name, size in here.items())


def _believed(place: Storage, names: Iterable[str]) -> bool:
    """Whether who marked a table as unfinished could have written it: anybody may leave a mark in a shared folder."""
    if not place.is_local:
        return True
    owner = os.lstat(place.path(WRITING_NAME)).st_uid
    return owner == os.geteuid() or all(os.lstat(place.path(name)).st_uid == owner for name in names)


def files_now(place: Storage) -> set[str]:
    """The names of a table's files according to its manifest or log, if it has one.

    Raises :class:`UserError` for a manifest or a log that is none.
    """
    if is_delta_at(place):
        return set(read_snapshot(place).names)
    if not place.exists(MANIFEST_NAME):
        return set()
    text = place.read(MANIFEST_NAME).decode("utf-8", "replace")
    manifest = Manifest.from_json(text, place.shown(MANIFEST_NAME), place.read)
    return _names_of(manifest)


def _names_of(manifest: Manifest) -> set[str]:
    """The names of all files that a manifest speaks of, its list of them, too."""
    return {*(file.path for file in manifest.files), *([manifest.beside[0]] if manifest.beside else [])}


def settle(place: Storage, work: str = "") -> Settled:
    """Remove what interrupted jobs have left: of a table that was never finished, all; else what is no part of it.

    Finished parts of the same ``work`` stay, see :mod:`spark_jobs.token_table.kept`; and the mark, where they have
    their places already, so that nobody takes them for a table. Only for who owns the output: other jobs' files are
    those of dead ones.
    """
    here, left = place.here(), Settled()
    if FINISHED in here:
        left = settle_parts(place, work, files_now(place))
        here = place.here()
    in_place = left.in_place
    marked = WRITING_NAME in here
    ending = replacing(place.read(WRITING_NAME)) if marked else None
    if not holds_table(place):
        aside = {QUARANTINE} if any(name.startswith(f"{QUARANTINE}/") for name in in_place) else set()
        _remove(place, ".*", {*_MARKS, *in_place, *aside})
    elif marked and not is_delta_at(place):
        if MANIFEST_NAME in here:
            _remove(place, r".*\.parquet", {*files_now(place), *in_place})
        elif ending:
            _remove(place, f".*{re.escape(ending)}")
    for folder in (place, place.below(QUARANTINE)):
        folder.delete([n for n in folder.here() if n.startswith(".") and n.endswith(WRITING) and _REMOVED.fullmatch(n)])
    if not in_place:
        place.delete([WRITING_NAME])
    return left


def remove_older(place: Storage, own: Collection[str]) -> None:
    """Remove all of a table that a newer one, with its ``own`` files, has just replaced; of a Delta table, nothing."""
    drop_all(place)
    if not is_delta_at(place):
        _remove(place, ".*", {MANIFEST_NAME, QUARANTINE, *_MARKS, *own})
    aside = place.below(QUARANTINE)
    aside.delete([name for name in aside.here() if posixpath.join(QUARANTINE, name) not in own])
    aside.delete_empty()


def remove_table(place: Storage) -> None:
    """Remove a whole table, which until then is marked as unfinished; its folder, too, if that is empty then."""
    begin_writing(place, {})
    _remove(place, ".*", _MARKS)
    place.delete([WRITING_NAME])
    place.delete_empty()


def _remove(place: Storage, names: str, kept: Collection[str] = ()) -> None:
    found = {
        name: size
        for name, size in place.here().items()
        if name not in kept and _REMOVED.fullmatch(name) and re.fullmatch(names, name)
    }
    place.delete([name for name, size in found.items() if size is not None])
    for name, size in found.items():  # somebody may have put something into a folder since it was looked at
        if size is None and not any(inner and stranger_in(place.below(name), inner) for inner in TABLE.inside(name)):
            place.delete_folder(name)


def check_apart(output: str, inputs: Iterable[object]) -> None:
    """Raise :class:`UserError` where an output lies within an input, or the other way round."""
    target = f"{address_of(output)}/"
    for path in inputs:
        source = f"{address_of(split_name(str(path))[0])}/"
        if source.startswith(target) or target.startswith(source):
            raise UserError(f"`output` {output} and the input {path} overlap: write to a folder beside it.")
