"""Folders of files by path or by URL, through pyarrow's file systems: local, s3://, gs://, abfs://, hdfs://, file://.

All that is known of where bytes lie is known here; tables, their manifests and their versions are built upon it.
Credentials are what the file systems find by themselves: the environment, a profile, the machine's role. Logs of Delta
tables are read by ``deltalake``, which looks into the environment, too.

Nothing is renamed, appended to or opened for reading and writing at once, so that all of it works in object stores. A
store that is busy, or away for a moment, is asked again; see :func:`asking`.
"""

import contextlib
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from fft.data.asking import NewFile, asking, delete_object, file_system
from fft.data.listing import Listing, Walk
from fft.errors import StorageError, UserError, check_no_credentials, one_line
from fft.files import (
    check_own,
    end_of,
    move_file,
    own_folder,
    remove_empty,
    remove_file,
    remove_path,
    utf8,
    write_atomically,
)

#: Schemes of Hadoop for stores that pyarrow knows under another.
SCHEMES = {"s3a": "s3", "s3n": "s3"}
#: Schemes whose URLs need not name a host.
_HOSTLESS = ("file", "hdfs", "viewfs", "dbfs")
#: Files that are removed at once.
_REMOVED_AT_ONCE = 16


@dataclass(frozen=True)
class Storage:
    """A folder, or a single file: ``name`` is what the user calls it, ``root`` its path on ``filesystem``.

    On a disk what the user names may be a link; nothing is written or removed through one that lies in it. ``top`` is
    the root of the former, where this is a folder :meth:`below` it.
    """

    name: str
    root: str
    filesystem: fs.FileSystem
    top: str = field(default="", compare=False)

    @classmethod
    def at(cls, name: "str | os.PathLike[str] | Storage") -> "Storage":
        """The storage that a path or URL names; one that is given is returned.

        Raises :class:`UserError` for a URL of no known file system or with credentials, and for a name that is no
        UTF-8.
        """
        if isinstance(name, Storage):
            return name
        check_names_utf8([str(name)])
        if not is_url(name):
            return cls(str(Path(name)), str(Path(name).absolute()), fs.LocalFileSystem())
        url = whole(str(name).rstrip("/"))
        with reaching(url):
            scheme, _, rest = url.partition("://")
            host, _, path = rest.partition("/")
            if scheme == "file" or "?" in rest:
                filesystem, root = fs.FileSystem.from_uri(f"{SCHEMES.get(scheme, scheme)}://{rest}")
            else:  # names of a store as they stand there: blanks and % are no escapes
                filesystem, root = file_system(f"{SCHEMES.get(scheme, scheme)}://{host}/")
                root = posixpath.join(root, path)
        return cls(url, root.rstrip("/"), filesystem)

    @property
    def is_local(self) -> bool:
        """Whether the operating system has it: a disk, or whatever is mounted like one."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def location(self) -> str:
        """What names it on every machine: an absolute path, or the URL."""
        return self.root if self.is_local else self.name

    def location_of(self, name: str) -> str:
        """The same of the file of this name; see :meth:`at`."""
        return self.path(name) if self.is_local else posixpath.join(self.name, name)

    def below(self, name: str) -> "Storage":
        """The folder, or file, of this name in it."""
        return Storage(self.shown(name), self.path(name), self.filesystem, self._top)

    def path(self, name: str) -> str:
        """Where ``filesystem`` has the file of this name; one that begins with a slash may lie elsewhere."""
        return posixpath.join(self.root, name) if name else self.root

    def shown(self, name: str) -> str:
        """What to call the file of this name when talking to the user."""
        return posixpath.join(self.name, name) if name else self.name

    def list(self) -> Listing:
        """All files at whatever depth, in one go. Links are followed, those to folders once.

        Raises :class:`UserError` when there is nothing of this name, or it cannot be listed.
        """
        with reaching(self.name):
            here = asking(partial(self.filesystem.get_file_info, self.root))
            if here.type == fs.FileType.NotFound:
                raise UserError(
                    f"{self.name} does not exist: give a folder of parquet files that Spark wrote, of a catalog table "
                    "its location."
                )
            if here.type == fs.FileType.File:
                return Listing({"": here.size})
            if self.is_local:
                return Walk(self.root).listing()
            found = asking(partial(self.filesystem.get_file_info, fs.FileSelector(self.root, recursive=True)))
        names = [(info.path.removeprefix(self.root).lstrip("/"), info) for info in found]
        sizes = {name: info.size for name, info in names if info.type == fs.FileType.File}
        folders = {name for name, info in names if info.type == fs.FileType.Directory}
        # Object stores need not know of the folders in the names of their objects.
        folders |= {str(above) for name in sizes for above in PurePosixPath(name).parents}
        return Listing(sizes, frozenset(folders))

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name now. Raises :class:`UserError` when that cannot be told."""
        with reaching(self.name):
            return self.info(name).type == fs.FileType.File

    def read(self, name: str) -> bytes:
        """The content of a small file of this name. Raises :class:`UserError` when it cannot be read."""
        with reaching(self.name):
            return self.fetch(name)

    def fetch(self, name: str) -> bytes:
        """The same. Raises :class:`OSError`, as all that follow do, where the file system does not give it."""
        return asking(partial(self._get, name))

    def info(self, name: str = "") -> fs.FileInfo:
        """What there is of this name: its kind, bytes, and when it was written by the clock of the store."""
        return asking(partial(self.filesystem.get_file_info, self.path(name)))

    def here(self) -> dict[str, int | None]:
        """What lies directly in it: bytes of the files, None for folders. Nothing where there is no such folder."""
        selector = fs.FileSelector(self.root, allow_not_found=True)
        found = asking(partial(self.filesystem.get_file_info, selector))
        return {one.base_name: None if one.type == fs.FileType.Directory else one.size for one in found}

    def make(self) -> None:
        """Have the folder there, where folders are more than the beginnings of names."""
        if self.is_local:
            own_folder(self.root, self._top)

    def write(self, name: str, content: str | bytes) -> None:
        """Make a small file, of text as UTF-8: it appears whole or not at all, in the place of an older one.

        It is there for good once this returns.
        """
        data = utf8(content)
        if self.is_local:
            write_atomically(self._own(name), data)
        else:
            asking(partial(self._put, name, data))

    def move(self, name: str, other: str) -> None:
        """Give a file another name, in the place of one that has it. In a store it is copied: for few files."""
        if self.is_local:
            move_file(self._own(name), self._own(other))
        else:
            asking(partial(self.filesystem.copy_file, self.path(name), self.path(other)))
            self.delete([name])

    def create(self, name: str) -> NewFile:
        """Begin a file of any size; see :class:`NewFile`."""
        return NewFile(self.filesystem, str(self._own(name)) if self.is_local else self.path(name))

    def delete(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there do not matter."""
        gone = [self.path(name) for name in names]
        if self.is_local:
            for path in gone:
                remove_file(path, self._above(path))
            return
        with ThreadPoolExecutor(min(len(gone), _REMOVED_AT_ONCE) or 1) as pool:
            list(pool.map(partial(delete_object, self.filesystem), gone))

    def delete_folder(self, name: str = "") -> None:
        """Remove a folder with all that is in it, if it is there."""
        if self.is_local:
            path = self.path(name)
            if path == self._top:
                remove_path(end_of(path))
            else:
                remove_path(path, self._above(path))
        elif self.info(name).type == fs.FileType.Directory:
            with contextlib.suppress(FileNotFoundError):  # a beginning of names that has none any more
                asking(partial(self.filesystem.delete_dir, self.path(name)))

    def delete_empty(self) -> None:
        """Remove the folder if nothing is in it."""
        if self.is_local:
            remove_empty(self.root, self._above(self.root))
        elif not self.here():
            self.delete_folder()

    @property
    def _top(self) -> str:
        return self.top or self.root

    def _above(self, path: str) -> str | None:
        """The folder from which on no link may lead to a path: of one that lies elsewhere, that in which it is."""
        return self._top if path.startswith(f"{self._top.rstrip('/')}/") else None

    def _own(self, name: str) -> Path:
        """Where a file of this name is written. Raises :class:`OSError` where a link leads there."""
        path = self.path(name)
        if self._above(path) is not None:
            check_own(posixpath.dirname(path), self._top)
        return Path(path)

    def _get(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            return stream.read()

    def _put(self, name: str, data: bytes) -> None:
        with self.filesystem.open_output_stream(self.path(name)) as stream:
            stream.write(data)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path names its file system, with two slashes or, as ``dbfs:/x`` and ``Path("s3://x")`` do, with one."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is not None


def address_of(name: str | os.PathLike[str]) -> str:
    """What two names of one place have in common, whether anybody answers there or not."""
    text = str(name)
    if not is_url(text) or text.startswith("file:"):
        return os.path.realpath(re.sub("^file:(//(?=/))?", "", text))
    scheme, _, rest = text.partition(":")
    return f"{SCHEMES.get(scheme, scheme)}://{rest.strip('/')}"


def whole(url: str) -> str:
    """A URL of which a path has swallowed a slash, with all of them. (What has no host may be written with one.)

    Raises :class:`UserError` for one with credentials in it.
    """
    check_no_credentials(url)
    scheme, _, rest = url.partition(":")
    slashes, rest = len(rest) - len(rest.lstrip("/")), rest.lstrip("/")
    if scheme in _HOSTLESS and slashes != 2:
        return f"{scheme}:///{rest}"
    return f"{scheme}://{rest}"


def printable(name: str) -> str:
    """A name of a file system as UTF-8, the bytes that are none as escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def check_names_utf8(paths: Iterable[str], parameter: str = "") -> None:
    """Raise :class:`UserError` for a name that is no UTF-8: neither Spark nor a manifest can say it."""
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise UserError(f"{parameter}the name of {printable(path)} is no UTF-8: rename it.") from None


@contextmanager
def reaching(name: str) -> Iterator[None]:
    """Around what asks a file system for ``name``. Raises :class:`StorageError` where it does not answer."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise StorageError(
            f"{name} cannot be listed ({one_line(error)}): check the address and this machine's credentials."
        ) from error
