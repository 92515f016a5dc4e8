"""A run folder and its checkpoints: published whole, verified before they are read, pruned, written by one run only.

``RUN/step-N/`` is a Hugging Face model directory, or an adapter in PEFT's format, with two things more: ``training/``,
which holds what a run needs to go on from there, and ``SHA256SUMS``, which ``sha256sum --check`` understands and which
covers every other file. ``RUN/latest`` names the newest, ``RUN/best`` that of the lowest validation loss. What is being
written, or was taken out of service, has a hidden name.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fft.data.model_files import check_file
from fft.data.views import noted, origin
from fft.errors import UserError
from fft.files import (
    hidden,
    is_plain,
    own_file,
    recover_folder,
    remove_file,
    remove_path,
    replace_folder,
    staging_folder,
    write_atomically,
)
from fft.json_text import json_value

SUMS = "SHA256SUMS"
LATEST, BEST = "latest", "best"
LOCK = ".lock"
#: What a run goes on from: ``state.json`` and a file of tensors per rank.
TRAINING = "training"
STATE = f"{TRAINING}/state.json"
#: The numbers of a run.
METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
#: Its losses, drawn at its end; answers that it gave on the way.
PICTURE, SAMPLES = "loss.svg", "samples.jsonl"
#: What a run's folder holds besides checkpoints.
_OWN = (LATEST, BEST, LOCK, METRICS, TENSORBOARD, PICTURE, SAMPLES, "wandb")
_OWN += ("arguments.yaml", "environment.yaml", "data.yaml")
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def checkpoint_tag(step: int) -> str:
    """Name of the checkpoint taken after ``step`` optimizer steps."""
    return f"step-{step}"


def step_of(tag: str) -> int | None:
    """The step of a checkpoint of this name; None for another name."""
    number = tag.removeprefix("step-")
    return int(number) if number != tag and number.isdigit() else None


def checkpoint_steps(run: str | os.PathLike) -> list[int]:
    """Steps of the checkpoints in a run folder, oldest first."""
    found = (p for p in Path(run).glob("step-*") if (p / "config.json").is_file() or (p / SUMS).is_file())
    return sorted(step for p in found if (step := step_of(p.name)) is not None)


def is_own_name(name: str) -> bool:
    """Whether a run's folder has, or may get, something of this name."""
    return name.removeprefix(".").startswith("step-") or name in _OWN


def read_state(checkpoint: Path) -> dict:
    """What ``training/state.json`` says. Raises :class:`UserError` when it cannot be read."""
    check_file(checkpoint / STATE, checkpoint)
    try:
        return dict(json_value((checkpoint / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint / STATE} cannot be read ({error}): choose another checkpoint.") from error


def to_json(state: Mapping[str, object]) -> str:
    """The text of ``training/state.json``."""
    return json.dumps(state, indent=1)


def note_sums(staging: Path, names: Iterable[str], writer: int | str) -> None:
    """Leave the checksums of the files that ``writer``, a rank, wrote, for :func:`publish_checkpoint`."""
    lines = []
    for name in names:
        lines.append(f"{digest(staging / name)}  {name}\n")
    write_atomically(staging / f"{SUMS}.{writer}", "".join(lines))


def digest(file: Path) -> str:
    """The SHA-256 of a file, here or noted as a store's. Raises :class:`OSError`, of a store :class:`UserError`."""
    stored, found = noted(file), hashlib.sha256()
    if stored is None:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    for piece in stored.chunks():
        found.update(piece)
    return found.hexdigest()


def gather_sums(staging: Path) -> None:
    """Make one file of the checksums that ranks have left."""
    lists = sorted(staging.glob(f"{SUMS}.*"))
    lines = sorted(
        (line for file in lists for line in file.read_text(encoding="utf-8").splitlines()), key=lambda line: line[66:]
    )
    write_atomically(staging / SUMS, "".join(f"{line}\n" for line in lines))
    for file in lists:
        remove_file(file)


def fault(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """Say what is wrong with a checkpoint's files, or with every ``shares``-th from ``share`` on; None if nothing.

    Reads them: ranks share the work.
    """
    if (wrong := _wrong_name(checkpoint, SUMS)) is not None:
        return wrong
    try:
        text = (checkpoint / SUMS).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"{origin(checkpoint / SUMS)} cannot be read ({error.strerror})"
    lines = [found for line in text.splitlines() if (found := _LINE.fullmatch(line)) is not None]
    if len(lines) < len(text.splitlines()) or not text.endswith("\n"):
        return f"{origin(checkpoint / SUMS)} is no list of checksums"
    sums = {line[2]: line[1] for line in lines}
    written = [p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*.safetensors*")]
    config = "adapter_config.json" if "adapter_model.safetensors" in sums else "config.json"
    unlisted = sorted({*written, config, STATE} - set(sums))
    if unlisted:
        return f"{origin(checkpoint / unlisted[0])} is missing from {SUMS}"
    for name in sorted(sums)[share::shares]:
        if (wrong := _wrong_name(checkpoint, name)) is not None:
            return wrong
        try:
            found = digest(checkpoint / name)
        except (OSError, UserError) as error:
            return f"{origin(checkpoint / name)} cannot be read ({getattr(error, 'strerror', None) or error})"
        if found != sums[name]:
            return f"{origin(checkpoint / name)} is not what was written: its checksum differs from that in {SUMS}"
    return None


def _wrong_name(checkpoint: Path, name: str) -> str | None:
    """What is wrong with a name in a list of checksums, as those of strangers' folders may have."""
    file = checkpoint / name
    if not all(map(is_plain, name.split("/"))):
        return f"{origin(checkpoint / SUMS)} names {name!r}, which is no file of a checkpoint"
    if file.exists() and not (file.is_file() and file.resolve().is_relative_to(checkpoint.resolve())):
        return f"{origin(file)} is no file of its checkpoint, but a link out of it, a pipe or a folder"
    return None


def publish_checkpoint(run: Path, tag: str) -> None:
    """Give a whole checkpoint, in its staging folder, its name, then let ``latest`` point to it."""
    gather_sums(staging_folder(run / tag))
    replace_folder(run / tag)
    write_atomically(run / LATEST, f"{tag}\n")


def kept(losses: Mapping[int, float | None], newest: int, best: int) -> set[int]:
    """Steps of the checkpoints to keep: the ``newest`` (0: all), and the ``best`` by evaluation loss.

    ``losses`` has the loss of every checkpoint's evaluation, None where there was none.
    """
    steps = sorted(losses)
    return set(steps[-newest:] if newest else steps) | set(by_loss(losses)[:best])


def by_loss(losses: Mapping[int, float | None]) -> list[int]:
    """Steps of checkpoints that were evaluated, the lowest loss first; of equal ones the newest."""
    evaluated = sorted((loss, -step) for step, loss in losses.items() if loss is not None and not math.isnan(loss))
    return [-step for _, step in evaluated]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; interrupted, it leaves nothing that looks like one."""
    removed = hidden(checkpoint, "removed")
    remove_path(removed)
    os.replace(checkpoint, removed)
    remove_path(removed)


def set_aside(checkpoint: Path) -> Path:
    """Take a damaged checkpoint out of service but keep it to be looked at; returns its new place."""
    bad = hidden(checkpoint, "bad")
    remove_path(bad)
    os.replace(checkpoint, bad)
    return bad


def tidy(run: Path) -> None:
    """Remove what a run that was killed left half done."""
    for left in run.glob(".step-*.old"):
        recover_folder(left.with_name(left.name.removeprefix(".").removesuffix(".old")))
    for mark in ("writing", "removed"):
        for left in run.glob(f".step-*.{mark}"):
            remove_path(left)
    for left in run.glob(".*.*.writing"):  # a file that was being written, under a name that no other try has
        if left.name.rsplit(".", 2)[0].removeprefix(".") in _OWN and not left.is_dir():
            remove_file(left)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder, at most until the process ends. Raises :class:`UserError` when another process holds it."""
    run.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            lock = own_file(run / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise UserError(f"--checkpoint {run} cannot be locked by {run / LOCK}: {error.strerror}.") from error
        stream = held.enter_context(os.fdopen(lock, "a+", encoding="utf-8"))
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise UserError(
                f"--checkpoint {run} is in use by another run ({stream.read().strip()}): wait for its end or choose "
                "another folder."
            ) from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield
