"""Tokens a second from a token table into training batches: ours beside other loaders and plain decoding.

python -m benchmarks.loader                           # 104 M tokens, all loaders; installs the peers first
python -m benchmarks.loader --millions 10 100 1000 --only pyarrow fft   # does memory grow with the table?
python -m benchmarks.loader --only fft --ranks 4      # does memory grow with the ranks of a node?
python -m benchmarks.loader --lake s3://bucket/bench  # from a store, by ours and MosaicML's, which converts first
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.lake import copied
from fft.console import format_table, say
from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest, read_manifest

ROOT = Path(__file__).resolve().parent.parent
#: Without their dependencies, of which some name another torch; what they import is named, or is here already.
PEERS = {
    "datasets": ["datasets==5.2.0", "dill", "multiprocess", "xxhash", "aiohttp", "httpx"],
    "mosaic": [
        *("mosaicml-streaming==0.13.0", "catalogue", "python-snappy", "cramjam", "zstd", "brotli", "xxhash"),
        *("boto3", "botocore", "s3transfer", "jmespath"),
    ],
    "litdata": [
        *("litdata==0.2.76", "lightning-utilities", "boto3", "botocore", "s3transfer", "jmespath"),
        *("requests", "urllib3", "charset-normalizer", "certifi"),
    ],
}
LOADERS = ("pyarrow", "fft", *PEERS)
#: Those that are asked to read from a store.
OF_STORES = ("fft", "mosaic")
VOCAB, GROUP_TOKENS, FILES = 32_000, 1 << 20, 8


def main() -> int:
    """Make the tables, run each loader in a process of its own, print a table for each size."""
    args = _parse()
    work = args.work.resolve()
    for millions in args.millions:
        table = make_table(work / f"tokens-{millions}-{args.seq_len}", millions * 1_000_000, args.seq_len)
        asked = args.only or (LOADERS if args.lake is None else OF_STORES)
        loaders = [name for name in asked if name not in PEERS or peer_environment(work, name)]
        place = table if args.lake is None else copied(table, args.lake)
        costs = {name: run(name, place, args, work) for name in loaders}
        say("")
        cores = len(os.sched_getaffinity(0))
        print(
            f"{millions} M tokens, rows of {args.seq_len}, batches of {args.batch}, {args.ranks} rank(s), {cores} cores"
        )
        print(_table(costs))
    return 0


def make_table(folder: Path, tokens: int, seq_len: int) -> Path:
    """A packed table of Zipf-distributed ids, three documents a row, as repartition.py would write it."""
    if folder.exists() and read_manifest(folder) is not None:
        return folder
    say(f"making {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.2, 1 << 22), VOCAB - 1).astype(np.int32)
    rows = tokens // seq_len // FILES
    files = []
    for number in range(FILES):
        path = folder / f"part-{number:05d}.parquet"
        with pq.ParquetWriter(path, _SCHEMA, compression="snappy", store_schema=False) as sink:
            for first in range(0, rows, max(1, GROUP_TOKENS // seq_len)):
                count = min(rows - first, max(1, GROUP_TOKENS // seq_len))
                start = int(rng.integers(0, len(ids) - count * seq_len))
                cuts = np.sort(rng.integers(1, seq_len, (count, 2)), axis=1)
                edges = np.zeros((count, 1), np.int64)
                bounds = np.concatenate([edges, cuts, edges + seq_len], axis=1).astype(np.int32)
                lists = [_lists(ids[start : start + count * seq_len], seq_len), _lists(bounds.ravel(), 4)]
                sink.write_table(pa.Table.from_arrays(lists, schema=_SCHEMA), row_group_size=count)
        files.append(FileInfo(path.name, rows, rows * seq_len, path.stat().st_size))
    commit(folder, Manifest(tuple(files), rows * FILES, rows * FILES * seq_len, None, seq_len))
    return folder


_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "cu_seqlens": pa.list_(pa.int32())})


def _lists(values: np.ndarray, length: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(np.arange(0, len(values) + 1, length, dtype=np.int32), values)


def run(name: str, table: Path | str, args: argparse.Namespace, work: Path) -> dict:
    """Cost of a loader; of several ranks: the slowest's time, all their tokens and memory."""
    say(f"{name} ...")
    python = peer_environment(work, name) if name in PEERS else Path(sys.executable)
    command = [python, "benchmarks/peers/loaders.py", name, table, args.seq_len, args.batch, work]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    running = [
        subprocess.Popen(
            [*map(str, command), str(rank), str(args.ranks)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(args.ranks)
    ]  # fmt: skip
    costs = []
    for process in running:
        out, err = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{name} ended with exit code {process.returncode}:\n{err[-3000:]}")
        costs.append(json.loads(out.strip().splitlines()[-1]))
    whole = max(costs, key=lambda cost: cost["seconds"])
    return {
        **whole,
        "tokens": sum(cost["tokens"] for cost in costs),
        "busy": sum(cost["busy"] for cost in costs),
        "peak_bytes": sum(cost["peak_bytes"] for cost in costs),
    }


def peer_environment(work: Path, name: str) -> Path | None:
    """A virtual environment for a peer that finds this one's packages, so torch is not installed twice.

    None, and a line that says so, where pip cannot install the peer.
    """
    home = work / f"peer-{name}"
    if not (home / "installed").exists():
        say(f"installing {', '.join(PEERS[name])}")
        venv.create(home, with_pip=True, clear=True)
        (site,) = (home / "lib").glob("python3*/site-packages")
        ours = [path for path in sys.path if path.endswith("site-packages")]
        (site / "shared.pth").write_text("\n".join(ours) + "\n")
        install = [home / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", *PEERS[name]]
        if subprocess.run(install, check=False).returncode:
            say(f"{name} is left out: it could not be installed with {' '.join(map(str, install))}")
            return None
        (home / "installed").touch()
    return home / "bin/python"


def _table(costs: dict[str, dict]) -> str:
    limit = costs.get("pyarrow")
    header = (
        "loader",
        "M tokens/s",
        "of pyarrow",
        "M tokens/core s",
        "first batch s",
        "resume s",
        "preparing s",
        "peak MB",
    )
    rows = []
    for name, cost in costs.items():
        rate = cost["tokens"] / cost["seconds"]
        share = f"{rate / (limit['tokens'] / limit['seconds']):.0%}" if limit else "-"
        resume = "-" if cost["resume"] is None else f"{cost['resume']:.3f}"
        busy = f"{cost['tokens'] / cost['busy'] / 1e6:.1f}"
        rows.append([name, rate / 1e6, share, busy, cost["first"], resume, cost["prepared"], cost["peak_bytes"] / 1e6])
    return format_table(header, rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.split("\n\n")[0])
    parser.add_argument("--millions", type=int, nargs="+", default=[104], help="tokens of the table")
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch")
    parser.add_argument("--ranks", type=int, default=1, help="processes of one node that share the table (fft only)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks", help="kept between runs")
    parser.add_argument("--only", nargs="+", choices=LOADERS, help="default: all")
    parser.add_argument("--lake", metavar="URL", help=f"read from a store, whose credentials are set: {OF_STORES} can")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
