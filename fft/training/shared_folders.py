"""Folders that several ranks write to, or read from, are one and the same for all of them: tried before a run begins.

A folder of the same path on another machine's own disk looks right until a checkpoint lacks half of its files, or the
model of a run that has ended is nowhere.
"""

import contextlib
import os
import socket
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

from fft.arguments import TrainArguments
from fft.data.storage import is_url
from fft.errors import UserError
from fft.files import nearest_folder, remove_file
from fft.parallel.groups import tell_all, told_by_first
from fft.parallel.mesh import MeshSizes
from fft.parallel.role import StageRole

#: Seconds after which a file of another machine has to be seen, and between two looks.
_PATIENCE, _AGAIN = 5.0, 0.1


def check_shared(args: TrainArguments, mesh: MeshSizes, control: dist.ProcessGroup) -> None:
    """Find out whether all ranks that need --checkpoint and --output_dir see the folder that rank 0 sees.

    Collective. Raises :class:`UserError` on all ranks, which names the flag and the first rank that does not.
    """
    places = {"--checkpoint": args.checkpoint, "--output_dir": args.output_dir}
    places = {flag: place for flag, place in places.items() if place and not is_url(place)}
    if not places or dist.get_world_size() == 1:
        return
    writes = StageRole.of(mesh, dist.get_rank()).writes
    needed = {"--checkpoint": writes or bool(args.resume) or not args.only_ckpt_model, "--output_dir": writes}
    with contextlib.ExitStack() as held:
        own = {flag: _mark(place, held) for flag, place in places.items()} if dist.get_rank() == 0 else {}
        marks = told_by_first(own, control)
        lacks = [flag for flag, mark in marks.items() if needed[flag] and not _seen(Path(mark))]
        found = tell_all([socket.gethostname(), lacks], control)
    for rank, (host, flags) in enumerate(found):
        for flag in flags:
            raise UserError(
                f"{flag} {places[flag]}: rank {rank} (on {host}) does not see what rank 0 (on {found[0][0]}) writes "
                "there: give a folder that all machines share, or a URL of a store (s3://...)."
            )


def _mark(place: str, held: contextlib.ExitStack) -> str:
    """A file where the folder is, or would be made; it goes again with ``held``."""
    folder = nearest_folder(place)
    # Relative as it was given: ranks of other machines, or in other folders, see it from where they are.
    folder = folder if Path(place).is_absolute() else Path(os.path.relpath(folder))
    number, name = tempfile.mkstemp(prefix=".", suffix=".shared", dir=folder)
    os.close(number)
    held.callback(remove_file, name)
    return str(folder / Path(name).name)


def _seen(mark: Path) -> bool:
    """Whether a file is there, or comes within some seconds: folders of a network may tell of it late."""
    deadline = time.monotonic() + _PATIENCE
    while not mark.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_AGAIN)
    return True
