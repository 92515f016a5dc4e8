"""Checkpoints written behind the training: copy the state, go on, and publish when every rank has written its part.

A save blocks the run for a copy in memory. A thread or a process then writes the copy, hashes and syncs it; when all
ranks are done, which they learn from one small reduction per step, rank 0 gives the checkpoint its name. One save is
under way at a time: a save that comes too early waits, so that memory holds one copy of a rank's state at most.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing  # lets tensors travel to another process through shared memory
from torch import Tensor
from transformers import PretrainedConfig

from fft.checkpoint import adapter, folder
from fft.checkpoint.card import CARD, card_of
from fft.checkpoint.fragments import rank_file
from fft.checkpoint.run import RunFolder
from fft.errors import ElsewhereError, UserError, one_line
from fft.files import write_atomically
from fft.images.rules import ImageRules
from fft.weights import hf

_P = ParamSpec("_P")
_T = TypeVar("_T")

_UNSAVED = "a checkpoint could not be saved, the ones before it are intact"
_ELSEWHERE = "another rank could not write its part of the checkpoint: see what that said."


@dataclass(frozen=True)
class Contents:
    """What goes into every checkpoint of a run besides tensors. ``shards`` is the number of weight files."""

    run: RunFolder
    config: PretrainedConfig
    tokenizer: str | None
    model: Path | None
    shards: int
    newest: int
    best: int
    #: Content of ``adapter_config.json`` where checkpoints hold an adapter, not the model.
    adapter: dict | None = None
    #: Whether that is one for a model that is held in four bits.
    four_bits: bool = False
    #: Those by which images are trained on, where the run has some.
    rules: ImageRules | None = None


@dataclass(frozen=True)
class RankShare:
    """What one rank writes: a shard of the weights, or None, and its share of the training state, or None."""

    weights: tuple[dict[str, Tensor], int] | None
    training: tuple[dict[str, Tensor], dict[str, str]] | None


class Inline(Executor):
    """Does the work in the call."""

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Call ``fn`` now."""
        done: Future[_T] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


class Saver:
    """Writes the checkpoints of a run; every rank has one, and all call its methods in the same order.

    ``control`` is a group of all ranks that reduces tensors in host memory.
    """

    def __init__(self, contents: Contents, executor: str, control: dist.ProcessGroup) -> None:
        self._contents, self._kind, self._control = contents, executor, control
        self._executor = _executor(executor)
        self._buffers: dict[str, Tensor] = {}
        self._tag: str | None = None
        self._state: dict = {}
        self._written = self._published = _done()

    @property
    def run(self) -> RunFolder:
        """The run's folder, in which checkpoints are."""
        return self._contents.run

    def save(self, tag: str, share: RankShare, state: dict) -> None:
        """Save this rank's ``share`` as checkpoint ``tag``; ``state`` is the content of ``training/state.json``.

        Returns when the tensors may change again. Raises :class:`UserError` when the save before this one failed.
        """
        self.finish()
        self._start(tag)
        copied = self._snapshot(share)
        self._tag, self._state = tag, state
        self._written = self._executor.submit(_write_share, tag, copied, self._contents, dist.get_rank())
        if self._kind == "none":
            self.finish()

    def _start(self, tag: str) -> None:
        """Make room for a checkpoint; where that fails, all ranks learn of it."""
        failure: UserError | None = None
        if dist.get_rank() == 0:
            try:
                self.run.start(tag)
            except OSError as error:
                said = error.strerror or one_line(error)
                failure = UserError(f"{self.run.shown(tag)} cannot be made ({said}): make room and run again.")
            except UserError as error:
                failure = UserError(f"{_UNSAVED}: {error}")
        failed = torch.tensor(failure is not None, dtype=torch.int32)
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._control)
        if failed:
            raise failure or ElsewhereError(_ELSEWHERE)

    def step(self, stop: bool = False) -> bool:
        """To be called after every step: moves a save along. Returns whether any rank was asked to ``stop``.

        Raises :class:`UserError` when writing failed on any rank.
        """
        busy = not (self._written.done() and self._published.done())
        failed = not busy and (self._written.exception() or self._published.exception()) is not None
        flags = torch.tensor([stop, failed, busy], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._control)
        stopping, failing, pending = map(bool, flags)
        if failing:
            self._raise()
        if not pending and self._tag is not None:
            if dist.get_rank() == 0:
                self._published = self._executor.submit(_publish, self._contents, self._tag, self._state)
            self._tag = None
        return stopping

    def finish(self) -> None:
        """Wait until what was saved has its name. Raises :class:`UserError` when writing failed on any rank."""
        for _ in range(2):  # written by all; published by rank 0
            self._written.exception()
            self._published.exception()
            self.step()

    def close(self) -> None:
        """Finish, and let the background go."""
        self.finish()
        self._executor.shutdown()

    def _raise(self) -> None:
        error = self._written.exception() or self._published.exception()
        if error is None:
            raise ElsewhereError(_ELSEWHERE)
        if isinstance(error, (UserError, OSError)):
            raise UserError(f"{_UNSAVED}: {error}") from error
        raise error

    def _snapshot(self, share: RankShare) -> RankShare:
        """The tensors of ``share`` in host memory that training does not touch, the same at every save."""
        if self._kind == "none":
            return share
        weights, training = share.weights, share.training
        copied = RankShare(
            weights and (self._copies("weights", weights[0]), weights[1]),
            training and (self._copies("training", training[0]), training[1]),
        )
        if torch.accelerator.is_available():
            torch.accelerator.current_stream().synchronize()
        return copied

    def _copies(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._copy(f"{kind}/{name}", tensor) for name, tensor in tensors.items()}

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None:
            pinned = tensor.device.type != "cpu" and self._kind == "thread"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[key] = buffer.share_memory_() if self._kind == "process" else buffer
        return self._buffers[key].copy_(tensor.detach(), non_blocking=True)


def _executor(kind: str) -> Executor:
    if kind == "thread":
        return ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    if kind == "process":
        # A forked process would share the locks of this one's threads.
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_in_child)
    return Inline()


def _in_child() -> None:
    """A signal to the job is the trainer's to answer; when that is gone, so is the reason to stay."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _done() -> Future:
    done = Future()
    done.set_result(None)
    return done


def _write_share(tag: str, share: RankShare, contents: Contents, rank: int) -> None:
    files, summed = {}, set()
    if share.weights is not None:
        tensors, shard = share.weights
        name = hf.shard_name(shard, contents.shards)
        files[name] = tensors, {"format": "pt"}
        if contents.adapter is None:  # else it goes into the adapter's one file
            summed.add(name)
    if share.training is not None:
        name = f"{folder.TRAINING}/{rank_file(rank)}"
        files[name] = share.training
        summed.add(name)
    contents.run.write_tensors(tag, rank, files, summed)


def _publish(contents: Contents, tag: str, state: Mapping[str, object]) -> None:
    contents.run.publish(tag, partial(_complete, contents, state))
    contents.run.prune(contents.newest, contents.best)


def _complete(contents: Contents, state: Mapping[str, object], staging: Path) -> list[str]:
    """Add to what ranks have written all that makes a checkpoint of it; returns the names of the files."""
    if contents.adapter is None:
        given = contents.config, contents.tokenizer, contents.shards, contents.model, contents.rules
        names = hf.write_metadata(staging, *given)
    else:
        names = adapter.write_adapter(staging, contents.shards, contents.adapter, contents.four_bits)
    write_atomically(staging / folder.STATE, folder.to_json(state))
    write_atomically(staging / CARD, card_of(state, contents.config.model_type))
    return [*names, folder.STATE, CARD]
