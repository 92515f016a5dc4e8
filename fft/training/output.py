"""The model that a run leaves: as it is at the end, or, where a run may end early, as it was at its best."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fft.arguments import TrainArguments
from fft.checkpoint import folder, model_folder
from fft.checkpoint.run import RunFolder
from fft.checkpoint.saver import Contents
from fft.data.storage import is_url
from fft.data.views import origin, view
from fft.errors import UserError
from fft.files import end_of, hidden
from fft.parallel.groups import told_by_first
from fft.training.export import ModelExport
from fft.training.run_folder import folders


def contents_of(args: TrainArguments, export: ModelExport, run: RunFolder) -> Contents:
    """What goes into checkpoints, and how many are kept: a run that may end early needs its best one."""
    contents = export.contents(args, run)
    if not args.early_stop_patience:
        return contents
    newest = contents.newest if args.save_steps else 1
    return dataclasses.replace(contents, newest=newest, best=max(1, contents.best))


def keep_aside(output: str, export: ModelExport, state: Mapping[str, Any]) -> None:
    """Write the model beside ``output``, for a run that has no checkpoints and is at its best. Collective."""
    export.save_model(_aside(output), state)


def write_output(
    args: TrainArguments,
    export: ModelExport,
    state: Mapping[str, Any],
    lowest: float,
    control: dist.ProcessGroup,
    log: Callable[[str], None],
) -> None:
    """Write the model or adapter that was trained; with --early_stop_patience, as it was at the ``lowest`` loss.

    ``state`` is what a checkpoint of the end would say. Collective. Raises :class:`UserError` where nothing can be
    written.
    """
    output, kind = str(args.output_dir), "adapter" if args.lora_dim else "model"
    found = _best(args, output, lowest, log) if dist.get_rank() == 0 else None
    if not told_by_first(found is not None, control):  # others may not see yet what rank 0 wrote
        export.save_model(output, state)
        log(f"{kind} written to {output}")
        return
    if found is not None:
        best, which = found
        try:
            model_folder.copy_model(best, output)
        except OSError as error:
            shown = origin(best)
            raise UserError(f"{output} cannot be written ({error.strerror or error}): copy {shown} there.") from error
        model_folder.remove_model(_aside(output))
        log(f"{kind} {which}, written to {output}")
    dist.barrier()


def _best(args: TrainArguments, output: str, lowest: float, log: Callable[[str], None]) -> tuple[Path, str] | None:
    """The model at its best, where it is not to be the last, and how a sentence names it."""
    if not args.early_stop_patience:
        return None
    if not args.checkpoint:
        return view(_aside(output)), "as it was at the lowest validation loss"
    found = []
    for run in folders(args):
        if run.text(folder.BEST) is not None:
            best = run.view(run.tag_of(folder.BEST))
            found.append((folder.read_state(best)["eval_loss"], best))
    if not found:
        return None
    loss, checkpoint = min(found, key=lambda one: one[0])
    if loss > lowest:
        log(f"warning: the checkpoint of the lowest validation loss, {lowest:.4f}, is gone; the best has {loss:.4f}")
    return checkpoint, f"of {checkpoint.name}, which had the lowest validation loss"


def _aside(output: str) -> str:
    """Where the best model is, until the run ends."""
    if is_url(output):
        above, _, name = output.rstrip("/").rpartition("/")
        return f"{above}/.{name}.best"
    return str(hidden(end_of(output), "best"))
