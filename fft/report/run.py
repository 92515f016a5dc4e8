"""What a run folder says of its run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from fft.chart import Picture, losses
from fft.checkpoint import folder
from fft.checkpoint.run import LocalRun
from fft.errors import UserError, one_line
from fft.train_arguments import TrainArguments
from fft.training.metric_sinks import read_numbers


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is there: its step, loss of the last evaluation, and bytes."""

    step: int
    eval_loss: float | None
    size: int


@dataclass(frozen=True)
class Run:
    """A run: its numbers by name and step, and what its folder holds besides.

    ``unread`` are lines of the numbers that are none. ``planned`` is what ``--dry_run`` would say of its layout, or why
    it cannot.
    """

    name: str
    numbers: Mapping[str, Mapping[int, float]]
    unread: int
    arguments: Mapping[str, Any]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    checkpoints: tuple[Checkpoint, ...]
    planned: str

    def plot(self) -> Picture:
        """Losses by step."""
        return Picture(losses(self.points("loss"), self.points("eval_loss")))

    def points(self, name: str) -> list[tuple[float, float]]:
        """What is known of a number, by step, if it is finite."""
        return sorted((step, value) for step, value in self.numbers.get(name, {}).items() if math.isfinite(value))

    def last(self, name: str) -> float | None:
        """The last of a number that is known."""
        points = self.points(name)
        return points[-1][1] if points else None

    @property
    def steps(self) -> int:
        """Steps that were taken."""
        return max(self.numbers.get("loss", {0: 0.0}))

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Settings that are not the default: name to the default, and theirs."""
        defaults = {field.name: field.default for field in fields(TrainArguments)}
        given = {name: (defaults.get(name), value) for name, value in self.arguments.items()}
        return {name: pair for name, pair in given.items() if pair[0] != pair[1]}


def read_run(path: Path) -> Run:
    """The run of a folder that ``--checkpoint`` named.

    Raises :class:`UserError` for a folder that is none, and for a file in it that cannot be read.
    """
    numbers, unread = read_numbers(path)
    arguments, data, environment = (_settings(path / f"{name}.yaml") for name in ("arguments", "data", "environment"))
    steps = folder.checkpoint_steps(path)
    losses = LocalRun(path).losses()
    checkpoints = [Checkpoint(step, losses.get(step), _size(path / folder.checkpoint_tag(step))) for step in steps]
    planned = _plan(arguments, environment, path / folder.checkpoint_tag(steps[-1]) if steps else None)
    return Run(path.name or str(path), numbers, unread, arguments, data, environment, tuple(checkpoints), planned)


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no settings: it is no file of a run.")
    return found


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _plan(arguments: Mapping[str, Any], environment: Mapping[str, Any], checkpoint: Path | None) -> str:
    """The layout in words, by the checkpoint's config: the model that was begun with may be gone."""
    from fft.planning.dry_run import planned

    ranks = len(environment.get("ranks") or {0: ""})
    known = {field.name for field in fields(TrainArguments)}
    given = {name: value for name, value in arguments.items() if name in known}
    if "model" not in given:
        return "not known: the folder has no arguments.yaml"
    try:
        args = TrainArguments(**given)
        return planned(replace(args, model=str(checkpoint)) if checkpoint is not None else args, ranks)[1]
    except UserError as error:
        return f"not known: {error}"
