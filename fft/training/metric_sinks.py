"""Where a run's numbers go: ``metrics.jsonl``, which must not fail, and TensorBoard, MLflow and Weights & Biases, which
may.

A sink has two methods, ``write(step, values)`` and ``close(well)``. Only rank 0 has sinks.
"""

import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from fft.checkpoint.card import perplexity
from fft.checkpoint.folder import METRICS, TENSORBOARD
from fft.errors import UserError, one_line
from fft.files import own_file, own_folder
from fft.json_text import json_value, small_text
from fft.training.mlflow_sink import MLflow, RunFacts
from fft.training.wandb_sink import WeightsAndBiases

#: TensorBoard's groups; what is in none of these is a number of training.
_GROUPS = dict.fromkeys(("eval_loss", "eval_tokens", "eval_pairs", "perplexity"), "evaluation")
_GROUPS |= {f"eval_rewards/{name}": "evaluation" for name in ("chosen", "rejected", "margins", "accuracies")}
_GROUPS |= dict.fromkeys(("tokens_per_second", "tokens_per_second_per_device", "mfu", "mfu_datasheet"), "speed")
_GROUPS |= dict.fromkeys(("data_wait", "memory", "seconds", "save_seconds", "pipeline_bubble"), "speed")
_GROUPS |= dict.fromkeys(("matrix_flops_per_second", "datasheet_flops_per_second"), "speed")
_GROUPS |= dict.fromkeys(("slowest_rank", "slowest_rank_seconds", "fastest_rank_seconds"), "speed")
_GROUPS |= dict.fromkeys(("rank_behind", "rank_behind_times"), "speed")


#: More steps than a run has, which floats still tell apart.
_STEPS = 1 << 53
#: Bytes of numbers that are read: of a million steps.
_LONGEST = 1 << 30
#: What the loss of a named evaluation is called.
_NAMED_LOSS = re.compile("eval/([^/]+)/loss")
#: And those of datasets: of the first table, and of a named one.
_DATASET_LOSS = re.compile("(?:eval_loss|eval/([^/]+)/loss)/([^/]+)")
#: And those of datasets that are trained on.
_TRAINED_LOSS = re.compile("loss/([^/]+)")
#: Servers take letters, digits and these in names, and so many of them.
_UNSAFE, _LONGEST_NAME = re.compile(r"[^\w .-]"), 200


def loss_name(name: str) -> str:
    """What the loss of a named evaluation is called among a run's numbers."""
    return f"eval/{name}/loss"


def named_in(numbers: Iterable[str]) -> list[str]:
    """The evaluations whose losses are among numbers of these names, in their order."""
    return [match[1] for number in numbers if (match := _NAMED_LOSS.fullmatch(number))]


def dataset_keys(names: Iterable[str]) -> list[str]:
    """What datasets of these names are called among numbers, each as no other."""
    keys: list[str] = []
    for name in names:
        key = _UNSAFE.sub("_", name)[:_LONGEST_NAME]
        while key in keys:
            key += "_"
        keys.append(key)
    return keys


def by_dataset_in(numbers: Iterable[str]) -> dict[str, dict[str, str]]:
    """By table and dataset the names, among a run's, of numbers that are a dataset's loss; a table without a name has
    an empty one. The first of several tables, whose losses stand there twice, is under its name alone.
    """
    found: dict[str, dict[str, str]] = {}
    for number in numbers:
        if (match := _DATASET_LOSS.fullmatch(number)) is not None:
            found.setdefault(match[1] or "", {})[match[2]] = number
    return {table: own for table, own in found.items() if table or len(found) == 1}


def trained_by_dataset(numbers: Iterable[str]) -> dict[str, str]:
    """By dataset that is trained on the names, among a run's, of numbers that are its loss."""
    return {match[1]: number for number in numbers if (match := _TRAINED_LOSS.fullmatch(number)) is not None}


def evaluation_numbers(
    found: Mapping[str, tuple[float, int, Mapping[str, float], Mapping[str, tuple[float, int]]]],
) -> dict[str, float]:
    """The numbers of evaluations by name: mean losses over tokens or, where there are measures of these, pairs.

    Of the first ``eval_loss`` and the like; of all that have a name ``eval/NAME/loss`` and the like; of their datasets
    ``eval_loss/DATASET`` and the like.
    """
    numbers: dict[str, float] = {}
    for place, (name, (loss, count, measures, datasets)) in enumerate(found.items()):
        unit = "pairs" if measures else "tokens"
        own = {"loss": loss, unit: count, **measures}
        for dataset, (its_loss, held) in datasets.items():
            own |= {f"loss/{dataset}": its_loss, f"{unit}/{dataset}": held}
        if not place:
            numbers |= {f"eval_{key}": value for key, value in own.items()}
        if name:
            if not measures and math.isfinite(likelihood := perplexity(loss)):
                own["perplexity"] = likelihood
            numbers |= {f"eval/{name}/{key}": value for key, value in own.items()}
    return numbers


class Sink(Protocol):
    """Takes numbers."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step."""

    def close(self, well: bool) -> None:
        """The run has ended, well or not."""


class JsonLines:
    """A line a record. Raises :class:`UserError` where it cannot be written: checkpoints would not fit it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, step: int, values: Mapping[str, float | list[float]]) -> None:
        """Append a line; whoever kills the run then finds it written."""
        try:
            with open(own_file(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error.strerror}): mend that and add --resume auto."
            ) from error

    def close(self, well: bool) -> None:
        """Nothing is open."""


def read_numbers(path: Path) -> tuple[dict[str, dict[int, float]], int]:
    """The numbers in a run's folder by name and step, and how many lines are none; of a step that was taken again the
    later one. What every rank has one of is ``name/rank``.

    Raises :class:`UserError` where there are none, and where they cannot be read.
    """
    file = path / METRICS
    try:
        lines = small_text(file, _LONGEST).splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is no run: it has no {METRICS}. Give a folder that --checkpoint named.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}).") from error
    numbers: dict[str, dict[int, float]] = {}
    unread = 0
    for line in lines:
        try:
            told = json_value(line)
            step = told.pop("step")
            if not isinstance(step, int) or not 0 <= step < _STEPS:
                raise ValueError(f"{step!r} is no step")
            for name, value in told.items():
                several = {f"{name}/{rank}": one for rank, one in enumerate(value)} if isinstance(value, list) else {}
                for full, one in (several or {name: value}).items():
                    numbers.setdefault(full, {})[step] = float(one)
        except (ValueError, TypeError, KeyError, AttributeError):  # a run that was killed may leave half a line
            unread += 1
    return numbers, unread


class TensorBoard:
    """Event files, whose tags are in groups. What a run that is resumed had written beyond ``step`` is not shown any
    more.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        own_folder(folder)
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None, flush_secs=30)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A scalar each."""
        for name, value in values.items():
            # Those of named evaluations have groups in their names.
            group = _GROUPS.get(name) or _GROUPS.get(name.partition("/")[0], "train")
            tag = name if name.startswith("eval/") else f"{group}/{name}"
            self._writer.add_scalar(tag, value, step)

    def close(self, well: bool) -> None:
        """Write what is left."""
        self._writer.close()


class Sinks:
    """Several of them. One that fails is told of and left out from then on; the run goes on."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log, self._sinks = log, []

    def add(self, name: str, make: Callable[[], Sink]) -> None:
        """Open a sink."""
        self._try(name, lambda: self._sinks.append((name, make())))

    def write(
        self, step: int, values: Mapping[str, float], by_rank: Mapping[str, list[float]] = MappingProxyType({})
    ) -> None:
        """Hand numbers to all; those of which every rank has one go to the file alone."""
        for name, sink in tuple(self._sinks):
            given = {**values, **by_rank} if isinstance(sink, JsonLines) else values
            self._try(name, lambda s=sink, g=given: s.write(step, g))

    def close(self, well: bool) -> None:
        """Close all."""
        for name, sink in tuple(self._sinks):
            self._try(name, lambda s=sink: s.close(well))
        self._sinks = []

    def text(self, name: str, text: str) -> None:
        """Hand a text, such as a picture, to those that keep such beside numbers."""
        for server in self._servers():
            server.text(name, text)

    def register(self, name: str, directory: str) -> None:
        """Have a model directory registered under a name."""
        for server in self._servers():
            server.register(name, directory)

    def stopped(self) -> None:
        """The run ends well, but before its last step."""
        for server in self._servers():
            server.stopped = True

    def state(self) -> dict[str, str]:
        """What a checkpoint has to say of them for a run that goes on from it."""
        runs = [("mlflow", server.run) for server in self._servers()]
        runs += [("wandb", sink.run) for _, sink in self._sinks if isinstance(sink, WeightsAndBiases)]
        return {name: run for name, run in runs if run is not None}

    def _servers(self) -> list[MLflow]:
        return [sink for _, sink in self._sinks if isinstance(sink, MLflow)]

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(well=kind is None)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except UserError:
            raise
        except Exception as error:  # whatever a server or its client may raise
            self._sinks = [kept for kept in self._sinks if kept[0] != name]
            self._log(f"warning: {name} failed ({one_line(error)}) and gets no more metrics; training goes on")


def open_sinks(run: Path | None, step: int, facts: RunFacts, log: Callable[[str], None]) -> Sinks:
    """Those of a run that begins after ``step`` and has the folder ``run``, if any."""
    sinks = Sinks(log)
    if run is not None:
        sinks.add(METRICS, lambda: JsonLines(run / METRICS))
        if importlib.util.find_spec("tensorboard") is not None:
            sinks.add("TensorBoard", lambda: TensorBoard(run / TENSORBOARD, step))
    if MLflow.wanted():
        sinks.add("MLflow", lambda: MLflow(facts, log))
    if WeightsAndBiases.wanted():
        sinks.add("Weights & Biases", lambda: WeightsAndBiases(facts, run, log))
    return sinks
