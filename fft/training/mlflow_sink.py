"""MLflow as a run's sink. A thread of its own speaks with the server: the training never waits for it.

What a server that is away misses is kept, up to a limit, and sent when it answers again. A run waits for it at its
start and at its end, :data:`PATIENCE` seconds at most without a sign of life; what was not sent by then is told.
"""

import importlib.util
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from fft.arguments import TrainArguments
from fft.data.storage import is_url
from fft.errors import UserError, one_line
from fft.redaction import redact

#: Seconds that a run waits for a server that does not answer.
PATIENCE = 10.0
#: Seconds from one message to the next, and between two tries while the server is away.
_EVERY, _AGAIN = 1.0, 10.0
#: Numbers of a message; of as many as are kept.
_BATCH, _MOST = 1000, 1 << 18
#: Settings of a message, as MLflow limits them.
_PARAMETERS = 100
#: MLflow's client would try for minutes. What the user has set for it stays.
_TIMEOUT, _SHORT = "MLFLOW_HTTP_REQUEST_TIMEOUT", "8"
_CLIENT = {_TIMEOUT: _SHORT, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
#: A file of a model may take longer.
_LONG = "600"
#: Where runs are and where Databricks keeps models of three-level names.
_SERVER, _REGISTRY, _UNITY = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "databricks-uc"


@dataclass(frozen=True)
class UsedTable:
    """A table as MLflow lists a run's inputs; ``source`` is where it is, as its ``kind`` writes that."""

    context: str
    name: str
    fingerprint: str
    kind: str
    source: Mapping[str, Any]
    columns: Sequence[str]
    profile: Mapping[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """What a run says of itself when it begins; ``known`` is the id of the MLflow run that it goes on with, ``wandb``
    that of the one of Weights & Biases.

    ``notes`` says where its numbers are besides.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[UsedTable] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    known: str | None = None
    wandb: str | None = None
    notes: str | None = None


class MLflow:
    """The active run, the one that ``MLFLOW_RUN_ID`` names, that of the run gone on with, or a new one.

    The first is not ended with ours.
    """

    def __init__(self, facts: RunFacts, log: Callable[[str], None]) -> None:
        self._facts, self._log = facts, log
        active = sys.modules["mlflow"].active_run() if "mlflow" in sys.modules else None
        self._ends, self._known = active is None, os.environ.get("MLFLOW_RUN_ID") or facts.known
        if active is not None:
            self._known = active.info.run_id
        for name, value in _CLIENT.items():
            os.environ.setdefault(name, value)
        #: Whether the run was asked to stop before its last step, in order.
        self.stopped = False
        #: The MLflow run's id, once the server has given it.
        self.run: str | None = None
        self._numbers: deque[tuple[int, int, str, float]] = deque()
        self._jobs = deque([("parameters", self._send_parameters), ("tables", self._send_tables)])
        self._jobs += [(name, self._text_job(name, text)) for name, text in facts.texts.items()]
        self._lost: list[str] = []
        self._dropped = self._step = 0
        self._away: str | None = None
        self._uploads = False
        self._status: str | None = None
        self._alive = time.monotonic()
        self._monitor: Any = None
        self._sampled = 0.0
        self._tried, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        if not self._tried.wait(PATIENCE):
            self._tell_away(f"no answer in {PATIENCE:.0f} seconds")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Without waiting for the server."""
        self._step, now = step, time.time_ns() // 1_000_000
        if len(self._numbers) >= _MOST:
            self._dropped += len(values)
            return
        self._numbers.extend((now, step, name, float(value)) for name, value in values.items())

    def text(self, name: str, text: str) -> None:
        """Send a text as an artifact of this name, without waiting for the server."""
        self._jobs.append((name, self._text_job(name, text)))

    def register(self, name: str, directory: str) -> None:
        """Send a model or adapter directory as the run's model, and register it; :meth:`close` waits for that."""
        self._jobs.append((f"model {name}, which is in {directory}", lambda: self._send_model(name, directory)))

    def close(self, well: bool) -> None:
        """Wait for the server; end the run if it is ours. Tells what could not be sent."""
        self._status = ("KILLED" if self.stopped else "FINISHED") if well else "FAILED"
        self._alive = time.monotonic()
        self._end.set()
        while self._thread.is_alive() and (patience := self._alive + PATIENCE - time.monotonic()) > 0:
            self._thread.join(min(_EVERY, patience))
            if self._uploads and self._thread.is_alive() and _answers(os.environ.get(_SERVER, ""), patience / 2):
                self._alive = time.monotonic()
        left = [name for name, _ in self._jobs] + self._lost
        if (numbers := len(self._numbers) + self._dropped) or left:
            steps = f" from step {self._numbers[0][1]} on" if self._numbers else ""
            left = [f"{numbers:,} numbers{steps}"] * bool(numbers) + left
            where = f"; all numbers are in {self._facts.notes}" if self._facts.notes else ""
            why = f" ({self._away})" if self._away else ""
            self._log(f"warning: MLflow missed {', '.join(left)}{why}{where}")

    def _work(self) -> None:
        """What the thread does: deliver until the end, and again after a while what could not be delivered."""
        while True:
            ending = self._end.is_set()
            try:
                self._deliver(ending)
            except Exception as error:  # whatever a server or its client may raise
                self._tell_away(one_line(error))
                self._tried.set()
                if ending or self._end.is_set():
                    return
                self._end.wait(_AGAIN)
                continue
            if self._away is not None:
                self._log("MLflow answers again and has got what it missed")
                self._away = None
            self._tried.set()
            if ending:
                return
            self._end.wait(_EVERY)

    def _tell_away(self, why: str) -> None:
        if self._away is None:
            self._log(f"warning: MLflow does not answer ({why}): what it misses is kept, and training goes on")
        self._away = why

    def _deliver(self, ending: bool) -> None:
        import mlflow

        if self.run is None:
            self._open(mlflow)
        self._sample()
        while self._jobs:
            self._attempt(*self._jobs[0])
            self._jobs.popleft()
        while self._numbers:
            batch = list(islice(self._numbers, _BATCH))
            self._attempt(f"{len(batch)} numbers", lambda some=batch: self._send_numbers(some))
            for _ in batch:
                self._numbers.popleft()
        if ending and self._ends:
            mlflow.end_run(self._status or "FINISHED")

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        """Do it; what fails, and would again, is told and left out. Raises where the server may be away."""
        try:
            action()
        except Exception as error:  # whatever a server or its client may raise
            if _is_away(error):
                raise
            self._log(f"warning: MLflow does not take {name} ({one_line(error)})")
            self._lost.append(name)
        self._alive = time.monotonic()

    def _open(self, mlflow: Any) -> None:
        run = None
        if self._known:
            try:
                run = mlflow.start_run(run_id=self._known, log_system_metrics=False)
            except mlflow.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self._log(f"warning: MLflow has no run {self._known} any more: a new one begins")
                self._known = None
        run = run or mlflow.start_run(log_system_metrics=False)
        self.run = run.info.run_id
        self._log(f"MLflow run {run.info.run_name}: {self.run} at {mlflow.get_tracking_uri()}")

    def _send_parameters(self) -> None:
        """Those that the run has not; one that was begun before keeps its own, a tag says what has changed."""
        from mlflow.entities import Param, RunTag

        client = _client()
        have = client.get_run(self.run).data.params
        given = {name: str(value) for name, value in self._facts.parameters.items()}
        new = [Param(name, value) for name, value in given.items() if name not in have]
        for begin in range(0, len(new), _PARAMETERS):
            client.log_batch(self.run, params=new[begin : begin + _PARAMETERS])
        changed = {name: value for name, value in given.items() if have.get(name, value) != value}
        client.log_batch(self.run, tags=[RunTag(f"changed.{name}", value) for name, value in changed.items()])

    def _send_tables(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for table in self._facts.tables:
            schema = json.dumps({"columns": list(table.columns)})
            place, profile = json.dumps(table.source), json.dumps(table.profile)
            dataset = Dataset(table.name, table.fingerprint, table.kind, place, schema, profile)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", table.context)]))
        if inputs:
            _client().log_inputs(self.run, inputs)

    def _text_job(self, name: str, text: str) -> Callable[[], None]:
        return lambda: _client().log_text(self.run, redact(text), name)

    def _send_numbers(self, batch: Sequence[tuple[int, int, str, float]]) -> None:
        from mlflow.entities import Metric

        _client().log_batch(self.run, [Metric(name, value, now, step) for now, step, name, value in batch])

    def _send_model(self, name: str, directory: str) -> None:
        from fft.training.mlflow_model import register

        if os.environ[_TIMEOUT] == _SHORT:
            os.environ[_TIMEOUT] = _LONG
        if name.count(".") == 2 and os.environ.get(_SERVER, "databricks").startswith("databricks"):
            os.environ.setdefault(_REGISTRY, _UNITY)
        self._uploads = True  # with no sign of life for a while
        try:
            version = register(name, directory, str(self.run))
        finally:
            self._uploads = False
        self._log(f"model registered: models:/{name}/{version}")

    def _sample(self) -> None:
        """Load of this machine's processors, memory, disk, network and GPUs, under MLflow's own names."""
        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("false", "0"):
            return
        if self._monitor is None:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(self.run)
        if (now := time.monotonic()) - self._sampled < self._monitor.sampling_interval:
            return
        self._sampled = now
        self._monitor.collect_metrics()
        found = {f"system/{name}": value for name, value in self._monitor.aggregate_metrics().items()}
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        self.write(self._step, found)

    @staticmethod
    def wanted() -> bool:
        """Whether MLflow is installed and told of a server: by the environment, by Databricks, or by an active run."""
        if importlib.util.find_spec("mlflow") is None:
            return False
        variables = (_SERVER, "MLFLOW_RUN_ID", "DATABRICKS_RUNTIME_VERSION")
        return any(name in os.environ for name in variables) or (
            "mlflow" in sys.modules and sys.modules["mlflow"].active_run() is not None
        )


def check_registers(args: TrainArguments, tokenizer: str | None) -> None:
    """Raise :class:`UserError` where --register_model asks for what could not be done at the end."""
    name = args.register_model
    if name is None:
        return
    if args.output_dir is None or is_url(args.output_dir):
        raise UserError("--register_model sends what --output_dir has, from a disk: give a path there.")
    if not all(part.strip() for part in name.split(".")) or {*name} & {*"/:"}:
        raise UserError(
            f"--register_model {name} is no name of a model: give one without / and :, as in main.chat.mine."
        )
    if tokenizer is None:
        raise UserError("--register_model: a model without a tokenizer answers no prompt; name one with --tokenizer.")
    if not MLflow.wanted():
        raise UserError(
            f"--register_model {name} needs MLflow: pip install mlflow-skinny, and name its server in {_SERVER}."
        )


def _is_away(error: Exception) -> bool:
    """Whether the same may go well later: no answer, an answer that blames the server, or keys that have run out."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        code = error.get_http_status_code()
        return code >= 500 or code in (401, 403, 429)
    return isinstance(error, OSError)  # requests' errors are such


def _client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient()


def _answers(server: str, patience: float) -> bool:
    """Whether a server is there, any answer being one; what is no server of that kind has limits of its own."""
    if not server.startswith(("http://", "https://")):
        return True
    try:
        urllib.request.urlopen(f"{server.rstrip('/')}/health", timeout=patience).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
