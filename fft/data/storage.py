"""Folders of files by path or by URL, through pyarrow's file systems: local, s3://, gs://, abfs://, hdfs://, file://.

All that is known of where bytes lie is known here; tables, their manifests and their versions are built upon it.
Credentials are what the file systems find by themselves: the environment, a profile, the machine's role. Logs of Delta
tables are read by ``deltalake``, which looks into the environment, too.
"""

import os
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from fft.errors import UserError, one_line


@dataclass(frozen=True)
class Listing:
    """What lay below a folder, by names relative to it: bytes of the files, and the folders.

    Of a single file: its bytes, under the name ``""``.
    """

    sizes: Mapping[str, int]
    folders: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Storage:
    """A folder, or a single file: ``name`` is what the user calls it, ``root`` its path on ``filesystem``."""

    name: str
    root: str
    filesystem: fs.FileSystem

    @classmethod
    def at(cls, name: str | os.PathLike[str]) -> "Storage":
        """The storage that a path or URL names. Raises :class:`UserError` for a URL of no known file system."""
        if not is_url(name):
            return cls(str(Path(name)), str(Path(name).absolute()), fs.LocalFileSystem())
        url = str(name).rstrip("/")
        with _reaching(url):
            filesystem, root = fs.FileSystem.from_uri(url)
        return cls(url, root.rstrip("/"), filesystem)

    def path(self, name: str) -> str:
        """Where ``filesystem`` has the file of this name; one that begins with a slash may lie elsewhere."""
        return posixpath.join(self.root, name) if name else self.root

    def shown(self, name: str) -> str:
        """What to call the file of this name when talking to the user."""
        return posixpath.join(self.name, name) if name else self.name

    def list(self) -> Listing:
        """All files at whatever depth, in one go. Links to files are followed, links to folders are not.

        Raises :class:`UserError` when there is nothing of this name, or it cannot be listed.
        """
        with _reaching(self.name):
            here = self.filesystem.get_file_info(self.root)
            if here.type == fs.FileType.NotFound:
                raise UserError(f"{self.name} does not exist: give a folder of parquet files that Spark wrote.")
            if here.type == fs.FileType.File:
                return Listing({"": here.size})
            if isinstance(self.filesystem, fs.LocalFileSystem):
                return _local_listing(self.root)
            found = self.filesystem.get_file_info(fs.FileSelector(self.root, recursive=True))
        names = [(info.path.removeprefix(self.root).lstrip("/"), info) for info in found]
        sizes = {name: info.size for name, info in names if info.type == fs.FileType.File}
        folders = {name for name, info in names if info.type == fs.FileType.Directory}
        # Object stores need not know of the folders in the names of their objects.
        folders |= {str(above) for name in sizes for above in PurePosixPath(name).parents}
        return Listing(sizes, frozenset(folders))

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name now. Raises :class:`UserError` when that cannot be told."""
        with _reaching(self.name):
            return self.filesystem.get_file_info(self.path(name)).type == fs.FileType.File

    def read(self, name: str) -> bytes:
        """The content of a small file of this name. Raises :class:`UserError` when it cannot be read."""
        with _reaching(self.name), self.filesystem.open_input_stream(self.path(name)) as stream:
            return stream.read()


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path names its file system."""
    return "://" in str(path)


@contextmanager
def _reaching(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{name} cannot be listed ({one_line(error)}): check the address and this machine's credentials."
        ) from error


def _local_listing(root: str) -> Listing:
    """As pyarrow would give it, which follows links to folders, round and round where they make a circle."""
    sizes: dict[str, int] = {}
    folders: list[str] = [""]
    for folder in folders:  # grows while it is read
        with os.scandir(posixpath.join(root, folder)) as entries:
            for entry in entries:
                name = posixpath.join(folder, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.is_file():
                    sizes[name] = entry.stat().st_size
    return Listing(sizes, frozenset(folders[1:]))
