"""Whatever ends a run, and wherever: ``--resume auto`` ends with the losses of a run that nothing ended."""

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT, SMALL
from forked import run_ranks, started
from safetensors.torch import load_file
from test_parity import command, read_metrics
from thorough import thorough

from fft.checkpoint.folder import checkpoint_steps, checkpoint_tag, fault, locked

pytestmark = pytest.mark.slow
#: Kills of one run: ``FFT_KILLS=20`` takes some minutes more.
KILLS = int(os.environ.get("FFT_KILLS", "4"))
STEPS, SEED = max(30, 3 * KILLS), 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(SMALL | {"model_type": "llama"}))
    return file


def flags(model, table, output, steps=STEPS, batch=8):
    return (
        f"--init --model {model} --train_data {table} --seq_len 64 --max_steps {steps} --learning_rate 1e-2 "
        f"--save_steps 2 --max_num_checkpoints 3 --gradient_accumulation_steps {batch} --logging_steps 1 "
        f"--checkpoint {output}/run --output_dir {output}/model"
    ).split()


@contextlib.contextmanager
def running(*words):
    """A job in the background; on leaving, all of it is gone."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([str(w) for w in words], cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            yield psutil.Process(process.pid), process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                kill(psutil.Process(process.pid), everything=True)


@contextlib.contextmanager
def forked(*argv, env: dict[str, str] | None = None):
    """:func:`running` two ranks without a launcher, which start in a third of the time."""
    with started(2, *argv, env=env) as (processes, (_, stderr)):

        def poll():
            return None if all(p.is_alive() for p in processes) else max(abs(p.exitcode or 0) for p in processes)

        def wait(timeout):
            for process in processes:
                process.join(timeout)
            return poll()

        yield processes, SimpleNamespace(poll=poll, wait=wait, said=stderr.read_text)


def kill_forked(processes, everything: bool, rng: random.Random) -> None:
    """SIGKILL to all ranks, or to one and then, as a launcher would, to its neighbours."""
    first = processes if everything else [rng.choice(processes)]
    for process in first:
        process.kill()
    for process in first:
        process.join()
    for process in processes:
        process.kill()


def ranks(job: psutil.Process) -> list[psutil.Process]:
    """The trainers among a job's processes."""
    found = []
    for process in [job, *job.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if any("fft/train.py" in word or "fft.train" in word for word in words) and "RANK" in process.environ():
                found.append(process)
    return found


def kill(job: psutil.Process, everything: bool, rng: random.Random | None = None) -> None:
    """SIGKILL to the whole job at once, or to one rank, whose neighbours the launcher then ends."""
    with contextlib.suppress(psutil.NoSuchProcess):
        victims = [job, *job.children(recursive=True)] if everything else [rng.choice(ranks(job))]
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if everything:  # the job itself is its Popen's to wait for
            psutil.wait_procs(victims[1:], timeout=30)


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def wait_until(condition, process) -> None:
    deadline = time.monotonic() + 300
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def outcome(output: Path):
    steps, _ = read_metrics(output / "run")
    tensors = {}
    for file in (output / "model").glob("*.safetensors"):
        tensors |= {name: value.tolist() for name, value in load_file(file).items()}
    return [(s["step"], s["loss"], s["grad_norm"]) for s in steps], tensors


@pytest.fixture(scope="module")
def straight(tmp_path_factory, model, ragged_table):
    """A run of two stages that nothing ends."""
    output = tmp_path_factory.mktemp("straight")
    done = run_ranks(2, *flags(model, ragged_table, output), "--pipe_parallel_size", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    return outcome(output)


def test_crashes_at_random_steps(straight, model, ragged_table, tmp_path):
    """Kills of one rank or of all, at random steps, half of them while a checkpoint is being written.

    Every fifth job is a real launcher's.
    """
    rng, run = random.Random(SEED), tmp_path / "run"
    given = [*flags(model, ragged_table, tmp_path), "--pipe_parallel_size", "2", "--resume", "auto"]
    within_saves = crashes = 0
    for number in range(KILLS):
        within = number % 2 == 0
        launched = number % 5 == 0
        with running(*command("torchrun", 2), *given) if launched else forked(*given) as (job, process):
            before, after = lines(run), rng.randint(1, 6)
            wait_until(lambda b=before, a=after: lines(run) not in range(b - 9, b + a), process)
            if within:
                wait_until(lambda: any(run.glob(".step-*.writing")), process)
                within_saves += any(run.glob(".step-*.writing"))
            else:
                time.sleep(rng.random() / 20)
            crashes += process.poll() is None
            (kill if launched else kill_forked)(job, everything=rng.random() < 0.5, rng=rng)
            if process.wait(180) == 0:
                break
    assert crashes >= KILLS / 2
    assert within_saves >= max(1, KILLS * 3 // 20)
    done = run_ranks(2, *given, "--overwrite")
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(tmp_path) == straight
    left = {path.name for path in run.iterdir()}
    kept = {checkpoint_tag(step) for step in (STEPS - 4, STEPS - 2, STEPS)}
    assert left == kept | {
        "metrics.jsonl",
        "loss.svg",
        "tensorboard",
        "arguments.yaml",
        "environment.yaml",
        "data.yaml",
        "latest",
        ".lock",
    }


def stopped_in_the_middle(words, pick, number):
    """Start a job, send a signal to one of its processes after some steps; returns its exit code and what it said."""
    output = Path(words[words.index("--output_dir") + 1]).parent
    with running(*words) as (job, process):
        wait_until(lambda: lines(output / "run") > 5, process)
        pick(job).send_signal(number)
        said = process.communicate(timeout=180)[1]
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGTERM, thorough(signal.SIGINT)])
def test_asked_to_stop(number, straight, model, ragged_table, tmp_path):
    """One process on its own: the exit code says "saved, try again", and the next launch ends as the straight run."""
    given = flags(model, ragged_table, tmp_path)
    code, said = stopped_in_the_middle([*command("python", 1), *given], lambda job: job, number)
    assert code == 75, said
    newest = max(checkpoint_steps(tmp_path / "run"))
    assert f"after step {newest}/{STEPS}: saved; the same command with --resume auto goes on" in said
    assert not (tmp_path / "model").exists()
    done = run_ranks(1, *given, "--resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [loss for _, loss, _ in outcome(tmp_path)[0]] == pytest.approx(
        [loss for _, loss, _ in straight[0]], rel=2e-2
    )
    assert len(outcome(tmp_path)[0]) == STEPS


def test_one_rank_is_asked_to_stop(straight, model, ragged_table, tmp_path):
    """A node that is reclaimed: only its rank gets the signal, all of them save and end after the same step."""
    given = [*flags(model, ragged_table, tmp_path), "--pipe_parallel_size", "2"]
    _, said = stopped_in_the_middle([*command("torchrun", 2), *given], lambda job: ranks(job)[-1], signal.SIGTERM)
    assert "stopped by the signal" in said
    done = run_ranks(2, *given, "--resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(tmp_path) == straight


@pytest.fixture
def adopted():
    """The exit codes of whatever a launcher that is killed leaves behind: this process becomes its parent."""
    subreaper = 36
    assert ctypes.CDLL(None).prctl(subreaper, 1) == 0
    codes: list[int] = []

    def collect(processes):
        for process in processes:
            with contextlib.suppress(ChildProcessError):  # somebody else's child
                codes.append(os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1]))
        return codes

    yield collect
    ctypes.CDLL(None).prctl(subreaper, 0)


@pytest.mark.parametrize(("launcher", "number"), [("deepspeed", signal.SIGTERM), thorough("torchrun", signal.SIGKILL)])
def test_ranks_save_and_end_when_their_launcher_is_gone(launcher, number, adopted, model, ragged_table, tmp_path):
    given = [*flags(model, ragged_table, tmp_path, 5000), "--pipe_parallel_size", "2", "--save_steps", "100000"]
    with running(*command(launcher, 2), *given) as (job, process):
        wait_until(lambda: lines(tmp_path / "run") > 5, process)
        below = job.children(recursive=True)
        job.send_signal(number)
        said = process.communicate(timeout=180)[1]  # the ranks have its stderr until they end
    # DeepSpeed has a process between its command and the ranks, whose code it passes on; torchrun's are our own.
    codes = adopted(below)
    assert codes == [75] * {"deepspeed": 1, "torchrun": 2}[launcher]
    assert "stopped because the launcher is gone after step" in said
    (step,) = checkpoint_steps(tmp_path / "run")
    assert fault(tmp_path / "run" / checkpoint_tag(step)) is None
    with locked(tmp_path / "run"):
        pass


@pytest.fixture(scope="module")
def half(tmp_path_factory, model, ragged_table):
    """The folder of a run with checkpoints of steps 2, 4 and 6."""
    output = tmp_path_factory.mktemp("half")
    done = run_ranks(1, *flags(model, ragged_table, output, 6))
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture
def go_on(half, model, ragged_table, tmp_path):
    """Go on with a copy of that run; ``before`` is called with its folder."""

    def run(before, *more):
        shutil.copytree(half / "run", tmp_path / "run")
        before(tmp_path / "run")
        return run_ranks(1, *flags(model, ragged_table, tmp_path, 8), "--resume", "auto", *more)

    return run


HARM = {
    "model.safetensors": lambda file: file.write_bytes(bytes(reversed(file.read_bytes()))),
    "training/rank-00000.safetensors": lambda file: os.truncate(file, 1000),
    "config.json": Path.unlink,
}


@pytest.mark.parametrize("name", HARM)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(name, go_on, tmp_path):
    done = go_on(lambda run: HARM[name](run / "step-6" / name))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"warning: {tmp_path / 'run' / 'step-6' / name} " in done.stderr
    assert f"going on from {tmp_path / 'run' / 'step-4'}" in done.stderr
    assert (tmp_path / "run" / ".step-6.bad").is_dir()
    assert checkpoint_steps(tmp_path / "run") == [4, 6, 8]


@pytest.mark.parametrize("name", ["model.safetensors", "training/state.json"])
def test_ranks_agree_about_a_damaged_checkpoint(name, half, model, ragged_table, tmp_path):
    """Each reads a part of the files: what one finds is everybody's."""
    shutil.copytree(half / "run", tmp_path / "run")
    os.truncate(tmp_path / "run" / "step-6" / name, 10)
    done = run_ranks(2, *flags(model, ragged_table, tmp_path, 8, 4), "--resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"going on from {tmp_path / 'run' / 'step-4'}" in done.stderr
    assert [line for line, *_ in outcome(tmp_path)[0]] == list(range(1, 9))


def test_when_none_is_whole_the_run_does_not_start_over(go_on, tmp_path):
    def harm(run):
        for file in run.glob("step-*/model.safetensors"):
            os.truncate(file, 1000)

    done = go_on(harm)
    assert done.returncode == 2
    assert f"--resume auto: no checkpoint of {tmp_path / 'run'} is whole" in done.stderr
    assert checkpoint_steps(tmp_path / "run") == [2, 4, 6]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--dtype", "fp32"], "was trained in bf16"),
        (["--gradient_accumulation_steps", "4"], "the global batch is 4 samples"),
        (["--seed", "1"], "the data's seed is 1, that of the run to be resumed 0"),
        (["--resume", "step-4"], "holds newer checkpoints, which would no longer belong to the run (step-6)"),
        (["--resume", "step-5"], "is no checkpoint"),
    ],
)
def test_going_on_with_something_else_is_refused(more, said, go_on):
    done = go_on(lambda run: None, *more)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("error:") == 1


def test_a_full_disk_stops_the_run_and_costs_no_older_checkpoint(half, model, ragged_table, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        shutil.copytree(half / "run", disk / "run")
        given = flags(model, ragged_table, disk, 8)
        given[given.index("--max_num_checkpoints") + 1] = "9"
        done = run_ranks(1, *given, "--resume", "auto")
        assert done.returncode == 2, done.stderr[-3000:]
        assert "a checkpoint could not be saved, the ones before it are intact: " in done.stderr
        assert "No space left on device" in done.stderr
        assert checkpoint_steps(disk / "run") == [2, 4, 6]
        assert fault(disk / "run" / "step-6") is None
    finally:
        subprocess.run(["umount", disk], check=True)
