"""What lies below a local folder, links included."""

import os
import posixpath
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from fft.data.manifest import is_hidden


@dataclass(frozen=True)
class Listing:
    """What lay below a folder, by names relative to it: bytes of the files, and the folders.

    Of a single file: its bytes, under the name ``""``. ``repeated`` are links to files and folders that have other
    names here, which it has, or lie above (""); ``dead`` are neither files nor folders: links to nothing, sockets.
    """

    sizes: Mapping[str, int]
    folders: frozenset[str] = frozenset()
    repeated: Mapping[str, str] = field(default_factory=dict)
    dead: frozenset[str] = frozenset()


class Walk:
    """All below a local folder, links too. (pyarrow follows those to folders round and round where they make a circle.)

    What a link leads to is listed under its name, but for a folder that is listed already. First comes all that can be
    reached without links, so that names do not depend on the order in which a file system gives them.
    """

    def __init__(self, root: str) -> None:
        self._root, self._real_root = root, os.path.realpath(root)
        self._folders, self._links = deque([("", self._real_root)]), deque[str]()
        #: Names of folders, and of files that links led to, by their real paths.
        self._names: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.repeated: dict[str, str] = {}
        self.dead: set[str] = set()
        while self._folders or self._links:
            if self._folders:
                self._look_into(*self._folders.popleft())
            else:
                self._follow(self._links.popleft())

    def listing(self) -> Listing:
        """All that was found."""
        folders = {name for real, name in self._names.items() if name not in self.sizes}
        return Listing(self.sizes, frozenset(folders - {""}), self.repeated, frozenset(self.dead))

    def _look_into(self, folder: str, real: str) -> None:
        if self._is_listed(real, folder):
            self.repeated[folder] = self._names[real]
            return
        self._names[real] = folder
        with os.scandir(posixpath.join(self._root, folder)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = posixpath.join(folder, entry.name)
                if entry.is_symlink():
                    self._links.append(name)
                elif entry.is_dir():
                    self._folders.append((name, posixpath.join(real, entry.name)))
                elif entry.is_file():
                    self.sizes[name] = entry.stat().st_size
                else:
                    self.dead.add(name)

    def _follow(self, link: str) -> None:
        real = os.path.realpath(posixpath.join(self._root, link))
        if os.path.isdir(real):
            above = f"{self._real_root}/".startswith(f"{real.rstrip('/')}/")
            if above:
                self.repeated[link] = ""
            else:
                self._folders.append((link, real))
        elif os.path.isfile(real):
            self.sizes[link] = os.path.getsize(real)
            folder = self._names.get(posixpath.dirname(real))
            if folder is not None:  # the file itself lies here
                self._names.setdefault(real, posixpath.join(folder, posixpath.basename(real)))
            if self._is_listed(real, link):
                self.repeated[link] = self._names[real]
            else:
                self._names[real] = link
        else:
            self.dead.add(link)

    def _is_listed(self, real: str, name: str) -> bool:
        """Under another name; one that is passed over does not count for one that is not."""
        other = self._names.get(real)
        return other is not None and (not is_hidden(PurePosixPath(other)) or is_hidden(PurePosixPath(name)))
