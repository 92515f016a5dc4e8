"""``train_on_cluster``: the losses of torchrun; cells that are cancelled, executors that are lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Queue

import psutil
import pytest
from conftest import BIN, ROOT
from device.token_tables import chain, write_table

from fft.checkpoint.run import LocalRun
from fft.errors import UserError
from fft.models.small import SIZES, VOCABULARY
from fft.spark import train_on_cluster
from spark.test_cluster import Cluster

pytestmark = pytest.mark.slow

STEPS, PATIENCE = 120, 240


class Notebook:
    """A process with a session, in which cells are run and cancelled; see :mod:`spark.train_driver`."""

    def __init__(self, master: str, secret: str = "") -> None:
        environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
        environment |= {"PYTHONPATH": str(ROOT), "AWS_SECRET_ACCESS_KEY": secret, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "spark" / "train_driver.py"), master],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.said: list[str] = []
        self._lines: Queue[str] = Queue()
        threading.Thread(target=lambda: [self._lines.put(line) for line in self.process.stdout], daemon=True).start()
        self.wait("came: session")

    def begin(self, **call: object) -> None:
        self.said.clear()
        print(json.dumps(call, default=str), file=self.process.stdin, flush=True)

    def wait(self, beginning: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self.said.append(self._lines.get(timeout=PATIENCE).rstrip("\n"))
            if self.said[-1].startswith(beginning):
                return self.said[-1]
        raise AssertionError("\n".join(self.said))

    def end(self) -> dict:
        return json.loads(self.wait("came: ").partition(" ")[2])

    def cancel(self) -> None:
        """What a notebook does to the cell that runs."""
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    """Settings of a run with two stages, but where it writes."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    table = write_table(folder / "table", chain(400, 60, VOCABULARY))
    return {
        **{"init": True, "model": folder / "config.json", "train_data": table, "seq_len": 64, "dtype": "fp32"},
        **{"pipe_parallel_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 9, "logging_steps": 10},
        **{"learning_rate": 1e-3, "lr_scheduler_type": "constant"},
    }


@pytest.fixture(scope="module")
def laptop():
    notebook = Notebook("local[2]", secret="not-to-be-seen")
    yield notebook
    notebook.close()


def losses(records: list[dict]) -> list[float]:
    return [record["loss"] for record in records if "loss" in record]


def torchrun(launch, flags: dict, processes: int, run: Path) -> list[float]:
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    done = launch(BIN / "torchrun", "--nproc_per_node", processes, "fft/train.py", *words, f"--checkpoint={run}")
    assert done.returncode == 0, done.stderr
    return losses([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])


def test_four_processes_of_a_local_session(laptop, launch, flags, tmp_path):
    """Two tasks of two ranks; the log comes line by line, credentials arrive and are not shown."""
    flags = flags | {"max_steps": 5, "logging_steps": 1}
    call = flags | {"checkpoint": tmp_path / "ours", "output_dir": tmp_path / "model"}
    laptop.begin(nodes=2, processes=2, **call)
    model, run, metrics = laptop.end()["result"]
    assert (model, run) == (str(tmp_path / "model"), str(tmp_path / "ours"))
    assert losses(metrics) == pytest.approx(torchrun(launch, flags, 4, tmp_path / "theirs"), rel=1e-6)
    told = "\n".join(laptop.said)
    assert sum(line.startswith("step ") for line in laptop.said) == 5
    assert "not-to-be-seen" not in told
    assert (tmp_path / "model" / "config.json").exists()
    assert not list(tmp_path.rglob("_fft_seen_*"))


def test_what_is_wrong_is_a_sentence(laptop, flags, tmp_path):
    """Before anything begins where that can be, else as the ranks say it; never a stack."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "part-0.parquet").write_text("no parquet")
    for call, sentence in (
        ({"train_data": tmp_path / "none"}, f"--train_data {tmp_path / 'none'} is not there on the driver: name"),
        ({"nodes": 3}, "`nodes`=3 are so many tasks at once, this session has room for 2: give fewer"),
        ({"learning_rat": 1}, "unrecognized arguments: --learning_rat=1 (did you mean --learning_rate?)"),
        ({"train_data": broken}, f"{broken}/part-0.parquet"),
    ):
        laptop.begin(**{"nodes": 2, **flags, "checkpoint": tmp_path / "run", **call})
        assert sentence in laptop.end()["error"]
        assert not [line for line in laptop.said if "Traceback" in line]
    assert not list(tmp_path.rglob("_fft_seen_*"))


def test_without_spark(flags, tmp_path):
    call = {**flags, "local": True, "use_gpu": False, "output_dir": tmp_path / "model"}
    with pytest.raises(UserError, match="with local=True there is one node"):
        train_on_cluster(nodes=2, **call)
    with pytest.raises(UserError, match="dry_run plans without a cluster"):
        train_on_cluster(dry_run=True, **call)
    said: list[str] = []
    result = train_on_cluster(processes=2, log=said.append, max_steps=1, **call)
    assert (result.model, result.run, result.metrics) == (str(tmp_path / "model"), None, [])
    assert any(line.startswith("step 1/1") for line in said)


@pytest.mark.thorough
def test_a_cancelled_cell_and_a_lost_executor(launch, flags, tmp_path_factory, tmp_path):
    """Each leaves a checkpoint to go on from; in the end the losses are those of a run that nothing happened to."""
    flags = flags | {"max_steps": STEPS, "save_steps": 20}
    straight = torchrun(launch, flags, 2, tmp_path / "straight")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    call = flags | {"checkpoint": tmp_path / "run", "resume": "auto"}
    notebook = Notebook(cluster.url)
    try:
        notebook.begin(nodes=2, **call)
        notebook.wait("step 10/")
        notebook.cancel()
        assert notebook.end() == {"interrupted": True}
        assert any("saved; the same command with --resume auto goes on" in line for line in notebook.said)
        saved = LocalRun(tmp_path / "run").steps()[-1]
        assert saved < STEPS

        notebook.begin(nodes=2, **call)
        notebook.wait(f"step {saved // 10 * 10 + 20}/")
        machine = psutil.Process(cluster.processes[1].pid)
        for process in [*machine.children(recursive=True), machine]:
            process.kill()
        lost = time.monotonic()
        assert "was lost, with its executor" in notebook.end()["error"]
        assert time.monotonic() - lost < 60

        notebook.begin(nodes=1, processes=2, **call)
        metrics = notebook.end()["result"][2]
        assert losses(metrics) == pytest.approx(straight, rel=1e-6)
    finally:
        notebook.close()
        cluster.stop()
