"""``train_on_cluster``: a run of :mod:`fft.train` on the executors of a Spark session, or on this machine."""

import contextlib
import dataclasses
import json
import math
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

from fft.arguments import parse_arguments
from fft.chart import Picture, losses, notebook_table
from fft.data.storage import Storage
from fft.errors import EXIT_AGAIN, UserError
from fft.spark import checks, places
from fft.spark.channel import Listener
from fft.spark.stage import NodeStage
from fft.train_arguments import TrainArguments

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

#: Seconds that ranks have to save after the first interrupt, and to end in when a node is lost.
_SAVED_WITHIN, _ENDED_WITHIN = 600.0, 10.0
#: Seconds in which a job that is cancelled has to end, and those between two looks at it.
_SPARK_ENDS_WITHIN, _LOOKED_EVERY = 20.0, 0.2
#: Said by a rank whose neighbour was first: the neighbour's sentence is the one to read.
_NOT_THE_CAUSE = "lost the connection to another rank"


@dataclass(frozen=True)
class Result:
    """What came of a run: the ``model`` directory and the ``run`` folder, as they were named (None: not asked for), and
    the records of the run's ``metrics.jsonl``, each with its ``step``; without a run folder there are none.

    >>> records = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0, "eval_loss": 2.25}]
    >>> found = Result("runs/model", "runs/run", records)
    >>> found.last("loss"), found.last("eval_loss"), found.last("mfu")
    (2.0, 2.25, None)
    """

    model: str | None
    run: str | None
    metrics: list[dict[str, float]]

    def points(self, name: str) -> list[tuple[float, float]]:
        """A number by step, where it is finite."""
        found = {record["step"]: record[name] for record in self.metrics if math.isfinite(record.get(name, math.nan))}
        return sorted(found.items())

    def last(self, name: str) -> float | None:
        """The last of a number, if there is any."""
        points = self.points(name)
        return points[-1][1] if points else None

    def plot(self) -> Picture:
        """Losses by step."""
        return Picture(losses(self.points("loss"), self.points("eval_loss")))

    def _repr_html_(self) -> str:
        told = {
            "model": self.model,
            "run": self.run,
            "steps": self.points("loss")[-1][0] if self.points("loss") else None,
        }
        told |= {"loss": self.last("loss"), "validation loss": self.last("eval_loss")}
        table = notebook_table([(name, value) for name, value in told.items() if value is not None])
        return table + (self.plot()._repr_html_() if self.metrics else "")


def train_on_cluster(
    *,
    processes: int = 1,
    nodes: int = 1,
    local: bool = False,
    use_gpu: bool = True,
    spark: "SparkSession | None" = None,
    log: Callable[[str], None] = print,
    **flags: Any,
) -> Result:
    """Train on ``nodes`` tasks of Spark that run side by side, with so many ``processes`` each, to the run's end.

    ``flags`` are those of ``fft.train`` by name: ``train_data="/Volumes/...", seq_len=2048, overwrite=True``. With
    ``local``, the processes run on this machine, without Spark. Without ``use_gpu`` they compute on CPUs. What rank 0
    prints goes to ``log``, line by line. :class:`KeyboardInterrupt`, a cancelled cell, has the ranks save and end; a
    second one ends them at once.

    Raises :class:`UserError` for what the user can mend: flags, places that a node does not see, too few slots, and
    whatever ends the run. Of a node that is lost it says so within seconds; ``resume="auto"`` then goes on.
    """
    args = _parse(flags)
    if min(processes, nodes) < 1 or (local and nodes != 1):
        raise UserError("`processes` and `nodes` are at least 1, and with local=True there is one node, this machine.")
    session = None if local else checks.session_of(spark)
    read = places.places_read(args)
    places.check_read(read, "on the driver")
    profile = None if session is None else checks.check_session(session, nodes, processes, use_gpu)
    token, tag = f"_fft_seen_{secrets.token_hex(8)}", f"fft-{secrets.token_hex(8)}"
    bind, address = ("127.0.0.1", "127.0.0.1") if session is None else checks.addresses(session)
    with _listening(bind, address) as listener, places.tokens_beside(args, token) as beside:
        order = {
            **{"nodes": nodes, "processes": processes, "use_gpu": use_gpu, "arguments": _as_flags(args)},
            **{"read": read, "beside": beside, "token": token, "cwd": str(Path.cwd())},
            **{"listener": listener.reached_at},
        }
        stage = NodeStage(order, checks.credentials())
        watch = _Watch(listener, log)
        if session is None:
            watch.run(stage.here, lambda: None)
        else:
            watch.run(lambda: stage.on_executors(session, profile, tag), lambda: session.interruptTag(tag))
    return Result(args.output_dir, args.checkpoint, _metrics(args))


def _parse(flags: dict[str, Any]) -> TrainArguments:
    """Keywords as the command line would have them, so that they are checked by what checks that."""
    words = [_word(name, value) for name, value in flags.items() if value is not None and value is not False]
    args = parse_arguments(words)
    if args.dry_run:
        raise UserError("dry_run plans without a cluster: python -m fft.train --dry_run prints it.")
    return args


def _word(name: str, value: Any) -> str:
    return f"--{name}" if value is True else f"--{name}={value}"


def _as_flags(args: TrainArguments) -> list[str]:
    """Settings of whatever origin, a file or keywords, as a command line that needs no file."""
    given = {spec.name: (getattr(args, spec.name), spec.default) for spec in dataclasses.fields(args)}
    return [_word(name, value) for name, (value, default) in given.items() if value != default or name == "dtype"]


def _metrics(args: TrainArguments) -> list[dict[str, float]]:
    run = Storage.at(args.checkpoint) if args.checkpoint else None
    if run is None or not run.exists("metrics.jsonl"):
        return []
    return [json.loads(line) for line in run.read("metrics.jsonl").decode().splitlines()]


@contextmanager
def _listening(bind: str, address: str) -> Iterator[Listener]:
    try:
        listener = Listener(bind, address)
    except OSError as error:
        raise UserError(
            f"nothing can listen on {bind}, where executors would reach the driver ({error.strerror}): set "
            "spark.driver.bindAddress to an address of this machine."
        ) from error
    try:
        yield listener
    finally:
        listener.close()


@dataclass
class _Watch:
    """Follows a stage from this thread, which an interrupt reaches, while another one waits for Spark."""

    listener: Listener
    log: Callable[[str], None]
    #: Hosts of the nodes that reached the driver; nodes whose ranks have ended; those that Spark, or all, has lost.
    hosts: dict[int, str] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    lost: list[int] = field(default_factory=list)
    #: Sentences of ranks that failed, in the order in which they came.
    failed: list[str] = field(default_factory=list)

    def run(self, job: Callable[[], list[dict[str, Any]]], cancel: Callable[[], object]) -> None:
        """Run the ``job`` to its end. Raises :class:`UserError` where it failed, and what interrupted it."""
        outcome: Queue[list[dict[str, Any]] | Exception] = Queue()
        thread = threading.Thread(target=_put_outcome, args=(job, outcome), daemon=True)
        thread.start()
        interrupted: KeyboardInterrupt | None = None
        following = True
        while following:
            try:
                self._follow(outcome)
                following = False
            except KeyboardInterrupt as error:
                following = interrupted is None and bool(self.hosts)
                interrupted = error
                self.log("interrupted: the ranks save and end" if following else "interrupted: the ranks end")
                self.listener.stop(_SAVED_WITHIN if following else 0)
        if outcome.empty():
            cancel()
            thread.join(_SPARK_ENDS_WITHIN)
        if interrupted is not None:
            raise interrupted
        self._judge([] if outcome.empty() else outcome.get())

    def _follow(self, outcome: Queue) -> None:
        """Take what nodes tell, until all have hung up and the job is over, or would begin again."""
        told = self.listener.told
        while self.listener.connected or not told.empty() or (outcome.empty() and not self.lost):
            with contextlib.suppress(Empty):
                self._take(*told.get(timeout=_LOOKED_EVERY))

    def _take(self, node: int, message: dict[str, Any] | None) -> None:
        if message is None:
            if node not in self.ended:
                self._lose(node, _ENDED_WITHIN)  # the others cannot take another step
            return
        match next(iter(message.items())):
            case "line", text:
                self.log(text)
            case "host", name:
                self.hosts[node] = name
            case "orphan", _:
                self._lose(node, _SAVED_WITHIN)
            case "failed", sentence:
                self.failed.append(sentence)
                self.listener.stop(_ENDED_WITHIN, but=node)
            case "ended", _:
                self.ended.add(node)

    def _lose(self, node: int, seconds: float) -> None:
        self.lost.append(node)
        self.listener.stop(seconds)

    def _judge(self, outcome: list[dict[str, Any]] | Exception) -> None:
        """Raise :class:`UserError` for the first cause of a bad end."""
        rows = outcome if isinstance(outcome, list) else []
        if problems := [row["problem"] for row in rows if row.get("problem")]:
            raise UserError(problems[0])
        for row in rows:
            for text in () if row["heard"] else row.get("tail", ()):
                self.log(text)
        if self.lost:
            raise UserError(
                f"node {self.lost[0]} on {self.hosts[self.lost[0]]} was lost, with its executor: where checkpoints are "
                'written (save_steps), the same call with resume="auto" goes on from the newest.'
            )
        failed = self.failed + [row["failed"] for row in rows if row.get("failed")]
        if failed:
            raise UserError(next((why for why in failed if _NOT_THE_CAUSE not in why), failed[0]))
        if isinstance(outcome, Exception):
            raise checks.spark_error(outcome) from outcome
        if any(EXIT_AGAIN in row.get("codes", ()) for row in rows):
            raise UserError('the ranks were asked to end, and have saved: the same call with resume="auto" goes on.')


def _put_outcome(job: Callable[[], list[dict[str, Any]]], outcome: Queue) -> None:
    try:
        outcome.put(job())
    except Exception as error:  # whatever Spark raises
        outcome.put(error)
