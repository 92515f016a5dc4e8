"""The folder of a run in a store: what ranks have goes there part by part, and the checksums file makes a checkpoint.

Nothing is renamed. A folder ``step-N`` without ``SHA256SUMS`` is none: it was being written or removed when something
came between. What would be appended to, ``metrics.jsonl`` and TensorBoard's files, grows in a local folder and is put
whole with every checkpoint and at the end.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from fft.checkpoint import folder
from fft.checkpoint.folder import LATEST, METRICS, PICTURE, SAMPLES, SUMS, TENSORBOARD
from fft.checkpoint.run import LocalRun, RunFolder
from fft.data.storage import Storage, is_url
from fft.data.store_owner import owning
from fft.data.views import files_below, scratch_folder, send, view, view_of
from fft.errors import UserError, one_line
from fft.files import remove_file, write_file
from fft.weights import hf
from fft.weights.in_store import write_tensors_to

#: What the checksums of a damaged checkpoint are called.
_BAD = f"{SUMS}.bad"


def run_at(place: str | os.PathLike[str]) -> RunFolder:
    """The run whose folder is at a path or URL. Raises :class:`UserError` for a URL of no known file system."""
    return StoredRun(str(place), scratch_folder(place)) if is_url(place) else LocalRun(place)


class StoredRun(RunFolder):
    """A run's folder in a store, by its URL; what grows with it does so in the local folder ``notes``."""

    def __init__(self, url: str, notes: Path) -> None:
        self.storage, self._notes = Storage.at(url), notes

    @property
    def name(self) -> str:
        """Its URL."""
        return self.storage.name

    @property
    def notes(self) -> Path:
        """Where files grow until they are put."""
        return self._notes

    def steps(self) -> list[int]:
        """Steps of the checkpoints that have their checksums, oldest first."""
        with reported(self.name):
            tags = [tag for tag in self.storage.here() if folder.step_of(tag) is not None]
            found = [folder.step_of(tag) for tag in tags if self.storage.exists(f"{tag}/{SUMS}")]
        return sorted(step for step in found if step is not None)

    def text(self, name: str) -> str | None:
        """The content of a small file; None where there is none."""
        with reported(self.name):
            return self.storage.read(name).decode(errors="replace") if self.storage.exists(name) else None

    def put(self, name: str, text: str) -> None:
        """Make a small file; numbers are noted, too, since they grow."""
        if name == METRICS:
            write_file(self.notes / name, text)
        with reported(self.name):
            self.storage.write(name, text)

    def drop(self, name: str) -> None:
        """Remove a small file, if it is there."""
        with reported(self.name):
            self.storage.delete([name])

    def forget(self) -> None:
        """Remove the numbers of an older run."""
        remove_file(self.notes / METRICS)
        self.drop(METRICS)
        self.drop(PICTURE)
        self.drop(SAMPLES)
        with reported(self.name):
            self.storage.delete_folder(TENSORBOARD)

    def keep(self) -> None:
        """Put what has grown in :attr:`notes`, whole."""
        grown = [self.notes / METRICS, *(self.notes / TENSORBOARD).glob("*")]
        with reported(self.name):
            for file in grown:
                if file.is_file():
                    send(file, self.storage, file.relative_to(self.notes).as_posix())

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the one run that writes here. Raises :class:`UserError` while another one is."""
        with owning(self.storage, self.name):
            yield

    def tidy(self) -> list[str]:
        """Remove checkpoints that are not whole; returns a sentence for each."""
        with reported(self.name):
            files = files_below(self.storage)
            tags = {tag for name in files if folder.step_of(tag := name.partition("/")[0]) is not None}
            left = [tag for tag in sorted(tags) if not {f"{tag}/{SUMS}", f"{tag}/{_BAD}"} & files.keys()]
            for tag in left:
                self.storage.delete_folder(tag)
        return [f"{self.shown(tag)} has no {SUMS}, it was left half done: removed" for tag in left]

    def view(self, tag: str) -> Path:
        """A checkpoint as a local folder to read from."""
        return view(self.shown(tag), fresh=True)

    def start(self, tag: str) -> None:
        """Remove what is left of a checkpoint of this name."""
        self.remove(tag)

    def write_tensors(
        self, tag: str, rank: int, files: Mapping[str, tuple[dict[str, Tensor], dict[str, str]]], summed: set[str]
    ) -> None:
        """Write what a rank has of a checkpoint. Raises :class:`UserError` where that fails."""
        place, lines = self.storage.below(tag), []
        for name, (tensors, metadata) in files.items():
            digest = write_tensors_to(place, name, tensors, metadata)
            lines += [f"{digest}  {name}\n"] if name in summed else []
        with reported(self.name):
            place.write(f"{SUMS}.{rank}", "".join(lines))

    def publish(self, tag: str, complete: Callable[[Path], list[str]]) -> None:
        """Send what is missing, the checksums last."""
        place = self.storage.below(tag)
        with tempfile.TemporaryDirectory(prefix="fft-publish-") as scratch, reported(self.name):
            staging = view_of(place, Path(scratch) / tag)
            (staging / folder.TRAINING).mkdir(exist_ok=True)
            names = send_completed(place, staging, complete)
            folder.note_sums(staging, names, "rest")
            lists = [file.name for file in staging.glob(f"{SUMS}.*")]
            folder.gather_sums(staging)
            self.keep()
            place.write(SUMS, (staging / SUMS).read_bytes())
            self.storage.write(LATEST, f"{tag}\n")
            place.delete(lists)

    def remove(self, tag: str) -> None:
        """Remove a checkpoint, its checksums first."""
        with reported(self.name):
            if self.storage.exists(f"{tag}/{SUMS}"):
                self.storage.delete([f"{tag}/{SUMS}"])
            self.storage.delete_folder(tag)

    def set_aside(self, tag: str) -> str:
        """Take its checksums from a damaged checkpoint, which is none without; returns where they are."""
        with reported(self.name):
            self.storage.write(f"{tag}/{_BAD}", self.storage.read(f"{tag}/{SUMS}"))
            self.storage.delete([f"{tag}/{SUMS}"])
        return self.shown(f"{tag}/{_BAD}")


def send_completed(place: Storage, staging: Path, complete: Callable[[Path], list[str]]) -> list[str]:
    """Have ``complete`` add files to ``staging``, a view of ``place``; send those, remove there what it took away.

    Returns the names of the files, of which the config is sent last. Raises :class:`OSError` where the store fails.
    """
    before = {file for file in staging.rglob("*") if file.is_file()}
    names = complete(staging)
    for name in sorted(names, key=lambda name: name == hf.CONFIG):
        send(staging / name, place, name)
    place.delete(file.relative_to(staging).as_posix() for file in before if not file.exists())
    return names


@contextmanager
def reported(name: str) -> Iterator[None]:
    """Around what a store is asked to do. Raises :class:`UserError` where it does not."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{name} does not take or give what it should ({one_line(error)}): see to the store, and to this machine's "
            "credentials."
        ) from error
