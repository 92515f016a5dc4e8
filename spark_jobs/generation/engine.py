"""The engine of a Python worker: loaded for the first task that needs it, kept for the tasks and jobs after it.

A worker of Spark serves one task at a time, so there is one engine for each task that runs at once. It must not travel
in what tasks are told, of which every worker has a copy: it lives in this module.
"""

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pyspark import TaskContext

from fft.images.rules import ImageSettings
from fft.serve.engines import Engine, EngineOptions
from fft.text.image_parts import ImageParts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Wanted:
    """What a task generates with. ``threads`` are those of a CPU's engine; None leaves it to Spark. With ``images``,
    prompts may have some."""

    model: str
    options: EngineOptions
    threads: int | None = None
    images: ImageSettings | None = None


@dataclass(frozen=True)
class Loaded:
    """An engine, the tokenizer of its model, whether it was started for this task, and what reads images of prompts."""

    engine: Engine
    tokenizer: "PreTrainedTokenizerBase"
    started: bool
    images: ImageParts | None = None


class _Keeper:
    """Holds the process's engine. Where tasks are threads of one process, as in Sail, they take turns."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._wanted: str | None = None
        self._loaded: Loaded | None = None
        atexit.register(self.close)

    @contextmanager
    def hold(self, wanted: Wanted) -> Iterator[Loaded]:
        with self._turn:
            name = repr(wanted)
            if self._loaded is None or self._wanted != name:
                self.close()
                yield self._load(wanted, name)
            else:
                yield self._loaded

    def _load(self, wanted: Wanted, name: str) -> Loaded:
        _take_resources(wanted.threads)
        # Torch and the engine's libraries: in workers alone, and after the variables that they read.
        from fft.serve.engines.choice import check_model, start_engine

        checked = check_model(wanted.model, wanted.options, images=wanted.images)
        self._loaded = Loaded(start_engine(checked), checked.tokenizer, False, checked.images)
        self._wanted = name
        return replace(self._loaded, started=True)

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded.engine.close()
        self._wanted = self._loaded = None


_KEEPER = _Keeper()


@contextmanager
def worker_engine(wanted: Wanted) -> Iterator[Loaded]:
    """This process's engine, for the ``with`` block. Raises :class:`UserError` as ``load_engine`` does."""
    with _KEEPER.hold(wanted) as loaded:
        try:
            yield loaded
        except BaseException:  # its requests are unfinished, or it is dead
            _KEEPER.close()
            raise


def _take_resources(threads: int | None) -> None:
    """Have the engine use what Spark gave this task: GPUs, or processors."""
    task = TaskContext.get()
    gpus = task.resources().get("gpu") if task is not None else None
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus.addresses)
    if threads is None and task is not None:
        threads = task.cpus()
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
