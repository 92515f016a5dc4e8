"""Ranks on machines made of namespaces: names, folders that are not shared, links that are slow or dead."""

import os
import re
import signal
import time

import numpy as np
import pytest
from conftest import SMALL, VOCAB, write_table
from forked import run_ranks, started
from test_parity import read_metrics
from thorough import thorough
from transformers import AutoConfig

from benchmarks.hosts import Hosts, why_not
from fft.models.in_process import write_random_model

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=f"no namespaces here: {why_not()}")]

LAYOUTS = {
    "data": "--gradient_accumulation_steps 2",
    "pipe": "--pipe_parallel_size 2 --gradient_accumulation_steps 4",
    "tensor": "--model_parallel_size 2 --gradient_accumulation_steps 4",
    "sequence": "--sequence_parallel_size 2 --gradient_accumulation_steps 4",
}
STEPS = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a model and a table."""
    folder = tmp_path_factory.mktemp("inputs")
    write_random_model(AutoConfig.for_model(**(SMALL | {"model_type": "llama"})), folder / "model", 0)
    rng = np.random.default_rng(0)
    write_table(folder / "table", [rng.integers(0, VOCAB, 32).astype(np.int32) for _ in range(160)])
    return folder


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two machines whose own names are at 127.0.1.1, as Debian's installer leaves them."""
    with Hosts(2, tmp_path_factory.mktemp("hosts"), "debian") as made:
        yield made


@pytest.fixture(autouse=True)
def whole(request):
    """Every test finds whole links."""
    yield
    if "hosts" in request.fixturenames:
        made = request.getfixturevalue("hosts")
        for host in range(made.count):
            made.mend(host)
        made.shape(None)


def flags(inputs, layout, output, *more, steps=STEPS):
    given = (
        f"--model {inputs / 'model'} --train_data {inputs / 'table'} --seq_len 32 --max_steps {steps} --dtype fp32 "
        f"--learning_rate 1e-2 --lr_scheduler_type constant --logging_steps 1 --checkpoint {output} {LAYOUTS[layout]}"
    )
    return [*given.split(), *map(str, more)]


def run_on(hosts, *argv, act=None, limit=180, **env):
    """A rank on each machine: exit codes, what each machine's log says, seconds since ``act(processes, log)`` said it
    had done something."""
    env = {"MASTER_ADDR": "host1", **env}
    with started(hosts.count, *argv, hosts=hosts, env=env) as (processes, streams):
        begun, deadline = time.monotonic(), time.monotonic() + limit
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
            if act is not None and act(processes, streams[1].read_text()):
                act, begun = None, time.monotonic()
        codes = [process.exitcode for process in processes]
        return codes, [stream.read_text() for stream in streams[1::2]], time.monotonic() - begun


@pytest.fixture(scope="module")
def one_process(inputs, tmp_path_factory):
    """Losses and validation of one process."""
    known = {}

    def of(steps=STEPS):
        if steps not in known:
            output = tmp_path_factory.mktemp("one") / "run"
            given = flags(
                inputs, "pipe", output, "--pipe_parallel_size", 1, "--eval_data", inputs / "table", steps=steps
            )
            done = run_ranks(1, *given)
            assert done.returncode == 0, done.stderr[-3000:]
            known[steps] = read_metrics(output)
        return known[steps]

    return of


def losses(steps):
    return [step["loss"] for step in steps]


@pytest.mark.parametrize("layout", [thorough(name) if name == "sequence" else name for name in LAYOUTS])
def test_layout_over_machines_equals_one_process(layout, inputs, hosts, one_process, tmp_path):
    """Also where every machine takes its own name for 127.0.1.1."""
    given = flags(inputs, layout, tmp_path / "run", "--eval_data", inputs / "table")
    codes, logs, _ = run_on(hosts, *given)
    assert codes == [0, 0], logs
    (expected, evaluated), (steps, found) = one_process(), read_metrics(tmp_path / "run")
    np.testing.assert_allclose(losses(steps), losses(expected), rtol=1e-6)
    np.testing.assert_allclose(found, evaluated, rtol=1e-6)


@pytest.mark.thorough
def test_slow_and_lossy_wire_changes_nothing_but_time(inputs, one_process, tmp_path):
    """50 ms each way; of 100 frames 5 are lost."""
    with Hosts(2, tmp_path / "hosts") as made:
        made.disturb(0.05, 0.05)
        codes, logs, _ = run_on(made, *flags(inputs, "pipe", tmp_path / "run"))
    assert codes == [0, 0], logs
    np.testing.assert_allclose(losses(read_metrics(tmp_path / "run")[0]), losses(one_process()[0]), rtol=1e-6)


def test_wrong_interface_is_named_on_all_machines(inputs, hosts, tmp_path):
    codes, logs, _ = run_on(hosts, *flags(inputs, "data", tmp_path / "run"), GLOO_SOCKET_IFNAME="lo")
    assert codes == [2, 2]
    said = r"error: rank 0 \(on host1\) does not reach rank 1 \(on host2\) at 127.0.0.1, port \d+ \(.*\): that address "
    said += "is host2's alone; set GLOO_SOCKET_IFNAME there to the interface that other machines reach, or give "
    for log in logs:
        assert re.search(said + "torchrun --local_addr its address.", log), log


@pytest.mark.thorough
def test_interface_that_is_not_there(inputs, hosts, tmp_path):
    codes, logs, _ = run_on(hosts, *flags(inputs, "data", tmp_path / "run"), GLOO_SOCKET_IFNAME="ib7")
    assert codes == [2, 2]
    for log in logs:
        assert "error: GLOO_SOCKET_IFNAME is ib7, and host1 has no such interface with an address: it has lo" in log


@pytest.mark.thorough
def test_unknown_name_of_the_first_machine(inputs, hosts, tmp_path):
    def over(processes, log):
        if processes[1].exitcode is not None:
            return "waiting for rank 1 of 2" in log and (processes[0].kill() or True)  # it would wait for ten minutes
        return False

    hosts.name(1, "none")
    try:
        codes, logs, _ = run_on(hosts, *flags(inputs, "data", tmp_path / "run"), act=over, limit=120)
    finally:
        hosts.name(1, "debian")
    assert codes[1] == 2, logs
    assert "waiting for rank 1 of 2" in logs[0]
    assert "error: rank 1 (on host2) does not know the name host1 (MASTER_ADDR): give torchrun" in logs[1]


@pytest.mark.parametrize("flag", ["--checkpoint", "--output_dir", "--train_data", "--model"])
def test_folder_that_is_not_shared_is_named(flag, inputs, hosts, tmp_path):
    name = {"--train_data": "table", "--model": "model"}.get(flag, "new")
    if name != "new":
        hosts.shell(0, f"rm -rf {hosts.disk / name}; cp -r {inputs / name} {hosts.disk}")
    given = flags(inputs, "tensor", tmp_path / "run", flag, hosts.disk / name, "--save_steps", 1)
    codes, logs, seconds = run_on(hosts, *given)
    assert codes == [2, 2], logs
    assert seconds < 60
    place = hosts.disk / name
    said = {
        "--train_data": f"error: rank 1 (on host2): {place} does not exist: give a folder",
        "--model": f"error: rank 1 (on host2): --model {place} does not exist: give a ",
    }.get(flag, f"error: {flag} {place}: rank 1 (on host2) does not see what rank 0 (on host1) writes there: give a ")
    for log in logs:
        assert said in log
        assert "Traceback" not in log
        assert log.count("error: ") == 1


def test_output_of_one_machine_need_not_be_shared(inputs, hosts, tmp_path):
    """With replicas alone the first rank writes the whole model."""
    place = hosts.disk / "model-of-replicas"
    given = flags(inputs, "data", tmp_path / "run", "--output_dir", place, "--only_ckpt_model")
    codes, logs, _ = run_on(hosts, *given)
    assert codes == [0, 0], logs
    assert "model.safetensors" in hosts.shell(0, f"ls {place}")


STRAIGHT = 30


def test_dead_link_ends_all_ranks_and_one_machine_goes_on(inputs, hosts, one_process, tmp_path):
    def cut(_, log):
        if "step 7/" not in log:
            return False
        hosts.cut(1)
        return True

    hosts.shape(5e6)  # some 5 steps a second
    given = flags(inputs, "data", tmp_path / "run", "--save_steps", 2, "--timeout", 6, steps=STRAIGHT)
    codes, logs, seconds = run_on(hosts, *given, act=cut)
    assert codes == [75, 75], logs
    assert seconds < 30
    again = "; the same command with --resume auto goes on from the last checkpoint."
    for log, other in zip(logs, ("rank 1 (on host2)", "rank 0 (on host1)"), strict=True):
        assert re.search(rf"error: {re.escape(other)} has said nothing for \d+ s \(--timeout\){again}", log), log
        assert "Traceback" not in log
    assert len(read_metrics(tmp_path / "run")[0]) < STRAIGHT
    done = run_ranks(2, *given, "--resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from" in done.stderr
    np.testing.assert_allclose(losses(read_metrics(tmp_path / "run")[0]), losses(one_process(STRAIGHT)[0]), rtol=1e-5)


@pytest.mark.thorough
def test_dead_link_between_machines_that_both_reach_the_first(inputs, tmp_path):
    def part(_, log):
        if "step 4/" not in log:
            return False
        made.part(1, 2)
        return True

    with Hosts(3, tmp_path / "hosts") as made:
        given = flags(inputs, "data", tmp_path / "run", "--timeout", 6, steps=100_000)
        codes, logs, seconds = run_on(made, *given, act=part)
    assert codes == [75, 75, 75], logs
    assert seconds < 30
    said = r"error: rank (1|2) \(on host(2|3)\) has lost rank (2|1) \(on host(3|2)\), which has said nothing for \d+ s "
    for log in logs:
        assert re.search(said + r"\(--timeout\); the same command with --resume auto goes on", log), log
        assert "Traceback" not in log


def test_rank_that_stands_still_and_one_that_is_killed_are_named(inputs, hosts, tmp_path):
    stopped = []

    def halt(processes, log):
        if not stopped and "step 3/" in log:
            os.kill(processes[1].pid, signal.SIGSTOP)
            stopped.append(time.monotonic())
        if len(stopped) == 1 and "rank 1 (on host2) has said nothing for 10 s" in log:
            os.kill(processes[1].pid, signal.SIGCONT)
            stopped.append(time.monotonic())
        if len(stopped) == 2 and "stood still" in log:
            processes[1].kill()
            return True
        return False

    hosts.shape(5e6)
    codes, logs, seconds = run_on(hosts, *flags(inputs, "data", tmp_path / "run", steps=2000), act=halt)
    assert codes == [75, -signal.SIGKILL], logs
    assert seconds < 30
    assert re.search(r"warning: rank 1 \(on host2\) stood still for \d+ s", logs[0]), logs[0]
    assert "error: rank 1 (on host2) has ended without a word; the same command with --resume auto goes on" in logs[0]
