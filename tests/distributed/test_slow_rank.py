"""A rank that is stopped for a while, shorter than --timeout, leaves its trace; two real ranks."""

import json
import os
import signal
import socket
import time

import numpy as np
import pytest
from conftest import SMALL, VOCAB, write_table
from forked import started
from transformers import AutoConfig

from fft.models.in_process import write_random_model

#: Seconds that the rank is stopped for, and what a test waits for its trace at most.
STOPPED, PATIENCE = 2.5, 120


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_random_model(AutoConfig.for_model(**(SMALL | {"model_type": "llama"})), folder / "model", 0)
    rng = np.random.default_rng(0)
    write_table(folder / "table", [rng.integers(0, VOCAB, 32).astype(np.int32) for _ in range(64)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "than"),
    [
        ("--gradient_accumulation_steps 2", "the other ranks of its stage"),
        ("--pipe_parallel_size 2 --gradient_accumulation_steps 4", "before"),
    ],
)
def test_rank_that_was_stopped_leaves_its_trace(layout, than, inputs, tmp_path):
    run = tmp_path / "run"
    given = (
        f"--model {inputs / 'model'} --train_data {inputs / 'table'} --seq_len 32 --max_steps 100000 --dtype fp32 "
        f"--lr_scheduler_type constant --logging_steps 4 --checkpoint {run} {layout}"
    )
    with started(2, *given.split()) as (processes, streams):
        deadline = time.monotonic() + PATIENCE

        def seen(look):
            while not (found := look(log := streams[1].read_text())) and time.monotonic() < deadline:
                assert all(process.is_alive() for process in processes), log[-3000:]
                time.sleep(0.02)
            assert found, log[-3000:]
            return found

        def trace(_):
            """The step of a line in which the rank lost the time; a machine with much to do may have made others."""
            for text in (run / "metrics.jsonl").read_text().splitlines(keepends=True):
                line = json.loads(text) if text.endswith("\n") else {}
                if line.get("rank_behind") == 1 and 4 * (line["rank_work"][1] - line["rank_work"][0]) > 0.8 * STOPPED:
                    return line
            return None

        seen(lambda log: "step 16/" in log)
        os.kill(processes[1].pid, signal.SIGSTOP)
        time.sleep(STOPPED)
        os.kill(processes[1].pid, signal.SIGCONT)
        line = seen(trace)
        assert line["slowest_rank"] == 1
        assert line["slowest_rank_seconds"] == line["rank_work"][1] > line["fastest_rank_seconds"]
        assert line["rank_wait"][0] > line["rank_wait"][1]
        rank, times = f"rank 1 (on {socket.gethostname()})", f"{line['rank_behind_times']:.1f} times as long as {than}"
        sentence = f"warning: {rank} took {times} for steps {line['step'] - 3:,} to {line['step']:,}"
        seen(lambda log: sentence in log)
