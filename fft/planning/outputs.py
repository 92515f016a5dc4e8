"""Where a run writes: found out before anything is read or computed, by trying to make it."""

import os
from pathlib import Path

from fft.arguments import TrainArguments
from fft.checkpoint import places
from fft.checkpoint.folder import LOCK, checkpoint_tag, is_own_name
from fft.checkpoint.places import lies_in, parts
from fft.checkpoint.stored_run import run_at
from fft.data.blend import data_places
from fft.data.delta import split_version
from fft.data.replaceable import MODEL, check_replaceable, names_in
from fft.data.storage import is_url
from fft.data.views import origin, view
from fft.errors import UserError
from fft.planning.identity import weights_hash

#: Folder, inside a run's, of the token tables that were made of JSON lines.
TOKENS = "tokens"
#: Flags of folders that a run writes its checkpoints into.
RUN_FLAGS = ("--checkpoint", "--upload")


def check_outputs(args: TrainArguments, model: str, tokenizer: str | None) -> None:
    """Raise :class:`UserError` where --output_dir or --checkpoint cannot be made, or would replace what is needed.

    ``model`` and ``tokenizer`` are what the run starts from.
    """
    if args.upload and (not is_url(args.upload) or is_url(args.checkpoint or "")):
        raise UserError(
            f"--upload {args.upload} mirrors a --checkpoint on a disk to a store: give a path to the latter and a URL "
            "to the former."
        )
    runs = dict(zip(RUN_FLAGS, run_places(args), strict=False))
    outputs = {"--output_dir": args.output_dir, **runs} if args.output_dir else runs
    for flag, place in outputs.items():
        _check_place(flag, place)
        check_free(flag, place, args)
    for flag, run in runs.items():
        if args.output_dir and run:
            _check_apart(args.output_dir, flag, run)
    _check_replaced(args, origin(Path(model)) if is_url(args.model or args.from_ckpt or "") else model, tokenizer)
    for flag, place in outputs.items():
        check_kept(flag, place, args)


def run_places(args: TrainArguments) -> list[str]:
    """The folders that the run's checkpoints are written into, in the order of :data:`RUN_FLAGS`."""
    return [place for place in (args.checkpoint, args.upload) if place]


def check_free(flag: str, place: str, args: TrainArguments) -> None:
    """Raise :class:`UserError` where the folder of ``flag`` holds something, and nobody asked to replace it."""
    of_run = flag in RUN_FLAGS
    going_on = args.resume and (of_run or any(_written_by(run, place) for run in run_places(args)))
    if not args.overwrite and not going_on and places.holds_something(place, (LOCK, TOKENS)):
        remedy = ", add --resume auto to go on with that run," if of_run else ""
        raise UserError(f"{flag} {place} exists and is not empty: choose another folder{remedy} or add --overwrite.")


def check_kept(flag: str, place: str, args: TrainArguments) -> None:
    """Raise :class:`UserError` where the folder of ``flag`` holds what is no run's, or no model's, and would go."""
    if flag not in RUN_FLAGS:
        check_replaceable(f"{flag} {place}", place, MODEL, names_in(args.model))
    elif not args.resume:
        check_replaceable(f"{flag} {place}", place, places.CLEARED)


def _check_place(flag: str, place: str) -> None:
    """Raise :class:`UserError` where no folder can be made."""
    try:
        if places.is_a_file(place):
            raise UserError(f"{flag} {place} is a file: name a folder.")
        if not is_url(place):
            _check_link(flag, Path(place))
        lost = places.checkpoint_replaced(place) if flag == "--output_dir" else places.checkpoint_of(place)
    except OSError as error:
        raise UserError(
            f"{flag} {place} cannot be made ({error.strerror}): name a folder that this user may write to."
        ) from error
    if lost is not None:
        raise UserError(f"{flag} {place} would replace or change the checkpoint {lost}: choose another folder.")
    # A run's folder is written into, an output is made beside its place and replaces what stands there.
    places.try_place(flag, place, checkpoint_tag(0) if flag in RUN_FLAGS else "")


def _check_link(flag: str, path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{flag} {path} is a link to {os.readlink(path)}, which does not exist: make that folder, or name another."
        )
    if flag == "--output_dir" and path.is_mount():
        raise UserError(f"{flag} {path} is where a disk is mounted, which cannot be replaced: name a folder in it.")


def _check_apart(output: str, flag: str, run: str) -> None:
    """Raise :class:`UserError` where --output_dir is what the run keeps in its own folder."""
    below = parts(output)[len(parts(run)) :]
    if lies_in(output, run) and below and (below[0] == TOKENS or is_own_name(below[0])):
        raise UserError(f"--output_dir {output} is a name that the run in {flag} {run} uses: choose another.")


def _check_replaced(args: TrainArguments, model: str, tokenizer: str | None) -> None:
    """--output_dir is replaced as a whole at the end, the checkpoints of --checkpoint are removed at the start."""
    replaced = [("--output_dir", args.output_dir)] if args.output_dir else []
    if not args.resume:
        for flag, place in zip(RUN_FLAGS, run_places(args), strict=False):
            run = run_at(place)
            replaced += [(flag, run.shown(checkpoint_tag(step))) for step in run.steps()]
    weights = {"--from_ckpt" if args.from_ckpt else "--model": model, "--tokenizer": tokenizer and args.tokenizer}
    weights["--adapter_name_or_path"] = args.adapter_name_or_path
    needed = [*weights.items(), *zip(RUN_FLAGS, run_places(args), strict=False)]
    for flag in ("train_data", "eval_data"):
        tables = data_places(getattr(args, flag), flag) if getattr(args, flag) else []
        needed += [(f"--{flag}", str(split_version(path)[0])) for path in tables]
    for flag, folder in replaced:
        for reader, path in needed:
            if path is None or not lies_in(path, folder):
                continue
            # A model may be trained in place: it has been read long before it is replaced, which a store cannot do at
            # once.
            same = reader in weights and parts(path) == parts(folder)
            if not (flag == "--output_dir" and same and not is_url(folder)):
                raise UserError(f"{flag} would replace {folder} and with it {path} of {reader}: choose another folder.")


def _written_by(run: str, output: str) -> bool:
    """Whether a folder holds a model that the run has a checkpoint of: the run had ended, and is started once more."""
    if not places.holds_something(output, (LOCK, TOKENS)):
        return False
    checkpoints = run_at(run)
    own = weights_hash(view(output))
    tags = map(checkpoint_tag, reversed(checkpoints.steps()))
    return any(weights_hash(checkpoints.view(tag)) == own for tag in tags)
