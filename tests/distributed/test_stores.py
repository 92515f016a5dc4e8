"""Runs whose every path is in an object store end as those on a disk do, whatever came between."""

import json
import os
import shutil
import signal
import time

import pytest
from conftest import SMALL
from forked import run_ranks
from pyarrow import fs
from store_proxy import BUSY, EXPIRED, proxied
from test_crashes import forked, wait_until

from fft.checkpoint.stored_run import run_at
from fft.data.views import view
from fft.weights.files import load_tensors

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def proxy(store, store_environment):
    with proxied(store_environment["AWS_ENDPOINT_URL"]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def fresh(proxy):
    """The store, which does as it is asked until it is told otherwise."""
    yield proxy
    proxy.rule = lambda method, path: None


@pytest.fixture(scope="module")
def local(tmp_path_factory, ragged_table):
    """A folder with a model, a table, and a run of two stages on them that nothing ended."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    given = ["--init", "--model", folder / "config.json", "--num_train_epochs", 0, "--dtype", "bf16"]
    assert run_ranks(1, *given, "--output_dir", folder / "model").returncode == 0
    shutil.copytree(ragged_table, folder / "table")
    done = run_ranks(2, *flags(folder, f"{folder}/run"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def lake(local, store):
    """The same model and table in the store."""
    for name in ("model", "table"):
        fs.copy_files(str(local / name), f"lake/stores/{name}", fs.LocalFileSystem(), store)
    return "s3://lake/stores"


def asking() -> dict[str, str]:
    """The variables by which ranks find the store: those of tests' processes were set before there was one."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def flags(place, run, steps=STEPS, output=None):
    return (
        f"--model {place}/model --train_data {place}/table --eval_data {place}/table --seq_len 64 --max_steps {steps} "
        f"--learning_rate 1e-2 --save_steps 2 --max_num_checkpoints 2 --gradient_accumulation_steps 8 "
        f"--logging_steps 1 --pipe_parallel_size 2 --checkpoint {run} --output_dir {output or place}/out"
    ).split()


def outcome(place, run):
    """Losses by their steps, the model, and the optimizer's state at the end."""
    lines = [json.loads(line) for line in run_at(run).text("metrics.jsonl").splitlines()]
    losses = [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    files = sorted(view(f"{place}/out").glob("*.safetensors"))
    files += sorted((run_at(run).view(f"step-{STEPS}") / "training").glob("rank-*"))
    tensors = {(file.name, name): t.tolist() for file in files for name, t in load_tensors(file).items()}
    return losses, {key: value for key, value in tensors.items() if not key[1].startswith("random/")}


@pytest.mark.thorough
def test_stopped_and_killed_while_sending(lake, local, fresh):
    run = f"{lake}/run"
    given = [*flags(lake, run), "--resume", "auto"]
    with forked(*given, env=asking()) as (ranks, job):
        wait_until(lambda: any(path.endswith("/step-2/SHA256SUMS") for _, path in fresh.asked), job)
        os.kill(ranks[0].pid, signal.SIGTERM)
        job.wait(180)
        said = job.said()
    assert "saved; the same command with --resume auto goes on" in said
    stopped = max(run_at(run).steps())
    assert stopped < STEPS - 2
    fresh.asked.clear()
    fresh.rule = lambda method, path: 5.0 if method == "PUT" and "/training/" in path else None
    with forked(*given, env=asking()) as (ranks, job):
        wait_until(lambda: any(method == "PUT" and "/training/" in path for method, path in fresh.asked), job)
        time.sleep(0.3)
        for rank in ranks:
            rank.kill()
    assert max(run_at(run).steps()) == stopped
    fresh.rule = lambda method, path: BUSY if len(fresh.asked) % 10 == 0 else None
    fresh.refused = 0
    done = run_ranks(2, *given, env=asking())
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"going on from {run}/step-{stopped}" in done.stderr
    assert "has no SHA256SUMS, it was left half done: removed" in done.stderr
    assert fresh.refused > 10
    assert outcome(lake, run) == outcome(local, local / "run")
    assert run_at(run).steps() == [STEPS - 2, STEPS]


def test_credentials_that_expire(lake, fresh):
    """The run ends with a sentence; what was saved stays as it is."""
    run = f"{lake}/expiring"
    fresh.rule = lambda method, path: EXPIRED if method != "HEAD" and "/step-4/" in path else None
    done = run_ranks(2, *flags(lake, run, 6, f"{lake}/expired"), env=asking())
    assert done.returncode != 0
    assert "error: a checkpoint could not be saved, the ones before it are intact: s3://" in done.stderr
    assert "ExpiredToken" in done.stderr
    fresh.rule = lambda method, path: None
    assert run_at(run).steps() == [2]


def test_a_run_on_a_disk_is_mirrored_and_found_there(lake, local, fresh, tmp_path):
    """A store that fails for a while costs nothing but time; a disk that is gone costs nothing either."""
    run, mirror = tmp_path / "run", f"{lake}/mirror"
    given = [*flags(local, run, output=tmp_path), "--upload", mirror]
    given[given.index("--max_steps") + 1] = "6"
    fresh.refused = 0
    fresh.rule = lambda method, path: EXPIRED if "/mirror/step-" in path and fresh.refused < 2 else None
    done = run_ranks(2, *given, env=asking())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning: --upload: " in done.stderr
    assert run_at(mirror).steps() == [4, 6]
    shutil.rmtree(run)
    given[given.index("--max_steps") + 1] = str(STEPS)
    done = run_ranks(2, *given, "--resume", "auto", "--overwrite", env=asking())
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"going on from {mirror}/step-6" in done.stderr
    assert run_at(run).steps() == run_at(mirror).steps() == [STEPS - 2, STEPS]
    assert outcome(tmp_path, mirror)[1] == outcome(tmp_path, run)[1]
    assert [step for step, *_ in outcome(tmp_path, mirror)[0]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("flag", ["--checkpoint", "--output_dir"])
def test_places_that_cannot_be_written_to(flag, lake, local, fresh):
    """Found out before the first step."""
    fresh.rule = lambda method, path: EXPIRED if method in ("PUT", "POST") and "/denied" in path else None
    given = flags(local, f"{local}/other", output=f"{local}/others")
    given[given.index(flag) + 1] = f"{lake}/denied"
    given[given.index("--pipe_parallel_size") + 1] = "1"
    done = run_ranks(1, *given, env=asking())
    assert done.returncode == 2
    assert f"error: {flag} {lake}/denied cannot be written to (" in done.stderr
