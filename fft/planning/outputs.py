"""Where a run writes: found out before anything is read or computed, by trying to make it."""

import os
from pathlib import Path

from fft.arguments import TrainArguments
from fft.checkpoint.folder import (
    LOCK,
    checkpoint_of,
    checkpoint_replaced,
    checkpoint_steps,
    checkpoint_tag,
    is_own_name,
)
from fft.data.blend import parse_tables
from fft.data.delta import split_version
from fft.errors import UserError
from fft.files import try_folder
from fft.planning.identity import weights_hash

#: Folder, inside a run's, of the token tables that were made of JSON lines.
TOKENS = "tokens"


def check_outputs(args: TrainArguments, model: str, tokenizer: str | None) -> None:
    """Raise :class:`UserError` where --output_dir or --checkpoint cannot be made, or would replace what is needed.

    ``model`` and ``tokenizer`` are what the run starts from.
    """
    for flag, path in (("--output_dir", args.output_dir), ("--checkpoint", args.checkpoint)):
        if path:
            try:
                _check_place(flag, Path(path))
            except OSError as error:
                raise UserError(
                    f"{flag} {path} cannot be made ({error.strerror}): name a folder that this user may write to."
                ) from error
            check_free(flag, Path(path), args)
    if args.output_dir and args.checkpoint:
        _check_apart(Path(args.output_dir), Path(args.checkpoint))
    _check_replaced(args, model, tokenizer)


def check_free(flag: str, path: Path, args: TrainArguments) -> None:
    """Raise :class:`UserError` where the folder of ``flag`` holds something, and nobody asked to replace it."""
    going_on = args.resume and (flag == "--checkpoint" or _written_by(Path(args.checkpoint or ""), path))
    if not args.overwrite and not going_on and _holds_something(path):
        remedy = ", add --resume auto to go on with that run," if flag == "--checkpoint" else ""
        raise UserError(f"{flag} {path} exists and is not empty: choose another folder{remedy} or add --overwrite.")


def _check_place(flag: str, path: Path) -> None:
    """Raise :class:`UserError`, or the system's error, where no folder can be made."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{flag} {path} is a file: name a folder.")
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{flag} {path} is a link to {os.readlink(path)}, which does not exist: make that folder, or name another."
        )
    if flag == "--output_dir" and path.is_mount():
        raise UserError(f"{flag} {path} is where a disk is mounted, which cannot be replaced: name a folder in it.")
    lost = checkpoint_replaced(path) if flag == "--output_dir" else checkpoint_of(path)
    if lost is not None:
        raise UserError(f"{flag} {path} would replace or change the checkpoint {lost}: choose another folder.")
    # A run's folder is written into, an output is made beside its place and replaces what stands there.
    try_folder(path / checkpoint_tag(0) if flag == "--checkpoint" else path)


def _check_apart(output: Path, run: Path) -> None:
    """Raise :class:`UserError` where --output_dir is what the run keeps in its own folder."""
    output_parts, run_parts = output.resolve().parts, run.resolve().parts
    inside, below = output_parts[: len(run_parts)] == run_parts, output_parts[len(run_parts) :]
    if inside and below and (below[0] == TOKENS or is_own_name(below[0])):
        raise UserError(f"--output_dir {output} is a name that the run in --checkpoint {run} uses: choose another.")


def _check_replaced(args: TrainArguments, model: str, tokenizer: str | None) -> None:
    """--output_dir is replaced as a whole at the end, the checkpoints of --checkpoint are removed at the start."""
    replaced = [("--output_dir", args.output_dir)] if args.output_dir else []
    if args.checkpoint and not args.resume:
        run = Path(args.checkpoint)
        replaced += [("--checkpoint", str(run / checkpoint_tag(step))) for step in checkpoint_steps(run)]
    weights = {"--from_ckpt" if args.from_ckpt else "--model": model, "--tokenizer": tokenizer}
    needed = [*weights.items(), ("--checkpoint", args.checkpoint)]
    for flag in ("train_data", "eval_data"):
        tables = parse_tables(getattr(args, flag), flag) if getattr(args, flag) else []
        needed += [(f"--{flag}", split_version(path)[0]) for path, _ in tables]
    for flag, folder in replaced:
        for reader, path in needed:
            if path is None or not Path(path).resolve().is_relative_to(Path(folder).resolve()):
                continue
            # A model may be trained in place: it has been read long before it is replaced.
            in_place = flag == "--output_dir" and reader in weights and Path(path).resolve() == Path(folder).resolve()
            if not in_place:
                raise UserError(f"{flag} would replace {folder} and with it {path} of {reader}: choose another folder.")


def _written_by(run: Path, output: Path) -> bool:
    """Whether a folder holds a model that the run has a checkpoint of: the run had ended, and is started once more."""
    if not _holds_something(output):
        return False
    checkpoints = (run / checkpoint_tag(step) for step in reversed(checkpoint_steps(run)))
    own = weights_hash(output)
    return any(weights_hash(checkpoint) == own for checkpoint in checkpoints)


def _holds_something(folder: Path) -> bool:
    """Whether there is more than the lock and the token tables of a run that ended before it began."""
    return folder.is_dir() and any(path.name not in (LOCK, TOKENS) for path in folder.iterdir())
