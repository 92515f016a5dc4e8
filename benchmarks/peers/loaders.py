"""One epoch of packed rows through one loader, in this process; prints what it cost as JSON.

    python benchmarks/peers/loaders.py KIND TABLE SEQ_LEN BATCH WORK [RANK RANKS]

KIND is pyarrow (no shuffle, no batches: the limit), fft, datasets, mosaic or litdata. Peers make batches of ids alone;
ours have labels and document boundaries as well.
"""

import importlib
import json
import os
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

sys.path[0] = str(Path(__file__).resolve().parents[2])

#: Rows in the buffer that Hugging Face datasets shuffles.
WINDOW = 10_000


def read_pyarrow(table: Path, seq_len: int, batch: int, work: Path) -> tuple[Iterator[int], None]:
    """Decode input_ids of all files, in order."""
    import pyarrow.parquet as pq

    def tokens() -> Iterator[int]:
        for path in sorted(table.glob("*.parquet")):
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
                for rows in file.iter_batches(512, columns=["input_ids"]):
                    yield len(rows.column(0).flatten())

    return tokens(), None


def read_fft(table: Path | str, seq_len: int, batch: int, work: Path) -> tuple[Iterator[int], Callable[[], float]]:
    """Ours, shuffled."""
    from fft.data.batches import BatchPlan, Loader
    from fft.data.reader import SampleReader
    from fft.data.table import Table

    def loader() -> Loader:
        reader = SampleReader(Table.open(table), seq_len, seed=0)
        rank, ranks = map(int, sys.argv[6:8])
        return Loader(reader, BatchPlan(ranks, rank, 1, batch), reader.samples_per_epoch)

    def resume() -> float:
        begin = time.perf_counter()
        middle = loader()
        half = middle.state_dict() | {"samples": middle._reader.samples_per_epoch // 2}
        middle.load_state_dict(half)
        next(iter(middle))
        return time.perf_counter() - begin

    return (step[0].input_ids.size for step in loader()), resume


def read_datasets(table: Path, seq_len: int, batch: int, work: Path) -> tuple[Iterator[int], None]:
    """Hugging Face datasets, streaming the same parquet files, shuffled in a buffer."""
    import datasets
    import torch

    files = sorted(map(str, table.glob("*.parquet")))

    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, columns=["input_ids"])
    rows = rows.shuffle(seed=0, buffer_size=WINDOW).with_format("torch")
    loader = torch.utils.data.DataLoader(rows, batch_size=batch)
    return (step["input_ids"].numel() for step in loader), None


def read_mosaic(table: Path | str, seq_len: int, batch: int, work: Path) -> tuple[Iterator[int], None]:
    """MosaicML streaming, after its conversion to shards, shuffled by its default py1e."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    stand_in_for_torchvision()
    from streaming import MDSWriter, StreamingDataset

    from fft.data.storage import Storage

    shards = work / "mds"
    shutil.rmtree(shards, ignore_errors=True)
    begin = time.perf_counter()
    if isinstance(table, str):  # in a store: read there, its shards put there, and read back
        os.environ["S3_ENDPOINT_URL"] = os.environ.get("AWS_ENDPOINT_URL", "")
        out = f"{table}-mds-{time.time_ns()}"
        source = Storage.at(table)
        names = sorted(name for name in source.here() if name.endswith(".parquet"))
        files = (source.filesystem.open_input_file(source.path(name)) for name in names)
    else:
        out, files = str(shards), iter(sorted(table.glob("*.parquet")))
    with MDSWriter(out=out, columns={"input_ids": "ndarray:int32"}) as sink:
        for file in files:
            for rows in pq.ParquetFile(file).iter_batches(512, columns=["input_ids"]):
                for row in rows.column(0):
                    sink.write({"input_ids": row.values.to_numpy().astype(np.int32)})
    print(json.dumps({"conversion": time.perf_counter() - begin}), file=sys.stderr)
    remote = out if isinstance(table, str) else None
    dataset = StreamingDataset(remote=remote, local=str(shards), shuffle=True, batch_size=batch)
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch)
    return (step["input_ids"].numel() for step in loader), None


def read_litdata(table: Path, seq_len: int, batch: int, work: Path) -> tuple[Iterator[int], None]:
    """Lightning's litdata, after its conversion to chunks of tokens, shuffled by its default."""
    import litdata

    chunks = work / "litdata"
    shutil.rmtree(chunks, ignore_errors=True)
    files = sorted(map(str, table.glob("*.parquet")))
    loader = litdata.TokensLoader(block_size=seq_len)
    flags = {"chunk_bytes": "64MB", "num_workers": os.cpu_count(), "verbose": False}
    litdata.optimize(token_rows, files, str(chunks), item_loader=loader, **flags)
    dataset = litdata.StreamingDataset(str(chunks), item_loader=litdata.TokensLoader(block_size=seq_len), shuffle=True)
    return (step.numel() for step in litdata.StreamingDataLoader(dataset, batch_size=batch)), None


def token_rows(path: str) -> Iterator[object]:
    """Rows of a file as tensors, which litdata's processes convert."""
    import pyarrow.parquet as pq
    import torch

    for rows in pq.ParquetFile(path).iter_batches(512, columns=["input_ids"]):
        for row in rows.column(0):
            yield torch.from_numpy(row.values.to_numpy().copy())


def stand_in_for_torchvision() -> None:
    """Let MosaicML's streaming be imported, which imports torchvision for its image datasets; the wheel for another
    torch would be gigabytes.
    """
    importlib.import_module("transformers")  # before it can see what stands for torchvision here
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    sys.modules |= {name: types.ModuleType(name) for name in names}
    sys.modules["torchvision.datasets"].VisionDataset = object
    sys.modules["torchvision.transforms.functional"].to_tensor = None


def peak_bytes() -> int:
    """Peak resident memory. (``ru_maxrss`` would count the parent's, from before this program was loaded.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def print_and_exit(cost: dict) -> NoReturn:
    """End this process: some peers' threads would keep it."""
    print(json.dumps(cost))
    sys.stdout.flush()
    os._exit(0)


KINDS = {
    "pyarrow": read_pyarrow,
    "fft": read_fft,
    "datasets": read_datasets,
    "mosaic": read_mosaic,
    "litdata": read_litdata,
}
#: Those that convert the table first.
CONVERTS = ("mosaic", "litdata")


def main() -> None:
    """See the module."""
    kind, place, seq_len, batch, work = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    table = place if "://" in place else Path(place)
    begin = time.perf_counter()
    steps, resume = KINDS[kind](table, seq_len, batch, Path(work))
    ready, busy = time.perf_counter(), time.process_time()
    tokens = next(steps)
    first = time.perf_counter()
    for size in steps:
        tokens += size
    end, busy = time.perf_counter(), time.process_time() - busy
    cost = {
        "tokens": tokens,
        "seconds": end - ready,
        "busy": busy,
        "first": first - (ready if kind in CONVERTS else begin),
        "prepared": ready - begin if kind in CONVERTS else 0.0,
        "resume": resume() if resume else None,
        "peak_bytes": peak_bytes(),
    }
    print_and_exit(cost)


if __name__ == "__main__":
    main()
