"""Which checkpoint a run goes on from: the newest whole one, agreed upon by all ranks before anything is built."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from fft.checkpoint import folder
from fft.checkpoint.run import RunFolder
from fft.errors import UserError
from fft.parallel.groups import tell_all, told_by_first


@dataclass(frozen=True)
class Chosen:
    """A checkpoint: its name, and where it is."""

    tag: str
    run: RunFolder

    @property
    def shown(self) -> str:
        """What the user calls it."""
        return self.run.shown(self.tag)


def choose_checkpoint(
    runs: Sequence[RunFolder], resume: str, overwrite: bool, control: dist.ProcessGroup, log: Callable[[str], None]
) -> Chosen | None:
    """The checkpoint that ``resume`` means, a tag, ``best``, ``latest`` or ``auto``, verified.

    It is in the first of the ``runs``, the run's folder, or, where others are newer, in one that mirrors it. None where
    ``auto`` finds none. Collective: ranks share the reading. Damaged checkpoints are told of and set aside. Raises
    :class:`UserError` when there are checkpoints but none to go on from, or when newer ones than the one named would be
    lost.
    """
    where = " and ".join(run.name for run in runs)
    choices = _all_of(runs, control)
    tags = list(dict.fromkeys(choice.tag for choice in choices))
    resume = _named(runs, resume)
    if resume != "auto" and resume not in tags:
        raise UserError(
            f"--resume {resume}: {runs[0].shown(resume)} is no checkpoint; {where} holds: {', '.join(tags) or 'none'}."
        )
    if not tags:
        return None
    newer = tags[: tags.index(resume)] if resume != "auto" else []
    if newer and not overwrite:
        raise UserError(
            f"--resume {resume}: {where} holds newer checkpoints, which would no longer belong to the run "
            f"({', '.join(newer)}): add --overwrite to remove them, or use --resume auto."
        )
    candidates = [choice for choice in choices if resume in ("auto", choice.tag)]
    able = [choice for choice in candidates if _resumable(choice)]
    if not able:
        raise UserError(
            f"--resume {resume}: the checkpoints in {where} hold models only (--only_ckpt_model); start a new run from "
            f"their weights with --from_ckpt {runs[0].name}."
        )
    damaged = []
    for choice in able:
        own = folder.fault(choice.run.view(choice.tag), dist.get_rank(control), dist.get_world_size(control))
        found = next(filter(None, tell_all(own, control)), None)
        if found is None:
            break
        damaged.append((choice, found))
        if resume == "auto":
            log(f"warning: {found}; falling back to the checkpoint before it")
    else:
        raise UserError(f"--resume {resume}: no checkpoint of {where} is whole; {damaged[0][1]}.")
    if dist.get_rank(control) == 0:
        for bad, _ in damaged:
            log(f"warning: {bad.shown} was set aside as {bad.run.set_aside(bad.tag)}")
        for old in choices:
            if old.tag in newer:
                old.run.remove(old.tag)
    dist.barrier(control)
    return choice


def _all_of(runs: Sequence[RunFolder], control: dist.ProcessGroup) -> list[Chosen]:
    """All checkpoints, the newest first, of equal ones that of the first run; as rank 0 sees them."""
    found = told_by_first([(step, place) for place, run in enumerate(runs) for step in run.steps()], control)
    ordered = sorted(found, key=lambda one: (-one[0], one[1]))
    return [Chosen(folder.checkpoint_tag(step), runs[place]) for step, place in ordered]


def _named(runs: Sequence[RunFolder], name: str) -> str:
    """The tag that ``best`` or ``latest`` means, of all checkpoints. Raises :class:`UserError` where there is none."""
    if len(runs) == 1 or name != folder.BEST:
        return runs[0].tag_of(name)
    best = folder.by_loss({step: loss for run in runs for step, loss in run.losses().items()})
    return folder.checkpoint_tag(best[0]) if best else runs[0].tag_of(name)


def _resumable(choice: Chosen) -> bool:
    """Whether it has, or once had, a training state."""
    sums = choice.run.text(f"{choice.tag}/{folder.SUMS}")
    if sums is not None:
        return f"  {folder.TRAINING}/rank-" in sums
    return (choice.run.view(choice.tag) / folder.TRAINING).is_dir()
