"""Whether data keeps a device waiting: the loader's rate, and the wait that a real run reports of its steps."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.device.frame import Cases, Row, Setting
from benchmarks.device.machine import ROOT
from benchmarks.loader import make_table
from fft.data.table import Table


def cases(setting: Setting) -> Cases:
    """Rows of two lengths: the longer, the more of a row group a sample is."""
    for seq_len in (128,) if setting.smallest else (2048, 8192):
        yield f"rows of {seq_len}", functools.partial(wait, seq_len, setting)


def wait(seq_len: int, setting: Setting) -> list[Row]:
    """Train a small model, whose steps are short, from a table; the slowest case that a loader meets."""
    steps, hidden, tokens = (6, 64, 100_000) if setting.smallest else (60, 1024, 50_000_000)
    with tempfile.TemporaryDirectory() as folder:
        table, run = make_table(Path(folder, "table"), tokens, seq_len), Path(folder, "run")
        model = Path(folder, "config.json")
        sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 4, "vocab_size": 32_000}
        model.write_text(json.dumps(sizes | {"model_type": "llama", "num_attention_heads": 8}), encoding="utf-8")
        flags = {"model": model, "train_data": table, "checkpoint": run, "seq_len": seq_len, "max_steps": steps}
        flags |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "logging_steps": steps // 2}
        command = [sys.executable, "-m", "fft.train", "--init", "--only_ckpt_model"]
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-1000:])
        lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        shown = [line for line in lines if "data_wait" in line][-1]
        rows = Table.open(table).rows
    return [
        {
            "rows": f"{rows:,} of {seq_len:,} tokens",
            "trained tokens/s": float(shown["tokens_per_second"]),
            "waited for data %": 100 * float(shown["data_wait"]),
        }
    ]
