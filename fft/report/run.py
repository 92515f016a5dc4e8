"""What a run folder says of its run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from fft.arguments import resolve
from fft.chart import Picture, losses
from fft.checkpoint import folder
from fft.checkpoint.folder import METRICS, read_state
from fft.checkpoint.run import LocalRun
from fft.data.model_files import check_file
from fft.errors import UserError, one_line
from fft.json_text import small_text
from fft.planning.image_load import SHARE
from fft.train_arguments import TrainArguments
from fft.training.metric_sinks import read_numbers
from fft.yaml_text import yaml_value

#: What a folder says of its run beside numbers; which types settings have.
_FACTS = ("arguments.yaml", "data.yaml", "environment.yaml")
_KINDS = get_type_hints(TrainArguments)


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
    for name in (METRICS, *_FACTS):
        check_file(path / name, path)
    numbers, unread = read_numbers(path)
    arguments, data, environment = (_settings(path / name) for name in _FACTS)
    steps = folder.checkpoint_steps(path)
    losses = LocalRun(path).losses()
    checkpoints = [Checkpoint(step, losses.get(step), _size(path / folder.checkpoint_tag(step))) for step in steps]
    planned = _plan(arguments, environment, path / folder.checkpoint_tag(steps[-1]) if steps else None)
    return Run(path.name or str(path), numbers, unread, arguments, data, environment, tuple(checkpoints), planned)


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = yaml_value(small_text(file)) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}).") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{file} holds no settings: it is no file of a run.")
    return found


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _plan(arguments: Mapping[str, Any], environment: Mapping[str, Any], checkpoint: Path | None) -> str:
    """The layout in words, by the checkpoint's config and what it says of images: the folder may be a stranger's, whose
    settings name a model and tables anywhere."""
    from fft.planning.dry_run import planned

    if checkpoint is None:
        return "known with the first checkpoint"
    told = environment.get("ranks")
    given = {name: arguments[name] for name in _KINDS if name in arguments}
    if "model" not in given:
        return "not known: the folder has no arguments.yaml"
    if not all(isinstance(value, _KINDS[name]) for name, value in given.items()):
        return "not known: arguments.yaml has settings of other types"
    try:
        if read_state(checkpoint).get("images") is True and given.get("image_tokens") is None:
            given["image_tokens"] = SHARE
        own = {"model": str(checkpoint), "from_ckpt": None, "train_data": None, "dry_run": True}
        return planned(resolve(given | own), len(told) if isinstance(told, dict) and told else 1)[1]
    except UserError as error:
        return f"not known: {error}"
