"""A model directory that replaces what stands in its place: on a disk at once, in a store file by file.

In a store an older one goes first, and ``config.json``, without which none is a model, comes last.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from fft.checkpoint.folder import SUMS, TRAINING
from fft.checkpoint.stored_run import reported, send_completed
from fft.data.owner import atomic_folder
from fft.data.storage import Storage, is_url
from fft.data.views import pieces, send, view_of
from fft.files import end_of, new_file, remove_path, staging_folder
from fft.weights import hf
from fft.weights.in_store import write_tensors_to


@contextmanager
def replaced(output: str) -> Iterator[None]:
    """Around what makes the directory ``output``: :func:`write_model_shard` of all ranks, then :func:`finish` of one.

    One process has it around. Waits while another one writes to the same local folder. Raises :class:`UserError` where
    a store fails.
    """
    if is_url(output):
        with reported(output):
            Storage.at(output).delete_folder()
        yield
    else:
        with atomic_folder(output, wait=True):
            yield


def write_model_shard(output: str, tensors: dict[str, Tensor], shard: int, shards: int) -> None:
    """Write shard ``shard`` of ``shards``, counted from 0. Raises :class:`UserError` when it cannot be written."""
    if is_url(output):
        write_tensors_to(Storage.at(output), hf.shard_name(shard, shards), tensors, {"format": "pt"})
    else:
        hf.write_shard(staging_folder(end_of(output)), tensors, shard, shards)


def finish(output: str, complete: Callable[[Path], list[str]]) -> None:
    """Add what ``complete`` adds to the shards, of which it gets a folder; it returns the names of these files.

    Raises :class:`UserError` where a store fails.
    """
    if not is_url(output):
        complete(staging_folder(end_of(output)))
        return
    place = Storage.at(output)
    with tempfile.TemporaryDirectory(prefix="fft-model-") as scratch, reported(output):
        send_completed(place, view_of(place, Path(scratch) / "model"), complete)


@contextmanager
def staged(output: str) -> Iterator[Path]:
    """A local folder to be filled, which becomes the directory ``output`` at the end of the ``with`` block.

    Raises :class:`OSError` where it cannot be made, and :class:`UserError` where a store fails.
    """
    if not is_url(output):
        with atomic_folder(output) as staging:
            yield staging
        return
    with tempfile.TemporaryDirectory(prefix="fft-model-") as scratch:
        yield Path(scratch)
        _send_all(Path(scratch), output, {file for file in Path(scratch).rglob("*") if file.is_file()})


def copy_model(checkpoint: Path, output: str) -> None:
    """Make the model or adapter directory ``output`` of a checkpoint's; replaces what stands there.

    Raises :class:`OSError` where it cannot be made, and :class:`UserError` where a store fails.
    """
    leave = {checkpoint / SUMS, *(checkpoint / TRAINING).rglob("*")}
    files = {file for file in checkpoint.rglob("*") if file.is_file() and not file.name.startswith(".")} - leave
    if is_url(output):
        _send_all(checkpoint, output, files)
        return
    with atomic_folder(output, wait=True) as staging:
        for file in files:
            copy = staging / file.relative_to(checkpoint)
            copy.parent.mkdir(parents=True, exist_ok=True)
            with open(new_file(copy), "wb") as stream:
                stream.writelines(pieces(file))


def remove_model(output: str) -> None:
    """Remove a model directory, if it is there. Raises :class:`UserError` where a store fails."""
    if is_url(output):
        with reported(output):
            Storage.at(output).delete_folder()
    else:
        with suppress(OSError):
            remove_path(end_of(output))


def _send_all(folder: Path, output: str, files: set[Path]) -> None:
    place = Storage.at(output)
    with reported(output):
        place.delete_folder()
        for file in sorted(files, key=lambda file: (file.name == hf.CONFIG, file)):
            send(file, place, file.relative_to(folder).as_posix())
