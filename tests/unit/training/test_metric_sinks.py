"""Where metrics go: all sinks get all numbers, a broken one is left out and told of once."""

import json
import math
import sys
import time
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fft.errors import UserError
from fft.train_arguments import TrainArguments
from fft.training.metric_sinks import (
    Sinks,
    by_dataset_in,
    dataset_keys,
    evaluation_numbers,
    named_in,
    open_sinks,
    read_numbers,
    trained_by_dataset,
)
from fft.training.mlflow_sink import MLflow, RunFacts, check_registers
from fft.training.wandb_sink import WeightsAndBiases

VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "DATABRICKS_RUNTIME_VERSION")
VARIABLES += ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_MODE", "WANDB_INIT_TIMEOUT")


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


def test_numbers_by_rank_go_to_the_file_alone(tmp_path):
    good = Collects()
    with open_sinks(tmp_path, 0, RunFacts(), print) as sinks:
        sinks.add("good", lambda: good)
        sinks.write(1, {"loss": 2.0}, {"rank_wait": [0.5, 1.5]})
    assert good.written == [(1, {"loss": 2.0})]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0, "rank_wait": [0.5, 1.5]}
    assert read_numbers(tmp_path)[0]["rank_wait/1"] == {1: 1.5}


def test_a_run_that_fails_says_so_to_its_sinks():
    good, sinks = Collects(), Sinks(print)
    sinks.add("good", lambda: good)
    with pytest.raises(ZeroDivisionError), sinks:
        raise ZeroDivisionError
    assert good.ended == [False]


def test_files_in_the_run_folder(tmp_path):
    for start, loss in ((0, 3.0), (2, 1.0)):  # the second goes on after step 2 of the first, which came to step 4
        with open_sinks(tmp_path, start, RunFacts(), print) as sinks:
            for step in range(start + 1, 5):
                sinks.write(step, {"loss": loss})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "loss": 3.0}
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 3.0), (2, 3.0), (3, 1.0), (4, 1.0)]


def test_numbers_of_evaluations():
    """Those of the first, and of all with a name; a perplexity that is no number is left out."""
    found = evaluation_numbers({"web": (2.0, 7, {}, {}), "code": (1e3, 5, {}, {})})
    assert found == {
        **{"eval_loss": 2.0, "eval_tokens": 7},
        **{"eval/web/loss": 2.0, "eval/web/perplexity": math.exp(2), "eval/web/tokens": 7},
        **{"eval/code/loss": 1e3, "eval/code/tokens": 5},
    }
    assert named_in(found) == ["web", "code"]
    assert evaluation_numbers({"": (2.0, 7, {}, {})}) == {"eval_loss": 2.0, "eval_tokens": 7}
    by_dataset = {"books": (1.0, 3), "web": (2.0, 1)}
    two = evaluation_numbers({"a": (1.25, 4, {}, by_dataset), "b": (2.0, 7, {}, {})})
    assert {name: value for name, value in two.items() if name.startswith("eval_")} == {
        **{"eval_loss": 1.25, "eval_tokens": 4, "eval_loss/books": 1.0, "eval_tokens/books": 3},
        **{"eval_loss/web": 2.0, "eval_tokens/web": 1},
    }
    assert by_dataset_in(two) == {"a": {"books": "eval/a/loss/books", "web": "eval/a/loss/web"}}
    assert named_in(two) == ["a", "b"]
    assert by_dataset_in(["eval_loss/web", "loss", "eval_rewards/x"]) == {"": {"web": "eval_loss/web"}}
    assert trained_by_dataset(["loss", "loss/web", "eval/a/loss/web", "tokens/web"]) == {"web": "loss/web"}
    assert dataset_keys(["a/b", "a:b", "ü 1.-"]) == ["a_b", "a_b_", "ü 1.-"]
    pairs = {"rewards/margins": 0.5}
    told = {"eval_loss": 2.0, "eval_pairs": 7, "eval_rewards/margins": 0.5}
    assert evaluation_numbers({"": (2.0, 7, pairs, {})}) == told
    assert "eval/a/perplexity" not in evaluation_numbers({"a": (2.0, 7, pairs, {})})


def test_what_has_a_group_in_its_name_stays_in_it(tmp_path):
    with open_sinks(tmp_path, 0, RunFacts(), print) as sinks:
        sinks.write(1, {"eval/web/loss": 2.0, "eval_loss": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"eval/web/loss", "evaluation/eval_loss"}


def test_metrics_that_cannot_be_written_end_the_run(tmp_path):
    with open_sinks(tmp_path, 0, RunFacts(), print) as sinks:
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(UserError, match="cannot be written"):
            sinks.write(1, {"loss": 1.0})


def test_mlflow_is_left_alone_unless_told_of_a_server(monkeypatch):
    assert not MLflow.wanted()
    with open_sinks(None, 0, RunFacts(), print) as sinks:
        sinks.write(1, {"loss": 1.0})
        assert sinks.state() == {}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "x")
    assert MLflow.wanted()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"output_dir": None}, "--register_model sends what --output_dir has"),
        ({"output_dir": "s3://bucket/model"}, "from a disk"),
        ({"register_model": "main..chat"}, "no name of a model"),
        ({"register_model": "main/chat"}, "no name of a model"),
        ({"tokenizer": None}, "name one with --tokenizer"),
        ({}, "needs MLflow"),
    ],
)
def test_a_model_that_could_not_be_registered_is_refused_at_the_start(given, why):
    given = {"register_model": "main.chat.mine", "output_dir": "out", "tokenizer": "t"} | given
    args = TrainArguments(register_model=given["register_model"], output_dir=given["output_dir"])
    with pytest.raises(UserError, match=why):
        check_registers(args, given["tokenizer"])
    check_registers(TrainArguments(), None)


class RecordedRun:
    """What of Weights & Biases' public API the sink calls, with what it is given."""

    id, offline, url = "abc", False, "https://wandb.ai/me/p/runs/abc"

    def __init__(self, calls):
        self.calls, self.dir = calls, "files"

    def define_metric(self, name, **given):
        self.calls.append(("define_metric", name, given))

    def log(self, values):
        self.calls.append(("log", values))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


@pytest.fixture
def recorded(monkeypatch):
    calls = []

    def init(**given):
        calls.append(("init", given | {"settings": vars(given["settings"])}))
        return RecordedRun(calls)

    module = SimpleNamespace(init=init, Settings=SimpleNamespace, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.mark.parametrize("known", [None, "abc"])
def test_weights_and_biases_gets_all_numbers(known, recorded, monkeypatch, tmp_path):
    assert not WeightsAndBiases.wanted()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert not WeightsAndBiases.wanted()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "p")
    said = []
    with open_sinks(tmp_path, 0, RunFacts({"seq_len": 64}, wandb=known), said.append) as sinks:
        sinks.write(3, {"loss": 2.0, "eval/web/loss": 1.0})
        assert sinks.state() == {"wandb": "abc"}
    (_, given), *rest = recorded
    assert given["settings"].pop("init_timeout") == 10
    assert given == {
        **{"project": "p", "dir": str(tmp_path), "config": {"seq_len": 64}, "id": known},
        **{"resume": known and "allow", "settings": given["settings"]},
    }
    assert rest == [
        ("define_metric", "*", {"step_metric": "step"}),
        ("log", {"step": 3, "loss": 2.0, "eval/web/loss": 1.0}),
        ("finish", 0),
    ]
    assert said == ["Weights & Biases run abc at https://wandb.ai/me/p/runs/abc"]


def test_weights_and_biases_that_does_not_answer_ends_no_run(recorded, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setattr(RecordedRun, "log", lambda *_: 1 / 0)
    said = []
    with open_sinks(tmp_path, 0, RunFacts(), said.append) as sinks:
        sinks.write(1, {"loss": 2.0})
    gone = "warning: Weights & Biases failed (division by zero) and gets no more metrics; training goes on"
    assert said[1:] == [gone]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_weights_and_biases_offline(monkeypatch, tmp_path):
    """The real one, where it is installed."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    said = []
    with open_sinks(tmp_path, 0, RunFacts({"seq_len": 64}), said.append) as sinks:
        sinks.write(1, {"loss": 2.0, "eval/web/loss": 1.0})
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    begun = time.monotonic()
    while b"eval/web/loss" not in file.read_bytes():  # which its process writes
        assert time.monotonic() < begun + 60
        time.sleep(0.1)
    assert len(said) == 1
