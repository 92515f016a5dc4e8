"""What lies at a path or URL that is to be written to, and whether it can be. Without torch."""

import os
import uuid
from collections.abc import Collection
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from fft.checkpoint.folder import STATE, SUMS, TENSORBOARD, TRAINING
from fft.data.replaceable import MODEL, Kind
from fft.data.storage import SCHEMES, Storage, is_url, reaching
from fft.data.store_owner import OWNERS
from fft.data.views import files_below
from fft.errors import UserError, one_line
from fft.files import TRIAL, TRYING, try_folder

_CHECKPOINT = Kind(
    "a checkpoint",
    rf"{MODEL.files}|{SUMS}(\.\w+)?",
    {**MODEL.folders, TRAINING: Kind("", r"state\.json|[\w-]+\.safetensors")},
)
#: What a run without --resume clears of a run's folder.
CLEARED = Kind("a run", ".*", {r"step-\d+": _CHECKPOINT, TENSORBOARD: Kind("", r"events\.out\..*"), ".*": None})


def parts(place: str) -> tuple[str, ...]:
    """A path, without its links, or a URL, part by part: two of the same parts are the same place."""
    if not is_url(place):
        return Path(place).resolve().parts
    scheme, _, rest = place.partition(":")
    return (SCHEMES.get(scheme, scheme), *PurePosixPath(rest.lstrip("/")).parts)


def lies_in(place: str, other: str) -> bool:
    """Whether a place is another one, or lies in it."""
    within = parts(other)
    return parts(place)[: len(within)] == within


def is_a_file(place: str) -> bool:
    """Whether a place is there and no folder. Raises :class:`UserError` where a store does not answer."""
    if not is_url(place):
        return Path(place).exists() and not Path(place).is_dir()
    with reaching(place):
        return Storage.at(place).info().type == fs.FileType.File


def holds_something(place: str, besides: Collection[str] = ()) -> bool:
    """Whether a folder holds anything, ``besides`` what has these names; what is no folder does not.

    Raises :class:`UserError` where a store does not answer.
    """
    if not is_url(place):
        names, besides = os.listdir(place) if Path(place).is_dir() else [], {*besides}
    else:
        with reaching(place):
            names, besides = list(Storage.at(place).here()), {*besides, OWNERS}
    return any(name not in besides and not TRIAL.fullmatch(name) for name in names)


def checkpoint_of(place: str) -> str | None:
    """The checkpoint, whole or damaged, that a place is or lies in; None where there is none."""
    if not is_url(place):
        path = Path(place).resolve()
        around = (place for place in (path, *path.parents) if any((place / name).is_file() for name in (SUMS, STATE)))
        return next(map(str, around), None)
    storage = Storage.at(place)
    with reaching(place):
        # In the store's root there are no files, and to ask for some is an error.
        while len(PurePosixPath(storage.root).parts) > 1:
            if any(storage.exists(name) for name in (SUMS, STATE)):
                return storage.name
            above, root = storage.name.rpartition("/")[0], str(PurePosixPath(storage.root).parent)
            storage = Storage(above, root, storage.filesystem)
    return None


def checkpoint_replaced(place: str) -> str | None:
    """The checkpoint that would be lost if a folder took that place: around or below it; None for none.

    Raises :class:`UserError` where a store does not answer.
    """
    if not is_url(place):
        within = (str(state.parent.parent) for state in Path(place).glob(f"**/{STATE}"))
        return checkpoint_of(place) or next(within, None)
    storage = Storage.at(place)
    with reaching(place):
        below = [name for name in files_below(storage) if f"/{name}".endswith((f"/{STATE}", f"/{SUMS}"))]
    if not below:
        return checkpoint_of(place)
    return storage.shown(below[0].removesuffix(STATE).removesuffix(SUMS).rstrip("/"))


def try_place(flag: str, place: str, name: str = "") -> None:
    """Find out whether a folder can be made in a place, by making one, or in a store a file, that goes again.

    ``name`` is that of what will be made in it. Raises :class:`UserError` where it cannot.
    """
    if not is_url(place):
        try:
            return try_folder(Path(place) / name)
        except OSError as error:
            raise UserError(
                f"{flag} {place} cannot be made ({error.strerror}): name a folder that this user may write to."
            ) from error
    probe, storage = f".{uuid.uuid4().hex}{TRYING}", Storage.at(place)
    try:
        storage.write(probe, b"")
        storage.delete([probe])
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{flag} {place} cannot be written to ({one_line(error)}): name a place that this machine's credentials "
            "may write to."
        ) from error
