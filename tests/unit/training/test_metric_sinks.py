"""Where metrics go: all sinks get all numbers, a broken one is left out and told of once, MLflow is called as it is."""

import http.server
import importlib.machinery
import json
import socket
import sys
import threading
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fft.errors import UserError
from fft.training.metric_sinks import MLflow, Sinks, open_sinks

VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "DATABRICKS_RUNTIME_VERSION")


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


class Collects:
    def __init__(self, broken=False):
        self.broken, self.written, self.ended = broken, [], []

    def write(self, step, values):
        if self.broken:
            raise ConnectionError("no route\nto host.")
        self.written.append((step, dict(values)))

    def close(self, well):
        self.ended.append(well)


def test_a_sink_that_fails_is_left_out_and_told_of_once():
    said, good, bad = [], Collects(), Collects(broken=True)
    with Sinks(said.append) as sinks:
        sinks.add("unopened", lambda: 1 / 0)
        sinks.add("bad", lambda: bad)
        sinks.add("good", lambda: good)
        sinks.write(1, {"loss": 2.0})
        sinks.write(2, {"loss": 1.0})
    assert good.written == [(1, {"loss": 2.0}), (2, {"loss": 1.0})]
    assert (good.ended, bad.ended) == ([True], [])
    assert said == [
        "warning: unopened failed (division by zero) and gets no more metrics; training goes on",
        "warning: bad failed (no route to host) and gets no more metrics; training goes on",
    ]


def test_a_run_that_fails_says_so_to_its_sinks():
    good, sinks = Collects(), Sinks(print)
    sinks.add("good", lambda: good)
    with pytest.raises(ZeroDivisionError), sinks:
        raise ZeroDivisionError
    assert good.ended == [False]


def test_files_in_the_run_folder(tmp_path):
    for start, loss in ((0, 3.0), (2, 1.0)):  # the second goes on after step 2 of the first, which came to step 4
        with open_sinks(tmp_path, start, {}, print) as sinks:
            for step in range(start + 1, 5):
                sinks.write(step, {"loss": loss})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "loss": 3.0}
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 3.0), (2, 3.0), (3, 1.0), (4, 1.0)]


def test_metrics_that_cannot_be_written_end_the_run(tmp_path):
    with open_sinks(tmp_path, 0, {}, print) as sinks:
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(UserError, match="cannot be written"):
            sinks.write(1, {"loss": 1.0})


@pytest.fixture
def mlflow(monkeypatch):
    """A stand-in with the functions that we call, as in MLflow 3."""
    module, calls = types.ModuleType("mlflow"), []
    module.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
    module.calls, module.run = calls, None

    def run_with(params):
        return types.SimpleNamespace(data=types.SimpleNamespace(params=params))

    def start_run():
        module.run = run_with({})
        calls.append(("start_run",))
        return module.run

    def log_metrics(metrics, step=None, synchronous=None, run_id=None):
        calls.append(("log_metrics", metrics, step, synchronous))

    module.run_with, module.start_run, module.log_metrics = run_with, start_run, log_metrics
    module.active_run = lambda: module.run
    module.log_params = lambda params: calls.append(("log_params", params))
    module.flush_async_logging = lambda: calls.append(("flush",))
    module.end_run = lambda status: calls.append(("end_run", status))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def test_mlflow_is_left_alone_unless_told_of_a_server(mlflow):
    assert not MLflow.wanted()
    with open_sinks(None, 0, {}, print) as sinks:
        sinks.write(1, {"loss": 1.0})
    assert mlflow.calls == []


@pytest.mark.parametrize("variable", VARIABLES)
def test_mlflow_run_of_our_own(mlflow, monkeypatch, variable):
    monkeypatch.setenv(variable, "x")
    with open_sinks(None, 0, {"seq_len": 64}, print) as sinks:
        sinks.write(3, {"loss": 1.0})
    logged = ("log_metrics", {"loss": 1.0}, 3, False)
    assert mlflow.calls == [
        ("start_run",),
        ("log_params", {"seq_len": 64}),
        logged,
        ("flush",),
        ("end_run", "FINISHED"),
    ]


def test_mlflow_run_of_somebody_else_is_not_ended(mlflow):
    mlflow.run = mlflow.run_with({"seq_len": "32"})
    with open_sinks(None, 0, {"seq_len": 64}, print) as sinks:
        sinks.write(3, {"loss": 1.0})
    assert mlflow.calls == [("log_metrics", {"loss": 1.0}, 3, False), ("flush",)]


def test_a_dead_server_is_left_out_at_once(mlflow, monkeypatch):
    """MLflow's own client tries for minutes, before the first step."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        said: list[str] = []
        with open_sinks(None, 0, {}, said.append) as sinks:
            sinks.write(1, {"loss": 1.0})
    assert mlflow.calls == []
    assert len(said) == 1
    assert said[0].startswith("warning: MLflow failed (")


def test_a_server_that_answers_anything_is_one(mlflow, monkeypatch):
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(401)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with open_sinks(None, 0, {}, print) as sinks:
            sinks.write(3, {"loss": 1.0})
    assert ("log_metrics", {"loss": 1.0}, 3, False) in mlflow.calls
