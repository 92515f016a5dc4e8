"""Shuffle, repartition and packing: tokens/s as the table grows.

python -m benchmarks.shuffle                    # 25, 100 and 400 M tokens: some six minutes on 2 cores
python -m benchmarks.shuffle --millions 25 50   # a quick look
python -m benchmarks.shuffle --lake s3://bucket/bench   # on disks, then the same from store to store
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.lake import copied
from benchmarks.measure import run_measured
from fft.console import format_table, say
from fft.data.manifest import read_manifest
from fft.data.storage import Storage, is_url
from fft.data.views import view

ROOT = Path(__file__).resolve().parent.parent
MAX_LEN = 2048
VOCAB_SIZE = 32_000
_TOKENS_PER_FILE = 4_000_000


def main() -> int:
    """Make each table, run both jobs on it, print the table of rates."""
    args = _parse()
    work, rows = args.work.resolve(), []
    for millions in args.millions:
        source = work / f"documents-{millions}"
        documents = write_documents(source, millions * 1_000_000)
        for above in (work, *([copied(source, args.lake).rpartition("/")[0]] if args.lake else [])):
            rows += _measured(above, millions, documents, args)
        shutil.rmtree(source)
    header = ("job", "tokens", "documents", "seconds", "tokens/s", "cores", "peak MB", "unused %")
    print(f"{args.engine}, log-normal documents, {args.cores} cores, rows of {MAX_LEN}, start-up included")
    print(format_table(header, rows))
    return 0


def _measured(above: str | Path, millions: int, documents: int, args: argparse.Namespace) -> list[list[object]]:
    """The rows of both jobs below a folder of disk or store, where the documents are; what they write goes."""
    rows: list[list[object]] = []
    last = f"{above}/documents-{millions}"
    for job, flags in (("shuffle", ["--seed", 0]), ("repartition", ["--max_len", MAX_LEN, "--pack", "best-fit"])):
        output = f"{above}/{job}-{millions}"
        Storage.at(output).delete_folder()
        called = f"{job}, in a store" if is_url(output) else job
        say(f"{called}, {millions} M tokens ...")
        submit = ["spark-submit", "--master", f"local[{args.cores}]", "--driver-memory", "4g"]
        start = submit if args.engine == "spark" else [sys.executable]
        command = [*start, f"spark_jobs/{job}.py", "-i", last, "-o", output, *flags]
        environment = {**os.environ, "FFT_ENGINE": args.engine}
        cost = run_measured(command, ROOT, environment, args.work.resolve() / f"{job}-{millions}.log")
        made = read_manifest(view(output, fresh=True))
        if made is None:
            raise RuntimeError(f"{output} has no manifest")
        unused = made.lineage["counts"].get("unused_share")
        kept = "" if unused is None else f"{100 * unused:.3f}"
        rate, peak = round(made.tokens / cost.seconds), cost.peak_bytes / 2**20
        rows.append([called, made.tokens, documents, cost.seconds, rate, cost.cores, peak, kept])
        last = output
    for job in ("shuffle", "repartition"):
        Storage.at(f"{above}/{job}-{millions}").delete_folder()
    return rows


def write_documents(folder: Path, tokens: int) -> int:
    """Write a token table of log-normal documents (median 400 tokens) with Zipf ids; returns the documents.

    The lengths resemble those of web text; the ids compress about as text does.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    documents = 0
    for file in range(max(1, tokens // _TOKENS_PER_FILE)):
        rng = np.random.default_rng([0, file])
        lengths = np.empty(0, np.int64)
        while lengths.sum() < min(tokens, _TOKENS_PER_FILE):
            lengths = np.append(lengths, rng.lognormal(6, 1.2, 1000).astype(np.int64) + 1)
        offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
        ids = (rng.zipf(1.3, offsets[-1]) % VOCAB_SIZE).astype(np.int32)
        names = [[f"{file}-{i}"] for i in range(len(lengths))]
        columns = {"input_ids": pa.ListArray.from_arrays(offsets, ids), "doc_ids": names}
        pq.write_table(pa.table(columns), folder / f"part-{file:05d}.parquet", row_group_size=1024)
        documents += len(lengths)
    return documents


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shuffle", description=__doc__.split("\n\n")[0])
    parser.add_argument("--millions", type=int, nargs="+", default=[25, 100, 400], help="tokens, in millions")
    parser.add_argument("--engine", choices=["spark", "sail"], default="spark", help="default: Spark's JVM")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks", help="scratch folder")
    parser.add_argument("--lake", metavar="URL", help="within a store, too, whose credentials are set")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
