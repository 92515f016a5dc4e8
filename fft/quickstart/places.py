"""Where the files of a quickstart lie: on a disk, or below a URL, where what knows paths alone gets a copy."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fft.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from fft.data.storage import Storage, reaching, whole
from fft.data.views import files_below, send
from fft.files import write_file


@dataclass(frozen=True)
class Lake:
    """A file or folder of a store, as :class:`pathlib.Path` is one of a disk."""

    url: str

    def __truediv__(self, name: str) -> "Lake":
        return Lake(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @classmethod
    def at(cls, url: str) -> "Lake":
        """Raises :class:`UserError` for what is no URL of a store that can be reached."""
        lake = cls(whole(url.rstrip("/")))
        lake.states()
        return lake

    @property
    def name(self) -> str:
        """Its last part."""
        return PurePosixPath(self.url).name

    def states(self) -> dict[str, tuple[int, int]]:
        """Size and time of modification (ns) of all its files by their names in it; of a file itself, under ""."""
        storage = Storage.at(self.url)
        with reaching(self.url):
            info = storage.info()
            found = {"": info} if info.is_file else files_below(storage)
        return {name: (one.size or 0, one.mtime_ns or 0) for name, one in sorted(found.items())}


Place = Path | Lake


@contextmanager
def written(place: Place) -> Iterator[Path]:
    """A local path for a file or folder that is to be made; it is at its place at the end of the ``with`` block.

    Raises :class:`OSError` where a store does not take it.
    """
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / place.name
        yield path
        above, storage = Storage.at(place.url.rpartition("/")[0]), Storage.at(place.url)
        if path.is_file():
            send(path, above, path.name)
        else:
            storage.delete_folder()
            for file in sorted(one for one in path.rglob("*") if one.is_file()):
                send(file, storage, file.relative_to(path).as_posix())


@contextmanager
def fetched(place: Place) -> Iterator[Path]:
    """A local path of a file or folder that is there. Raises :class:`UserError` where a store does not give it."""
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        path, storage = Path(folder) / place.name, Storage.at(place.url)
        for name in place.states():
            target = path / name if name else path
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, storage.read(name))
        yield path


def manifest_at(table: Place) -> Manifest | None:
    """The manifest of a table, if it has one."""
    if isinstance(table, Path):
        return read_manifest(table)
    storage = Storage.at(table.url)
    if not storage.exists(MANIFEST_NAME):
        return None
    return Manifest.from_json(storage.read(MANIFEST_NAME).decode(), storage.shown(MANIFEST_NAME), storage.read)
