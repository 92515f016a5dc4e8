"""A directory of a store as a local folder: copies of its small files, and in place of weights notes of where they lie.

What reads models and checkpoints reads local folders, and so do the libraries that it calls. Who reads weights follows
the notes, see :func:`noted`, and asks the store for the ranges that it needs. Whoever does not know of notes finds by
their first bytes that they are no files of weights.
"""

import hashlib
import json
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from fft.data.asking import NewFile, asking
from fft.data.storage import Storage, is_url, reaching
from fft.errors import UserError, one_line
from fft.files import remove_file, remove_path, write_atomically, write_file
from fft.json_text import json_value

#: What a note begins with.
_NOTE = b"a file of a store, noted by flash-fine-tuning\n"
#: In a view, the place that it shows, and of its files sizes and times.
_ORIGIN = ".origin"
#: Files that are noted, whatever their size, and the size from which all are.
_WEIGHTS, _LARGE = (".safetensors", ".bin", ".pt", ".pth"), 64 << 20
#: Folders that are looked into, besides the directory itself.
_FOLDERS = ("training", "additional_chat_templates")
#: Bytes that are asked for at once, and how many requests are under way together.
_CHUNK, _REQUESTS = 16 << 20, 8
#: Bytes of a file after which it is waited for that the store has them.
_SENT = 32 << 20


class StoredFile:
    """A file of a store, of which ranges are read, several at a time."""

    def __init__(self, place: str, size: int) -> None:
        self.name, self.size = place, size
        above, _, name = place.rpartition("/")
        self._storage = _store(above, os.getpid()).below(name)

    def read(self, start: int, stop: int) -> bytearray:
        """Bytes [start, stop). Raises :class:`UserError` where the store does not have them, or does not answer."""
        found = bytearray(stop - start)
        at = memoryview(found)

        def put(first: int) -> None:
            at[first : first + _CHUNK] = self._range(start + first, min(start + first + _CHUNK, stop))

        firsts = range(0, len(found), _CHUNK)
        if len(firsts) < 2:
            for first in firsts:
                put(first)
        else:
            list(_requests(os.getpid()).map(put, firsts))
        return found

    def chunks(self) -> Iterator[bytes]:
        """All of it, piece by piece, the next ones on their way. Raises :class:`UserError` as :meth:`read` does."""
        coming: deque[Future[bytes]] = deque()
        for first in range(0, self.size, _CHUNK):
            reading = partial(self._range, first, min(first + _CHUNK, self.size))
            coming.append(_requests(os.getpid()).submit(reading))
            if len(coming) == _REQUESTS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()

    @cached_property
    def head(self) -> bytes:
        """The header of a safetensors file, from its first byte on. Raises :class:`UserError` where it has none."""
        length = int.from_bytes(self.read(0, min(8, self.size)), "little")
        if not 0 < length <= self.size - 8:
            raise UserError(f"{self.name} is no readable safetensors file: it may be cut off; write it again.")
        return bytes(self.read(0, 8 + length))

    @cached_property
    def _file(self) -> pa.NativeFile:
        return asking(partial(self._storage.filesystem.open_input_file, self._storage.root))

    def _range(self, start: int, stop: int) -> bytes:
        try:
            found = asking(lambda: self._file.read_at(stop - start, start))
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.name} cannot be read ({one_line(error)}): see that it is there, and this machine's credentials."
            ) from error
        if len(found) < stop - start:
            raise UserError(f"{self.name} is shorter than the {self.size:,} bytes that it had: write it again.")
        return found


def view(place: str | os.PathLike[str], fresh: bool = False) -> Path:
    """A local folder, or file, that shows what lies at a path or URL; a local one is itself.

    That of a store goes with this process. Asked for again, it is brought up to date: files of another size or time are
    copied, with ``fresh`` all are, as stores tell times by the second. Raises :class:`UserError` where there is
    nothing, or the store does not answer.
    """
    if not is_url(place):
        return Path(place)
    storage = Storage.at(place)
    above = _views(os.getpid()) / hashlib.sha256(storage.name.encode()).hexdigest()[:8]
    with reaching(storage.name):
        found = storage.info()
        if found.type == fs.FileType.NotFound:
            raise UserError(f"{storage.name} does not exist: give the URL of a folder, or what it has of one.")
        if found.type == fs.FileType.File:
            folder, name = storage.name.rsplit("/", 1)
            return _bring(Storage.at(folder), above, {name: _facts(found)}) / name
        folder = above / PurePosixPath(storage.root).name
        if fresh:
            remove_path(folder)
        return view_of(storage, folder)


def view_of(storage: Storage, folder: Path) -> Path:
    """Have ``folder`` show the files of ``storage``; returns it. Raises :class:`OSError` where it does not answer."""
    files = files_below(storage)
    return _bring(storage, folder, {n: _facts(f) for n, f in files.items() if os.path.dirname(n) in ("", *_FOLDERS)})


def files_below(storage: Storage) -> dict[str, fs.FileInfo]:
    """All files in a folder of a store by their names in it; none where there is no such folder. Raises
    :class:`OSError` where the store does not answer.
    """
    selector = fs.FileSelector(storage.root, recursive=True, allow_not_found=True)
    listed = asking(partial(storage.filesystem.get_file_info, selector))
    return {found.path.removeprefix(storage.root).lstrip("/"): found for found in listed if found.is_file}


def _facts(found: fs.FileInfo) -> list[int]:
    """Size and time of a file: another one of its name has others."""
    return [found.size, found.mtime_ns]


def _bring(storage: Storage, folder: Path, files: dict[str, list[int]]) -> Path:
    """Have ``folder`` show these ``files``, of which those stay that it has already."""
    file = folder / _ORIGIN
    before = json_value(file.read_bytes())["files"] if file.is_file() else {}
    for name in before.keys() - files.keys():
        remove_file(folder / name)
    folder.mkdir(parents=True, exist_ok=True)

    def bring(name: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        size, written = files[name]
        if name.endswith(_WEIGHTS) or size > _LARGE:
            facts = {"place": storage.shown(name), "size": size, "written": written}
            write_file(folder / name, _NOTE + json.dumps(facts).encode())
        else:
            write_file(folder / name, storage.read(name))

    list(_requests(os.getpid()).map(bring, [name for name in files if before.get(name) != files[name]]))
    write_atomically(file, json.dumps({"place": storage.name, "files": files}))
    return folder


def noted(file: Path) -> StoredFile | None:
    """The file of a store that stands in a note; None for a file that is itself, and where there is none."""
    try:
        with open(file, "rb") as stream:
            if stream.read(len(_NOTE)) != _NOTE:
                return None
            return _stored_file(stream.read())
    except OSError:
        return None


def send(file: Path, storage: Storage, name: str) -> None:
    """Write a file, wherever it lies, into a store. Raises :class:`OSError`, or :class:`UserError` for what is read."""
    asking(partial(_send, file, storage, name))


def _send(file: Path, storage: Storage, name: str) -> None:
    target = storage.create(name)
    try:
        for piece in pieces(file):
            write_bounded(target, piece)
        target.close()
    except BaseException:
        target.discard()
        raise


def write_bounded(target: NewFile, piece: bytes | memoryview) -> None:
    """Write to a file of a store; what its client holds in memory until it is sent is less than two :data:`_SENT`."""
    whole = memoryview(piece)
    for start in range(0, len(whole), _SENT):
        begun, part = target.stream.tell(), whole[start : start + _SENT]
        target.stream.write(part)
        if (begun + len(part)) // _SENT > begun // _SENT:
            target.stream.flush()


def pieces(file: Path) -> Iterator[bytes]:
    """The content of a file, wherever it lies. Raises :class:`OSError`, or :class:`UserError` for that of a store."""
    stored = noted(file)
    if stored is not None:
        yield from stored.chunks()
        return
    with open(file, "rb") as stream:
        while piece := stream.read(_CHUNK):
            yield piece


def scratch_folder(place: str | os.PathLike[str]) -> Path:
    """A local folder for what a place in a store gets later. It goes with this process."""
    folder = _views(os.getpid()) / f"{hashlib.sha256(str(place).encode()).hexdigest()[:8]}-notes"
    folder.mkdir(exist_ok=True)
    return folder


def origin(path: Path) -> str:
    """What the user calls a file or folder, or the view of one."""
    for above in (path, *path.parents):
        if (above / _ORIGIN).is_file():
            place = json_value((above / _ORIGIN).read_bytes())["place"]
            return "/".join((place, *path.relative_to(above).parts))
    return str(path)


@contextmanager
def naming_places() -> Iterator[None]:
    """Have a :class:`UserError` name places, not the views of them."""
    try:
        yield
    except UserError as error:
        if _scratch.cache_info().currsize:
            text = str(error)
            for file in _views(os.getpid()).rglob(_ORIGIN):
                text = text.replace(str(file.parent), json_value(file.read_bytes())["place"])
            error.args = (text,)
        raise


@lru_cache(maxsize=4096)
def _stored_file(facts: bytes) -> StoredFile:
    """What a note tells of: one object, so that a file is opened once and its header is read once."""
    told = json_value(facts)
    return StoredFile(told["place"], told["size"])


@lru_cache(maxsize=64)
def _store(folder: str, process: int) -> Storage:
    """A folder of a store, as this ``process`` asks it: to find one's region costs a request."""
    return Storage.at(folder)


@lru_cache(maxsize=1)
def _requests(process: int) -> ThreadPoolExecutor:
    """Who reads, in this ``process``: a forked one has none of the threads of that which it comes from."""
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix=f"store-{process}")


@lru_cache(maxsize=1)
def _scratch(process: int) -> tempfile.TemporaryDirectory:
    """Where the views of this ``process`` are, which go with it."""
    return tempfile.TemporaryDirectory(prefix=f"fft-views-{process}-")


def _views(process: int) -> Path:
    return Path(_scratch(process).name)
