"""Runs told to a real MLflow server: all that it was sent is read back through its client."""

import json
import time

import mlflow
import numpy as np
import pytest
import yaml
from conftest import SMALL
from device.token_tables import write_table
from forked import run_ranks
from mlflow import MlflowClient
from test_parity import read_metrics
from tracking_server import silent_server, tracking_server
from transformers import AutoModelForCausalLM, AutoTokenizer

from fft.data.table import Table
from fft.quickstart.tokenizer import save_tokenizer, train_tokenizer
from fft.training import mlflow_sink
from fft.training.mlflow_sink import MLflow, RunFacts

pytestmark = pytest.mark.slow
NAME = "main.chat.small"
#: Seconds that a run waits for a server here.
SHORT = 3.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with tracking_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    mlflow.set_tracking_uri(server.url)
    return MlflowClient(server.url)


@pytest.fixture(scope="module")
def train(tmp_path_factory, server, ragged_table):
    folder = tmp_path_factory.mktemp("runs")
    write_table(folder / "held_out", [np.arange(20, dtype=np.int32)] * 3)
    (folder / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama", "vocab_size": 300}))
    save_tokenizer(train_tokenizer(["def f(x):\n    return x\n"] * 3, 300), folder / "tokenizer")

    def run(*flags):
        given = ["--init", "--model", folder / "config.json", "--tokenizer", folder / "tokenizer", "--seq_len", "64"]
        given += ["--train_data", ragged_table, "--eval_data", folder / "held_out", "--dtype", "fp32"]
        given += ["--checkpoint", folder / "run", "--output_dir", folder / "model", "--logging_steps", "1"]
        env = {"MLFLOW_TRACKING_URI": server.url, "MLFLOW_EXPERIMENT_NAME": "small"}
        done = run_ranks(2, *given, "--pipe_parallel_size", "2", *flags, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return folder, run


def history(client, run, name):
    return {metric.step: metric.value for metric in client.get_metric_history(run, name)}


def test_a_run_that_goes_on_is_one_run_and_all_of_it_is_there(client, train, ragged_table, tmp_path):
    folder, start = train
    begun = start("--max_steps", "4", "--save_steps", "2")
    (run,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert run.info.run_id in begun.stderr
    assert run.info.status == "FINISHED"
    start("--max_steps", "6", "--save_steps", "2", "--resume", "auto", "--register_model", NAME)
    (run,) = client.search_runs([run.info.experiment_id])
    assert run.info.status == "FINISHED"
    _check_numbers(client, run, folder / "run")
    assert run.data.params["seq_len"] == "64"
    assert run.data.params["max_steps"] == "4"
    assert run.data.tags["changed.max_steps"] == "6"
    _check_tables(run, {"training": ragged_table, "evaluation": folder / "held_out"})
    _check_artifacts(client, run.info.run_id, folder / "run", tmp_path)
    _check_model(client, run.info.run_id, folder / "model")


def _check_numbers(client, run, folder):
    steps, evaluated = read_metrics(folder)
    assert history(client, run.info.run_id, "loss") == {step["step"]: step["loss"] for step in steps}
    assert history(client, run.info.run_id, "eval_loss")[6] == evaluated[-1]
    assert {
        "grad_norm",
        "lr",
        "tokens_per_second",
        "mfu",
        "system/cpu_utilization_percentage",
    } <= run.data.metrics.keys()


def _check_tables(run, tables):
    found = {one.tags[0].value: one.dataset for one in run.inputs.dataset_inputs}
    assert found.keys() == tables.keys()
    for context, dataset in found.items():
        table = Table.open(tables[context])
        assert (dataset.name, dataset.digest) == (tables[context].name, table.fingerprint)
        assert json.loads(dataset.source) == {"uri": table.path}
        profile = json.loads(dataset.profile)
        assert (profile["tokens"], profile["rows"], profile["version"]) == (table.tokens, table.rows, None)


def _check_artifacts(client, run, folder, tmp_path):
    def read(name):
        path = client.download_artifacts(run, name, str(tmp_path))
        with open(path, encoding="utf-8") as stream:
            return stream.read()

    for name in ("arguments.yaml", "environment.yaml", "data.yaml"):
        assert yaml.safe_load(read(name)) == yaml.safe_load((folder / name).read_text())
    assert "2 = data 1 x pipe 2" in read("plan.txt")
    assert read("loss.svg") == (folder / "loss.svg").read_text()
    assert "# llama, trained to step 6\n" in read("README.md")


def _check_model(client, run, directory):
    version = client.get_model_version(NAME, "1")
    assert version.run_id == run
    loaded = mlflow.pyfunc.load_model(f"models:/{NAME}/1")
    assert [column.name for column in loaded.metadata.get_input_schema()] == ["prompt"]
    assert loaded.input_example == [{"prompt": "Hello"}]
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    inputs = tokenizer("def f(", return_tensors="pt")
    written = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer.decode(written, skip_special_tokens=True)
    assert loaded.predict([{"prompt": "def f("}], params={"max_new_tokens": 5}) == [expected]


@pytest.fixture
def sink(client, server, monkeypatch):
    """Opens one for a server; what it says, and how long it keeps a run waiting."""
    assert mlflow_sink.PATIENCE == 10.0
    monkeypatch.setattr(mlflow_sink, "PATIENCE", SHORT)
    monkeypatch.setattr(mlflow_sink, "_AGAIN", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "sinks")

    def opened(url):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        mlflow.set_tracking_uri(url)
        said, begun = [], time.monotonic()
        return MLflow(RunFacts({"seq_len": 64}, texts={"plan.txt": "a plan"}, notes="runs/a"), said.append), said, begun

    yield opened
    mlflow.set_tracking_uri(server.url)


def check_told_once(said):
    assert len([line for line in said if line.startswith("warning: MLflow does not answer (")]) == 1, said
    (told,) = [line for line in said if line.startswith("warning: MLflow missed ")]
    return told


@pytest.mark.parametrize("silent", [True, False])
def test_a_server_that_is_dead_at_the_start(sink, silent):
    with silent_server() as url:
        opened, said, begun = sink(url if silent else "http://127.0.0.1:9")
        assert time.monotonic() - begun < SHORT + 30
        for step in range(1, 4):
            opened.write(step, {"loss": 1.0})
        begun = time.monotonic()
        opened.close(True)
        assert time.monotonic() - begun < SHORT + 30
    told = check_told_once(said)
    assert told.startswith("warning: MLflow missed 3 numbers from step 1 on, parameters, tables, plan.txt (")
    assert told.endswith("; all numbers are in runs/a")


def test_what_a_server_refuses_is_told_and_the_rest_arrives(sink, server, client):
    opened, said, _ = sink(server.url)
    opened.write(1, {"a,b": 1.0})
    _wait_for(lambda: any("does not take 1 numbers" in line for line in said))
    opened.write(2, {"loss": 1.0})
    opened.close(False)
    assert history(client, opened.run, "loss") == {2: 1.0}
    assert client.get_run(opened.run).info.status == "FAILED"
    assert said[-1] == "warning: MLflow missed 1 numbers; all numbers are in runs/a"


def test_a_run_that_was_stopped_is_not_finished(sink, server, client):
    opened, _, _ = sink(server.url)
    opened.stopped = True
    opened.close(True)
    assert client.get_run(opened.run).info.status == "KILLED"


def test_the_run_of_somebody_else_is_not_ended(sink, server, client):
    with mlflow.start_run() as run:
        opened, _, _ = sink(server.url)
        opened.write(1, {"loss": 1.0})
        opened.close(True)
        assert opened.run == run.info.run_id
        assert client.get_run(run.info.run_id).info.status == "RUNNING"
    assert history(client, run.info.run_id, "loss") == {1: 1.0}


def test_a_server_that_is_dead_for_a_while_and_then_for_good(sink, server, client, monkeypatch):
    """The last of this file: the server stays dead."""
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")  # whose numbers come when they come
    opened, said, _ = sink(server.url)
    server.stop()
    begun = time.monotonic()
    for step in range(1, 2001):
        opened.write(step, {"loss": 1.0 / step, "lr": 1e-3})
    assert time.monotonic() - begun < 30  # a quick answer for each would take an hour: the training waits for nobody
    _wait_for(lambda: any("does not answer" in line for line in said))
    server.start()
    _wait_for(lambda: "MLflow answers again and has got what it missed" in said)
    assert history(client, opened.run, "loss") == {step: 1.0 / step for step in range(1, 2001)}
    server.stop()
    opened.write(2001, {"loss": 0.5})
    begun = time.monotonic()
    opened.close(True)
    assert time.monotonic() - begun < SHORT + 30
    told = [line for line in said if line.startswith("warning: MLflow missed 1 numbers from step 2001 on (")]
    assert len(told) == 1


def _wait_for(sign):
    until = time.monotonic() + 100
    while not sign():
        assert time.monotonic() < until
        time.sleep(0.05)
