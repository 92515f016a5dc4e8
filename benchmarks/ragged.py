"""What `--ragged` saves, and what it costs where there is nothing to save: one table of chats, packed in three ways.

python -m benchmarks.ragged           # twelve short runs of the trainer, some four minutes on two cores

The documents are log-normal in length, 128 tokens in the median and 512 at most. `rows`: each is a row of its own, as
`repartition.py --pack none` leaves them; `best-fit` and `cut` are the trainer's `--pack`. Seconds are those of a step:
its mean number of tokens over the median rate of a run's last steps.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fft.console import format_table, say
from fft.data.batches import BatchPlan, step_batches
from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest
from fft.data.reader import SampleReader
from fft.data.table import Table
from fft.parallel.ring_plan import row_multiple

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
SEQ_LEN, MICRO_BATCHES, WARM, STEPS = 512, 4, 2, 12


def main() -> None:
    """Print tokens computed and seconds a step of every packing, with one stage and two."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        loose, packed = write_tables(Path(folder))
        config = Path(folder, "config.json")
        config.write_text(json.dumps({"model_type": "llama", **MODEL, **HEADS}))
        for name, table, pack in (("rows", packed, "cut"), ("best-fit", loose, "best-fit"), ("cut", loose, "cut")):
            for pipe in (1, 2):
                say(f"{name}, pipe {pipe} ...")
                given = ["--model", config, "--train_data", table, "--pack", pack, "--pipe_parallel_size", pipe]
                tokens = [tokens_of_a_step(table, pack, multiple) for multiple in (None, row_multiple(1))]
                rates = [train(Path(folder, "run"), pipe, *given, *more) for more in ((), ("--ragged",))]
                seconds = [count / rate for count, rate in zip(tokens, rates, strict=True)]
                rows.append([name, pipe, *map(round, tokens), *seconds, seconds[1] / seconds[0]])
    print(format_table(("table", "pipe", "tokens", "ragged", "s/step", "ragged s/step", "of fixed"), rows))


def write_tables(folder: Path) -> tuple[Path, Path]:
    """The same documents as rows to be packed, and as rows that a manifest says are packed."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(128), 0.8, 4000).astype(int).clip(2, SEQ_LEN)
    ids = pa.array([rng.integers(0, MODEL["vocab_size"], n).astype(np.int32) for n in lengths], pa.list_(pa.int32()))
    bounds = pa.array([[0, int(n)] for n in lengths], pa.list_(pa.int32()))
    for name in ("loose", "packed"):
        file = folder / name / "part-0.parquet"
        file.parent.mkdir()
        pq.write_table(pa.table({"input_ids": ids, "cu_seqlens": bounds}), file, row_group_size=1024)
    files = (FileInfo(file.name, len(lengths), int(lengths.sum()), file.stat().st_size),)
    commit(file.parent, Manifest(files, len(lengths), int(lengths.sum()), seq_len=SEQ_LEN))
    return folder / "loose", folder / "packed"


def train(run: Path, ranks: int, *given: object) -> float:
    """Tokens a second, the median over the steps of a run after the first ones."""
    flags = f"--init --seq_len {SEQ_LEN} --gradient_accumulation_steps {MICRO_BATCHES} --dtype fp32 --overwrite"
    steps = f"--max_steps {WARM + STEPS} --logging_steps 1 --checkpoint {run}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    command = [str(word) for word in [*launcher, "fft/train.py", *flags.split(), *steps.split(), *given]]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # of a rank, whatever their number
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return statistics.median([line["tokens_per_second"] for line in lines if "tokens_per_second" in line][WARM:])


def tokens_of_a_step(table: Path, pack: str, multiple: int | None) -> float:
    """The mean over the same steps."""
    reader = SampleReader(Table.open(str(table)), SEQ_LEN, seed=0, pack=pack)
    plan, firsts = BatchPlan(1, 0, MICRO_BATCHES, 1, multiple), range(0, (WARM + STEPS) * MICRO_BATCHES, MICRO_BATCHES)
    batches = [batch for first in firsts[WARM:] for batch in step_batches(reader, plan, first, 1 << 30)]
    return sum(len(batch.labels) for batch in batches) / STEPS


if __name__ == "__main__":
    main()
