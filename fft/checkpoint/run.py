"""The folder of a run and its checkpoints: on a disk; that in a store is in :mod:`fft.checkpoint.stored_run`.

Names are relative to the folder, tags are names of checkpoints. Methods raise :class:`OSError` where a disk or a store
does not do what it should.
"""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor

from fft.checkpoint import folder
from fft.checkpoint.folder import (
    BEST,
    LATEST,
    METRICS,
    PICTURE,
    SAMPLES,
    STATE,
    TENSORBOARD,
    by_loss,
    checkpoint_tag,
    kept,
)
from fft.data.model_files import check_file
from fft.errors import UserError
from fft.files import remove_file, remove_path, staging_folder, start_folder, write_atomically
from fft.json_text import json_value
from fft.weights import hf


class RunFolder(ABC):
    """A run's folder."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the user calls it."""

    @property
    @abstractmethod
    def notes(self) -> Path:
        """A local folder for what grows with the run."""

    @abstractmethod
    def steps(self) -> list[int]:
        """Steps of the checkpoints, oldest first."""

    @abstractmethod
    def text(self, name: str) -> str | None:
        """The content of a small file; None where there is none."""

    @abstractmethod
    def put(self, name: str, text: str) -> None:
        """Make a small file, whole or not at all."""

    @abstractmethod
    def drop(self, name: str) -> None:
        """Remove a small file, if it is there."""

    @abstractmethod
    def forget(self) -> None:
        """Remove the numbers of an older run."""

    @abstractmethod
    def keep(self) -> None:
        """Have all that ``notes`` hold in the folder."""

    @abstractmethod
    def hold(self) -> AbstractContextManager[None]:
        """Be the one run that writes here. Raises :class:`UserError` while another one is."""

    @abstractmethod
    def tidy(self) -> list[str]:
        """Remove what a run that was killed left half done; returns a sentence for each that is to be told."""

    @abstractmethod
    def view(self, tag: str) -> Path:
        """A checkpoint as a local folder to read from, see :mod:`fft.data.views`."""

    @abstractmethod
    def start(self, tag: str) -> None:
        """Make room for a checkpoint of which nothing is there yet."""

    @abstractmethod
    def write_tensors(
        self, tag: str, rank: int, files: Mapping[str, tuple[dict[str, Tensor], dict[str, str]]], summed: set[str]
    ) -> None:
        """Write what a rank has of a checkpoint: tensors and metadata, by the names of files.

        Checksums are kept of those that are ``summed``. Raises :class:`UserError` where that fails.
        """

    @abstractmethod
    def publish(self, tag: str, complete: Callable[[Path], list[str]]) -> None:
        """Make a checkpoint of what all ranks have written: it is one from then on, and ``latest``.

        ``complete`` gets a folder with that, or notes of it, adds what is missing, and returns the names of these
        files.
        """

    @abstractmethod
    def remove(self, tag: str) -> None:
        """Remove a checkpoint; interrupted, it leaves nothing that looks like one."""

    @abstractmethod
    def set_aside(self, tag: str) -> str:
        """Take a damaged checkpoint out of service but keep it to be looked at; returns where it is."""

    def shown(self, name: str) -> str:
        """What the user calls a file or checkpoint of this name."""
        return f"{self.name.rstrip('/')}/{name}"

    def tag_of(self, name: str) -> str:
        """The checkpoint that ``best`` or ``latest`` names; any other name is a checkpoint's own.

        Raises :class:`UserError` where the run has none of that name.
        """
        if name not in (LATEST, BEST):
            return name
        text = self.text(name)
        if text is None:
            raise UserError(f"{self.name} has no {name!r} checkpoint: name one by its step, as in step-100.")
        if folder.step_of(text.strip()) is None:
            raise UserError(f"{self.shown(name)} names no checkpoint ({text.strip()[:40]!r}): remove it.")
        return text.strip()

    def losses(self) -> dict[int, float | None]:
        """The loss of every checkpoint's evaluation by its step, None where there was none."""
        losses: dict[int, float | None] = {}
        for step in self.steps():
            # A folder of another origin is left alone.
            with contextlib.suppress(ValueError, TypeError, AttributeError, OverflowError):
                loss = json_value(self.text(f"{checkpoint_tag(step)}/{STATE}") or "").get("eval_loss")
                losses[step] = float(loss) if isinstance(loss, int | float) and not isinstance(loss, bool) else None
        return losses

    def prune(self, newest: int, best: int) -> None:
        """Remove the checkpoints that are not to be kept, after ``best`` was made to name the best of the others."""
        losses = self.losses()
        keep = kept(losses, newest, best)
        self._point_to_best({step: losses[step] for step in keep})
        for step in losses.keys() - keep:
            self.remove(checkpoint_tag(step))

    def point_again(self) -> None:
        """Have ``latest`` name the newest checkpoint and ``best`` that of the lowest loss, after some were removed."""
        steps = self.steps()
        if steps:
            self.put(LATEST, f"{checkpoint_tag(steps[-1])}\n")
        else:
            self.drop(LATEST)
        self._point_to_best(self.losses())

    def _point_to_best(self, losses: Mapping[int, float | None]) -> None:
        best = by_loss(losses)
        if best:
            self.put(BEST, f"{checkpoint_tag(best[0])}\n")
        else:
            self.drop(BEST)


class LocalRun(RunFolder):
    """A folder that all ranks see: checkpoints are written under a hidden name, and renamed when they are whole."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.path)

    @property
    def notes(self) -> Path:
        """The folder itself."""
        return self.path

    def steps(self) -> list[int]:
        """Steps of the checkpoints, oldest first."""
        return folder.checkpoint_steps(self.path)

    def text(self, name: str) -> str | None:
        """The content of a small file; None where there is none."""
        file, (first, *below) = self.path / name, Path(name).parts
        check_file(file, self.path / first if below else self.path)
        try:
            return file.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def put(self, name: str, text: str) -> None:
        """Make a small file, whole or not at all."""
        write_atomically(self.path / name, text)

    def drop(self, name: str) -> None:
        """Remove a small file, if it is there."""
        remove_file(self.path / name)

    def forget(self) -> None:
        """Remove the numbers of an older run."""
        self.drop(METRICS)
        self.drop(PICTURE)
        self.drop(SAMPLES)
        remove_path(self.path / TENSORBOARD)

    def keep(self) -> None:
        """Nothing: they are there."""

    def hold(self) -> AbstractContextManager[None]:
        """Be the one run that writes here. Raises :class:`UserError` while another one is."""
        return folder.locked(self.path)

    def tidy(self) -> list[str]:
        """Remove what a run that was killed left half done, of which nothing need be told."""
        folder.tidy(self.path)
        return []

    def view(self, tag: str) -> Path:
        """The checkpoint itself."""
        return self.path / tag

    def start(self, tag: str) -> None:
        """Make its staging folder."""
        (start_folder(self.path / tag) / folder.TRAINING).mkdir()

    def write_tensors(
        self, tag: str, rank: int, files: Mapping[str, tuple[dict[str, Tensor], dict[str, str]]], summed: set[str]
    ) -> None:
        """Write what a rank has of a checkpoint into its staging folder, down to the disk.

        Raises :class:`UserError` where that fails.
        """
        staging = staging_folder(self.path / tag)
        for name, (tensors, metadata) in files.items():
            hf.write_tensors(staging / name, tensors, metadata)
        folder.note_sums(staging, [name for name in files if name in summed], rank)

    def publish(self, tag: str, complete: Callable[[Path], list[str]]) -> None:
        """Add what is missing in the staging folder, sync everything, rename the folder, and move ``latest``."""
        staging = staging_folder(self.path / tag)
        folder.note_sums(staging, complete(staging), "rest")
        folder.publish_checkpoint(self.path, tag)

    def remove(self, tag: str) -> None:
        """Remove a checkpoint; interrupted, it leaves nothing that looks like one."""
        folder.remove(self.path / tag)

    def set_aside(self, tag: str) -> str:
        """Give a damaged checkpoint a hidden name; returns its new place."""
        return str(folder.set_aside(self.path / tag))
