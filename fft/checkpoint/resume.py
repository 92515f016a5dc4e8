"""Which checkpoint a run goes on from: the newest whole one, agreed upon by all ranks before anything is built."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from fft.checkpoint import folder
from fft.errors import UserError


def choose_checkpoint(
    run: Path, resume: str, overwrite: bool, control: dist.ProcessGroup, log: Callable[[str], None]
) -> Path | None:
    """The checkpoint in ``run`` that ``resume`` means, a tag, ``best``, ``latest`` or ``auto``, verified.

    None where ``auto`` finds none. Ranks share the reading. Damaged checkpoints are told of and set aside. Raises
    :class:`UserError` when there are checkpoints but none to go on from, or when newer ones than the one named would be
    lost.
    """
    steps = folder.checkpoint_steps(run)
    tags = [folder.checkpoint_tag(step) for step in reversed(steps)]
    resume = folder.tag_of(run, resume)
    if resume != "auto" and resume not in tags:
        raise UserError(
            f"--resume {resume}: {run / resume} is no checkpoint; {run} holds: {', '.join(tags) or 'none'}."
        )
    if not tags:
        return None
    newer = tags[: tags.index(resume)] if resume != "auto" else []
    if newer and not overwrite:
        raise UserError(
            f"--resume {resume}: {run} holds newer checkpoints, which would no longer belong to the run "
            f"({', '.join(newer)}): add --overwrite to remove them, or use --resume auto."
        )
    candidates = [run / tag for tag in (tags if resume == "auto" else [resume])]
    able = [path for path in candidates if _resumable(path)]
    if not able:
        raise UserError(
            f"--resume {resume}: the checkpoints in {run} hold models only (--only_ckpt_model); start a new run from "
            f"their weights with --from_ckpt {run}."
        )
    damaged = []
    for checkpoint in able:
        faults: list[str | None] = [None] * dist.get_world_size(control)
        own = folder.fault(checkpoint, dist.get_rank(control), dist.get_world_size(control))
        dist.all_gather_object(faults, own, group=control)
        found = next(filter(None, faults), None)
        if found is None:
            break
        damaged.append((checkpoint, found))
        if resume == "auto":
            log(f"warning: {found}; falling back to the checkpoint before it")
    else:
        raise UserError(f"--resume {resume}: no checkpoint of {run} is whole; {damaged[0][1]}.")
    if dist.get_rank(control) == 0:
        for path, _ in damaged:
            log(f"warning: {path} was set aside as {folder.set_aside(path)}")
        for tag in newer:
            folder.remove(run / tag)
    dist.barrier(control)
    return checkpoint


def _resumable(checkpoint: Path) -> bool:
    """Whether it has, or once had, a training state."""
    sums = checkpoint / folder.SUMS
    try:
        return f"  {folder.TRAINING}/rank-" in sums.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return (checkpoint / folder.TRAINING).is_dir()
