"""What all ranks of a run have in common, compared before its first step, and what a run has with what it goes on from.

Ranks that disagree would train ids and labels of different rows together, or average the gradients of different models,
and nothing would look wrong.
"""

import dataclasses
import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

import fft
from fft.arguments import TrainArguments
from fft.errors import UserError
from fft.parallel.groups import tell_all
from fft.planning.identity import IDENTITY, differences

#: What computes a run; the same numbers need the same of each.
VERSIONS = ("torch", "deepspeed", "transformers")


def check_same_run(args: TrainArguments, identity: dict, control: dist.ProcessGroup) -> None:
    """Compare arguments, versions, model and data of all ranks.

    Collective. Raises :class:`UserError` on all ranks, which names the first that differs, and in what.
    """
    facts = _facts(args, identity)
    digests = tell_all(hashlib.sha256(json.dumps(facts).encode()).hexdigest(), control)
    if len(set(digests)) == 1:
        return
    every, hosts = tell_all(facts, control), tell_all(socket.gethostname(), control)
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    name, first, own = next(_unequal(every[0], every[other]))
    if name in ("train_data", "eval_data"):
        raise UserError(
            f"--train_data or --eval_data of rank {other} is not that of rank 0: give all machines the same files, or "
            "a folder that they share."
        )
    raise UserError(
        f"rank {other} (on {hosts[other]}) is not of the same run as rank 0 (on {hosts[0]}): its {name} is {own}, that "
        f"of rank 0 {first}; give all ranks the same command, files and versions."
    )


def check_resumed(
    args: TrainArguments, before: dict | None, now: dict, checkpoint: str, log: Callable[[str], None]
) -> None:
    """Compare what is trained with what was when ``checkpoint`` was written, ``before``; None: nobody noted it.

    Raises :class:`UserError` for another model, other data to train on, and, where it decides what is kept or when the
    run ends, other data to evaluate on. What matters less is told.
    """
    if before is None:
        log(f"warning: {checkpoint} does not say which model it was trained from: make sure that it is the same")
        return
    read = {"weights": args.model, "adapter": args.adapter_name_or_path}
    output = args.output_dir and Path(args.output_dir).resolve()
    in_place = {what for what, place in read.items() if output and place and output == Path(place).resolve()}
    for name, was, is_ in differences(before, now):
        what, _, entry = name.partition(".")
        if (what == "eval_data" and not (args.best_of or args.early_stop_patience)) or what == "tokenizer":
            log(f"warning: --{what} is not what it was in {checkpoint}")
        elif what == "config":
            raise UserError(
                f"--resume: {entry} is {is_} in the config of the model, {checkpoint} was trained with {was}: give the "
                "--model that the run began with."
            )
        elif what == "adapter" and what not in in_place:
            raise UserError(
                f"--resume: --adapter_name_or_path is not the adapter that the run of {checkpoint} began with: give "
                "that one, or none where it began with none."
            )
        elif what == "weights" and what not in in_place:  # else they may be what this run wrote
            raise UserError(
                f"--resume: the weights of the model are not those that the run of {checkpoint} began with: give the "
                "--model that it began with."
            )
        elif what == "train_data":
            raise UserError(f"--resume: --train_data holds other rows than when {checkpoint} was written.")
        elif what == "eval_data":
            raise UserError(
                f"--resume: --eval_data is not what it was in {checkpoint}, and losses on it decide what is kept "
                "(--best_of, --early_stop_patience): give the table that the run began with."
            )


def _facts(args: TrainArguments, identity: dict) -> dict[str, Any]:
    versions = {f"version of {name}": version(name) for name in VERSIONS}
    flags = {f"--{name}": value for name, value in dataclasses.asdict(args).items()}
    return flags | versions | {"version of flash-fine-tuning": fft.__version__} | identity


def _unequal(first: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, object, object]]:
    for name in first:
        if name not in IDENTITY and first[name] != other[name]:
            yield name, first[name], other[name]
    yield from differences(first, other)
