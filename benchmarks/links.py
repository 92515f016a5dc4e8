"""A step over a slow link: two ranks on two machines, made of namespaces, in each of four layouts.

    python -m benchmarks.links               27.4 M parameters at 100 Mbit/s, 1 Gbit/s and unshaped: 10 minutes
    python -m benchmarks.links --steps 1 --layouts pipe --rates 1000
    python -m benchmarks.links --evaluation        micro-batches a second that a pipeline evaluates, 50 ms apart

Needs root, for namespaces (:mod:`benchmarks.hosts`). Prints a table: seconds of a step (the median of those after the
first) and megabytes that both machines sent for it, evaluation and start left out. The processor is shared by both
machines: what is to be read is how steps grow from the unshaped link to slower ones.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.hosts import Hosts, why_not
from fft.console import format_table

#: A model of 27.4 million parameters, and rows of a step, the same 8 in every layout.
_MODEL: dict[str, Any] = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "vocab_size": 4096}
_MODEL |= {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False}
TOKENS, _ROWS = 512, 8
#: What is evaluated, which takes next to no time to compute, and rows of the tables.
_SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "num_hidden_layers": 2}
_SHORT, _TABLE = 64, 64
#: Layouts by their flags.
_LAYOUTS = {
    "pipe": f"--pipe_parallel_size 2 --gradient_accumulation_steps {_ROWS}",
    "tensor": f"--model_parallel_size 2 --gradient_accumulation_steps {_ROWS}",
    "data": f"--gradient_accumulation_steps {_ROWS // 2}",
    "sequence": f"--sequence_parallel_size 2 --gradient_accumulation_steps {_ROWS}",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed, after a first")
    parser.add_argument("--layouts", nargs="+", choices=_LAYOUTS, default=[*_LAYOUTS])
    parser.add_argument("--rates", type=float, nargs="+", default=[100, 1000, 0], help="Mbit/s each way; 0: unshaped")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--evaluation", action="store_true", help="of a pipeline over a link with a delay, instead")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds that the link then takes, each way")
    args = parser.parse_args(argv)
    if (reason := why_not()) is not None:
        parser.error(f"no machines can be made here: {reason}")
    rows = []
    with tempfile.TemporaryDirectory() as folder, Hosts(2, Path(folder, "hosts")) as hosts:
        if args.evaluation:
            write_inputs(Path(folder), _MODEL | _SMALL, _SHORT)
            rate = evaluated_over(hosts, Path(folder), args.delay)
            print(f"{rate:.1f} micro-batches a second, {args.delay} s each way")
            return
        write_inputs(Path(folder))
        for layout in args.layouts:
            hosts.shape(None)
            start = run_over(hosts, Path(folder), _LAYOUTS[layout], 1, args.dtype)[1]
            for rate in args.rates:
                hosts.shape(rate * 1e6 or None)
                seconds, sent = run_over(hosts, Path(folder), _LAYOUTS[layout], args.steps + 1, args.dtype)
                link, sent = f"{rate:g} Mbit/s" if rate else "unshaped", (sent - start) / args.steps
                rows.append((f"{layout} 2", link, f"{seconds:.2f}", f"{sent / 1e6:.1f}"))
                print(*rows[-1], file=sys.stderr, flush=True)
    print(format_table(("layout", "link", "seconds a step", "MB sent a step"), rows))


def run_over(hosts: Hosts, folder: Path, layout: str, steps: int, dtype: str) -> tuple[float, int]:
    """Train a ``layout``, its flags, for some steps over two machines: the median step after the first, in seconds (0
    where there is none), and the bytes that both have sent from start to end. ``folder`` has the inputs.

    Raises RuntimeError, with the end of the log, where the run fails.
    """
    before = sum(hosts.sent())
    ranks = _started(hosts, folder, f"--seq_len {TOKENS} --max_steps {steps} --dtype {dtype} {layout}")
    if any([rank.wait() for rank in ranks]):
        raise RuntimeError((folder / "log").read_text(encoding="utf-8")[-3000:])
    ends = [line["seconds"] for line in _metrics(folder) if "seconds" in line]
    return statistics.median(np.diff(ends)) if len(ends) > 1 else 0.0, sum(hosts.sent()) - before


def evaluated_over(hosts: Hosts, folder: Path, delay: float) -> float:
    """Micro-batches a second, of 64 tokens of a small model, that two stages evaluate over a link that takes ``delay``
    seconds each way.

    Raises RuntimeError, with the end of the log, where the run fails.
    """
    hosts.disturb(delay, 0.0)
    flags = f"--seq_len {_SHORT} --max_steps 1 --dtype fp32 {_LAYOUTS['pipe']} --eval_data {folder / 'table'}"
    ranks, times = _started(hosts, folder, flags), {}
    while any([rank.poll() is None for rank in ranks]):
        for line in _metrics(folder):
            for name in line.keys() & {"loss", "eval_loss"} if line["step"] == 1 else ():
                times.setdefault(name, time.perf_counter())
        time.sleep(0.005)
    if any(rank.returncode for rank in ranks):
        raise RuntimeError((folder / "log").read_text(encoding="utf-8")[-3000:])
    return _TABLE / (times["eval_loss"] - times["loss"])


def _started(hosts: Hosts, folder: Path, flags: str) -> list[subprocess.Popen]:
    """A rank on each machine, whose run and log are in ``folder``."""
    given = f"--init --model {folder / 'config.json'} --train_data {folder / 'table'} --logging_steps 1"
    given += f" --checkpoint {folder / 'run'} --overwrite {flags}"
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "fft.train", *given.split()]
    with open(folder / "log", "w", encoding="utf-8") as log:
        return [hosts.start(host, *command, env=hosts.rank(host, threads), stdout=log, stderr=log) for host in range(2)]


def _metrics(folder: Path) -> list[dict[str, float]]:
    """The whole lines that a run has written so far."""
    file = folder / "run" / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def write_inputs(folder: Path, model: dict[str, Any] = _MODEL, tokens: int = TOKENS) -> None:
    """The model's config and a table of random rows."""
    (folder / "config.json").write_text(json.dumps(model), encoding="utf-8")
    (folder / "table").mkdir()
    ids = np.random.default_rng(0).integers(0, model["vocab_size"], (_TABLE, tokens)).astype(np.int32)
    column = pa.array(list(ids), pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": column}), folder / "table" / "part-0.parquet")


if __name__ == "__main__":
    main()
